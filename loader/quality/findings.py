"""What a comparison says beside its numbers: what is wrong, and what its numbers cannot tell."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...converter.telling.quantities import plural
from .compared import ComparedCase, Comparison
from .sides import Side

_BROKEN = {"original": "The original itself gives", "FP8": "FP8 gives", "control": "The control gives"}


def problems(found: Comparison, fail_below: float | None) -> Iterator[str]:
    """What is wrong, a sentence each: pictures that are no pictures, layers that are not the original's, the limit."""
    for whose, says in _BROKEN.items():
        if broken := [case for case in found.cases if _is_to_blame(whose, case)]:
            count = f"{len(broken)} of {plural(len(found.cases), 'case')}"
            yield f"{says} NaN or Inf in {count}, first for {broken[0].case.label:.120}."
    for layer in found.layers or ():
        if layer.problem is not None:
            yield f"{layer.label} {layer.problem}."
    summary = found.summary
    if fail_below is not None and summary is not None and summary.worst_psnr is not None:
        below = [case for case in found.cases if _worst(case) < fail_below]
        if below:
            worst = min(below, key=_worst)
            yield (
                f"PSNR falls below {fail_below:g} dB in {len(below)} of {plural(len(found.cases), 'case')}, to "
                f"{_worst(worst):.1f} dB for {worst.case.label:.120}."
            )


def limits(found: Comparison, ours: Side, theirs: Side) -> Iterator[str]:
    """What the numbers cannot tell, a sentence each."""
    if found.control is not None and found.control.failed is not None:
        yield f"there is no control: the original {found.control.change} failed ({found.control.failed})"
    if dequantized := [reason for reason in found.fp8.run.products if reason.startswith("dequantize")]:
        count = sum(found.fp8.run.products[reason] for reason in dequantized)
        why = "; ".join(reason.partition(": ")[2] for reason in dequantized)
        yield (
            f"{plural(count, 'W8A8 linear')} ran dequantised ({why}): there the pictures show the error of the "
            "weights, and not that of FP8 activations"
        )
    if found.layers is None:
        yield f"the weights were not compared: {_why_no_layers(ours, theirs)}"
    if coarse := [layer for layer in found.layers or () if layer.coarse]:
        worst = min(coarse, key=lambda layer: layer.sqnr)
        yield (
            f"{plural(len(coarse), 'layer')} of less than 20 dB, though rounded right: a scale is too coarse, first "
            f"for {worst.label} ({worst.sqnr:.1f} dB)"
        )


def _is_to_blame(whose: str, case: ComparedCase) -> bool:
    """Whether pictures are broken, and not because the original's are."""
    return whose in case.broken and (whose == "original" or "original" not in case.broken)


def farness(case: ComparedCase) -> float:
    """Orders cases by what there is to look at: broken ones, then the farthest from the original."""
    return -math.inf if case.broken else _worst(case)


def _worst(case: ComparedCase) -> float:
    return min((d.psnr for d in case.fp8 if d is not None), default=math.inf)


def _why_no_layers(ours: Side, theirs: Side) -> str:
    if ours.record is not None and ours.record.recipe.merged_loras:
        return "a LoRA was merged before they were converted"
    if theirs.held is None:
        return "the pipelines were handed over"
    return "they were converted while loading, by the code that writes snapshots"
