"""What came of the jobs of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..telling.notebook import html_table, one_line
from ..telling.printable import printable
from ..telling.quantities import change, plural
from .job import Job

Status = Literal["converted", "already done", "planned", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    error: one sentence, of the last attempt; None unless it failed. again: whether another attempt may do better.
    hosts: whose each attempt was, None for a worker that was lost; none for a job that makes no sense. seconds: of the
    last attempt. result: what `convert` tells a script, or of a plan its bytes and notes.
    """

    job: Job
    status: Status
    error: str | None = None
    again: bool = False
    hosts: tuple[str | None, ...] = ()
    seconds: float = 0.0
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attempts(self) -> int:
        return len(self.hosts)

    def __str__(self) -> str:
        if self.error is not None:
            return f"failed: {self.job}: {printable(self.error)}"
        sizes = change(self.result["bytes_before"], self.result["bytes_after"])
        taken = "" if self.status in ("planned", "already done") else f" in {self.seconds:.1f} s"
        return f"{self.status}: {self.job} to {printable(self.job.output)}, {sizes}{taken}"

    def to_json(self) -> dict[str, Any]:
        stated = {"line": self.job.line, "source": self.job.source, "output": self.job.output, "status": self.status}
        own = {"error": self.error, "attempts": self.attempts, "hosts": self.hosts, "seconds": round(self.seconds, 3)}
        return {**stated, **own, "result": dict(self.result) or None}


@dataclass(frozen=True, repr=False)
class Batch:
    """The outcomes of a batch, in the order of its jobs. seconds: of all of it."""

    outcomes: tuple[Outcome, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    @property
    def counts(self) -> dict[Status, int]:
        """Jobs by what came of them."""
        return dict(Counter(outcome.status for outcome in self.outcomes))

    def to_json(self) -> dict[str, Any]:
        return {
            "jobs": [outcome.to_json() for outcome in self.outcomes],
            "counts": self.counts,
            "bytes_before": self._bytes("bytes_before"),
            "bytes_after": self._bytes("bytes_after"),
            "seconds": round(self.seconds, 3),
        }

    def lines(self) -> Iterator[str]:
        """The summary, and a line for each job that failed."""
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        sizes = change(self._bytes("bytes_before"), self._bytes("bytes_after"))
        yield f"{plural(len(self.outcomes), 'job')} in {self.seconds:.1f} s: {counts}; {sizes}"
        for outcome in self.failed:
            tried = f" ({plural(outcome.attempts, 'attempt')})" if outcome.attempts > 1 else ""
            yield f"{outcome}{tried}"

    def _bytes(self, key: str) -> int:
        return sum(outcome.result[key] for outcome in self.outcomes if outcome.status != "failed")

    def __repr__(self) -> str:
        return one_line(self, next(self.lines()))

    def _repr_html_(self) -> str:
        rows = [(str(o.job.line), o.job.source, o.status, o.error or "") for o in self.outcomes]
        return html_table(next(self.lines()), ("line", "source", "status", "error"), rows, ())
