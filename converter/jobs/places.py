"""Where attempts at jobs run: what a batch asks of a place, and the plainest one, this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .job import Job
from .outcome import Outcome

Attempt = Callable[[Job], Outcome]


class Place(Protocol):
    """most: how many jobs may be under way."""

    most: int

    def begin(self, job: Job) -> None: ...
    def finished(self, seconds: float) -> list[Outcome]:
        """What came of jobs that were begun, as soon as there is one; none after so long a wait. Some are under way."""
        ...

    def close(self) -> None:
        """Stop what is under way, in a way that another attempt can take up."""
        ...


class Here:
    """One job after the other, in this process."""

    most = 1

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._outcomes: list[Outcome] = []

    def begin(self, job: Job) -> None:
        self._outcomes.append(self._attempt(job))

    def finished(self, seconds: float) -> list[Outcome]:
        found, self._outcomes = self._outcomes, []
        return found

    def close(self) -> None: ...
