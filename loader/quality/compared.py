"""What a comparison found, as data: distances of pictures, errors of layers, times, and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ...converter.telling.notebook import html_table, one_line
from . import words
from .passes import Run
from .pictures import Distance
from .running import Case, Sampling
from .weight_errors import LayerError

WORST_LAYERS = 10


@dataclass(frozen=True)
class Summary:
    """Distances over frames. identical: how many of the frames are bit for bit the original's; they are left out of
    the mean PSNR, which is None, as the worst is, where all are. worst: of the worst frame of each measure."""

    frames: int
    identical: int
    psnr: float | None
    worst_psnr: float | None
    ssim: float | None
    worst_ssim: float | None
    lpips: float | None
    worst_lpips: float | None

    @classmethod
    def of(cls, distances: Iterable[Distance]) -> Summary | None:
        """None where there is nothing to sum up."""
        found = list(distances)
        if not found:
            return None
        psnr = [d.psnr for d in found if not d.identical]
        ssim = [d.ssim for d in found if d.ssim is not None]
        lpips = [d.lpips for d in found if d.lpips is not None]
        return cls(
            len(found),
            len(found) - len(psnr),
            mean(psnr) if psnr else None,
            min(psnr, default=None),
            mean(ssim) if ssim else None,
            min(ssim, default=None),
            mean(lpips) if lpips else None,
            max(lpips, default=None),
        )


@dataclass(frozen=True)
class ComparedCase:
    """One prompt and seed. fp8, control: the distance of every frame from the original's, None where one of the two
    holds NaN or Inf; control is empty without one. broken: whose frames hold NaN or Inf."""

    case: Case
    fp8: tuple[Distance | None, ...]
    control: tuple[Distance | None, ...] = ()
    broken: tuple[str, ...] = ()

    @property
    def summary(self) -> Summary | None:
        return Summary.of(d for d in self.fp8 if d is not None)

    @property
    def control_summary(self) -> Summary | None:
        return Summary.of(d for d in self.control if d is not None)

    @property
    def worst_frame(self) -> int:
        """The frame to look at: one that is broken, else the farthest from the original."""
        return min(range(len(self.fp8)), key=lambda i: -math.inf if (d := self.fp8[i]) is None else d.psnr)


@dataclass(frozen=True)
class Ran:
    """A pipeline of the comparison. recipe: how it was converted, as its record or `quantization_config` says."""

    label: str
    repo: str | None
    commit: str | None
    run: Run
    recipe: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "run": self.run.to_json()}


@dataclass(frozen=True)
class Controlled:
    """The original against itself. change: what was changed, to follow "the original". failed: why there is none."""

    kind: str
    change: str
    failed: str | None = None


@dataclass(frozen=True, repr=False)
class Comparison:
    """An FP8 pipeline against its original: printing it is the report, `to_json` has all of it.

    layers: the weights' errors, None where there were no files to compare. notes: what limits the comparison.
    problems: what is wrong, a sentence each. page: where the HTML page was written.
    """

    fp8: Ran
    original: Ran
    control: Controlled | None
    cases: tuple[ComparedCase, ...]
    layers: tuple[LayerError, ...] | None
    sampling: Sampling
    machine: Mapping[str, str]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    page: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; how far pictures may move is for `fail_below` to say."""
        return not self.problems

    @property
    def summary(self) -> Summary | None:
        """FP8 against the original over all frames; None where no frame could be compared."""
        return Summary.of(d for case in self.cases for d in case.fp8 if d is not None)

    @property
    def control_summary(self) -> Summary | None:
        return Summary.of(d for case in self.cases for d in case.control if d is not None)

    @property
    def worst_layers(self) -> tuple[LayerError, ...]:
        """Those with a problem, then those with the lowest SQNR; ten, or all that have a problem."""
        ranked = sorted(
            self.layers or (), key=lambda e: (e.problem is None, -math.inf if math.isnan(e.sqnr) else e.sqnr)
        )
        return tuple(ranked[: max(WORST_LAYERS, sum(e.problem is not None for e in ranked))])

    @property
    def verdict(self) -> str:
        """What the distances say, in a sentence or two."""
        return words.verdict(self)

    def to_json(self) -> dict[str, Any]:
        """Everything, for scripts: what `json.dumps` takes. An infinite PSNR is null, and `identical` says so."""
        sampling = {key: value for key, value in vars(self.sampling).items() if key != "extra"}
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "problems": [*self.problems],
            "notes": [*self.notes],
            "fp8": self.fp8.to_json(),
            "original": self.original.to_json(),
            "control": asdict(self.control) if self.control else None,
            "summary": {"fp8": _summary(self.summary), "control": _summary(self.control_summary)},
            "cases": [_case(case) for case in self.cases],
            "layers": None if self.layers is None else [layer.to_json() for layer in self.layers],
            "sampling": {**sampling, "seeds": [*self.sampling.seeds], "extra": sorted(self.sampling.extra)},
            "machine": dict(self.machine),
            "page": None if self.page is None else str(self.page),
        }

    def __repr__(self) -> str:
        return one_line(self, f"{self.fp8.label} against {self.original.label}: {self.verdict}")

    def __str__(self) -> str:
        return words.report(self)

    def _repr_html_(self) -> str:
        header, *rows = words.distances(self)
        return html_table(f"{self.fp8.label} against {self.original.label}", header, rows, words.remarks(self))


def _summary(summary: Summary | None) -> dict[str, Any] | None:
    return None if summary is None else {key: _rounded(value) for key, value in asdict(summary).items()}


def _case(case: ComparedCase) -> dict[str, Any]:
    prompt = case.case.prompt
    return {
        "prompt": prompt.text,
        "negative_prompt": prompt.negative,
        "image": None if prompt.image is None else prompt.image.name,
        "seed": case.case.seed,
        "broken": [*case.broken],
        "summary": _summary(case.summary),
        "control_summary": _summary(case.control_summary),
        "frames": [_distance(d) for d in case.fp8],
        "control_frames": [_distance(d) for d in case.control],
    }


def _distance(distance: Distance | None) -> dict[str, Any] | None:
    if distance is None:
        return None
    return {"identical": distance.identical, **{key: _rounded(value) for key, value in asdict(distance).items()}}


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None
