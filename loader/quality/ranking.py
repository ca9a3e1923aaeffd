"""The ranking of units by what FP8 of each alone does to its model's output, and layers that a snapshot has wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...converter.telling.notebook import Brief
from ...converter.telling.progress import Progress
from .layer_errors import LayerError, decibels
from .measuring import Run
from .units import Unit

_WRONG = 10 ** (1 / 10)  # times the error of rounding to nearest, 1 dB: other ways to round differ by less
_TINY = 1e-30


@dataclass(frozen=True, repr=False)
class Ranked(Brief):
    """A unit's place.

    error: of its model's output with it alone in FP8. share: of the sum of all units' errors. cost: bytes that keeping
    it takes. own: errors of its layers' own outputs, over all steps, and by step.
    """

    component: str
    name: str
    pattern: str
    layers: tuple[str, ...]
    cost: int
    error: float
    share: float
    own: LayerError
    steps: Mapping[int, LayerError]

    @property
    def label(self) -> str:
        return f"{self.component}.{self.name}"


@dataclass(frozen=True, repr=False)
class Suspect(Brief):
    """A layer whose weights in the snapshot are further from the original's than rounding puts them.

    error: of its output with them; expected: with FP8 of the original's.
    """

    layer: str
    error: float
    expected: float

    def __str__(self) -> str:
        return (
            f"SUSPECT {self.layer}: its weights in the snapshot give its output {decibels(self.error):.1f} dB, and FP8 "
            f"of the original's would give {decibels(self.expected):.1f} dB"
        )


def errors_alone(run: Run, parts: Sequence[Unit], progress: Progress) -> list[float]:
    """The output error of each unit's component when nothing but the unit is FP8, less what is rounding."""
    found = []
    for unit in parts:
        error = run.models[unit.component].of(unit.layers, run.weights)
        found.append(max(0.0, error - run.rounding[unit.component]))
        progress.advance(len(unit.layers))
    return found


def rank(run: Run, parts: Sequence[Unit], alone: Sequence[float]) -> tuple[Ranked, ...]:
    """The units, worst first. alone: their `errors_alone`."""
    whole = {c: sum(e for u, e in zip(parts, alone, strict=True) if u.component == c) for c in run.models}
    found = []
    for unit, error in zip(parts, alone, strict=True):
        own = run.own.error(unit.layers)
        assert own is not None  # its layers ran
        steps = {step: at for step in run.own.steps if (at := run.own.error(unit.layers, step)) is not None}
        share = error / whole[unit.component] if whole[unit.component] else 0.0
        names = tuple(layer.name for layer in unit.layers)
        found.append(Ranked(unit.component, unit.name, unit.pattern, names, unit.cost, error, share, own, steps))
    return tuple(sorted(found, key=lambda ranked: (-ranked.share, -ranked.own.both)))


def suspects(run: Run) -> tuple[Suspect, ...]:
    """Layers of a snapshot whose weights are wrong by more than rounding, worst first."""
    found = []
    for layer in run.layers:
        own = run.own.error([layer])
        if own is not None and own.expected is not None and own.weights > _WRONG * own.expected:
            found.append(Suspect(layer.label, own.weights, own.expected))
    return tuple(sorted(found, key=lambda suspect: -suspect.error / max(suspect.expected, _TINY)))
