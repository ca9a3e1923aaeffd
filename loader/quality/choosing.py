"""The smallest set of layers to keep that meets a budget, from what each contributes to its model's output error.

Errors of different layers are taken for independent, so that their squares add: what all FP8 layers together do was
measured, and each unit's share of it is its own error over the sum of all of them,

    estimate(kept) = measured(all FP8) * sum of the errors of units not kept / sum of all errors.

Units are kept in the order of share per byte; what turns out to be needed no more is given back at the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ...converter.plan.recipe import parse_size
from ...converter.telling.errors import SettingsError
from ...converter.telling.quantities import byte_count


@dataclass(frozen=True)
class Budget:
    """Either the least signal-to-noise ratio of every model's output, in dB, or the most bytes beyond plain FP8."""

    decibels: float | None = None
    bytes: int | None = None

    @classmethod
    def read(cls, text: str) -> Budget:
        """`40dB`, or bytes as in `200MB`. Raises SettingsError."""
        if (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*dB\s*", text, re.IGNORECASE | re.ASCII)) is not None:
            return cls(decibels=float(found[1]))
        try:
            return cls(bytes=parse_size(text))
        except ValueError:
            raise SettingsError(f"budget is {text!r:.80}; use decibels, as in 40dB, or bytes, as in 200MB.") from None

    @property
    def error(self) -> float:
        """The largest squared error over the squared output that the decibels allow."""
        return 0.0 if self.decibels is None else 10 ** (-self.decibels / 10)

    def __str__(self) -> str:
        return f"{self.decibels:g} dB" if self.decibels is not None else byte_count(self.bytes or 0)


@dataclass(frozen=True)
class Candidate:
    """Something that may be kept. error: of its component's output when it alone is FP8. cost: bytes if it is kept.

    fixed: it stays FP8 whatever the budget.
    """

    component: str
    error: float
    cost: int
    fixed: bool = False


def estimate(candidates: Sequence[Candidate], kept: Collection[int], plain: Mapping[str, float]) -> dict[str, float]:
    """The output error of each component with these candidates, by index, kept. plain: that without any."""
    sums = {component: [0.0, 0.0] for component in plain}
    for index, candidate in enumerate(candidates):
        sums[candidate.component][0] += 0.0 if index in kept else candidate.error
        sums[candidate.component][1] += candidate.error
    return {c: plain[c] * left / whole if whole else plain[c] for c, (left, whole) in sums.items()}


def choose(candidates: Sequence[Candidate], plain: Mapping[str, float], budget: Budget) -> list[int]:
    """What to keep, by index. More decibels than keeping everything gives are met as far as they can be."""
    whole = {c: sum(x.error for x in candidates if x.component == c) for c in plain}
    shares = [x.error / whole[x.component] if whole[x.component] else 0.0 for x in candidates]
    worth = [shares[i] / x.cost if x.cost > 0 else math.inf for i, x in enumerate(candidates)]
    open_ = [i for i, share in enumerate(shares) if share > 0 and not candidates[i].fixed]
    ordered = sorted(open_, key=lambda i: (-worth[i], i))
    if budget.bytes is not None:
        return _within_bytes(candidates, ordered, budget.bytes)
    kept: list[int] = []
    for index in ordered:
        component = candidates[index].component
        if estimate(candidates, kept, plain)[component] > budget.error:
            kept.append(index)
    for index in reversed(kept.copy()):
        others = [i for i in kept if i != index]
        if estimate(candidates, others, plain)[candidates[index].component] <= budget.error:
            kept = others
    return sorted(kept)


def _within_bytes(candidates: Sequence[Candidate], ordered: Sequence[int], most: int) -> list[int]:
    kept, left = [], most
    for index in ordered:
        if candidates[index].cost <= left:
            kept.append(index)
            left -= candidates[index].cost
    return sorted(kept)
