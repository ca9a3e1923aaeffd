"""Which tensors the LoRAs of a recipe change: each of their weights is found, or the LoRA is refused by name."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from ..format.layout import SOURCE_DTYPES, WEIGHT
from ..snapshot.snapshot import Snapshot
from ..telling.errors import ConvertError
from ..telling.quantities import plural
from .decide import PlannedTensor
from .lora import Lora, LowRank
from .recipe import Recipe

Decisions = dict[str, dict[str, PlannedTensor]]


def with_merges(
    decisions: Decisions, snapshot: Snapshot, recipe: Recipe, converted: Collection[str]
) -> tuple[Decisions, list[str]]:
    """The decisions with what the recipe's LoRAs add, and a note on each; converted: the components that are.

    Raises ConvertError for a weight that is not there, not converted, or of another shape.
    """
    changed = {component: dict(tensors) for component, tensors in decisions.items()}
    notes = []
    for lora in recipe.loras:
        counts: Counter[str] = Counter()
        for (component, module), change in lora.changes.items():
            label = _label(component, snapshot)
            if component not in converted:
                raise ConvertError(
                    f"The LoRA {lora.label} changes {label}, which is copied and not converted here; convert it too, "
                    f"or keep to LoRAs of {' and '.join(_label(c, snapshot) for c in converted)}."
                )
            tensors = changed[component]
            tensor = _find(lora, label, module, tensors)
            _check_fits(lora, tensor, change)
            tensors[tensor.info.name] = replace(tensor, merges=(*tensor.merges, change))
            counts[label] += 1
        notes += [_note(lora, label, count) for label, count in counts.items()]
    return changed, notes


def _label(component: str, snapshot: Snapshot) -> str:
    return next(c.label for c in snapshot.components if c.name == component)


def _find(lora: Lora, label: str, module: str, tensors: Mapping[str, PlannedTensor]) -> PlannedTensor:
    if (tensor := tensors.get(module + WEIGHT)) is not None:
        return tensor
    names = [name.removesuffix(WEIGHT) for name in tensors if name.endswith(WEIGHT)]
    near = difflib.get_close_matches(module, names, n=1, cutoff=0.3)
    hint = f"the closest is {near[0]}" if near else "none resembles it"
    raise ConvertError(
        f"The LoRA {lora.label} changes {module}, and {label} has no such weight ({hint}); check that it was trained "
        "for this model."
    )


def _check_fits(lora: Lora, tensor: PlannedTensor, change: LowRank) -> None:
    info, shape = tensor.info, (change.b.shape[0], change.a.shape[1])
    if info.shape != shape:
        raise ConvertError(
            f"The LoRA {lora.label} changes {info.name} by a matrix {list(shape)}, and it is {list(info.shape)}; check "
            "that it was trained for this model."
        )
    if info.dtype not in SOURCE_DTYPES:
        raise ConvertError(
            f"The LoRA {lora.label} changes {info.name}, which is {info.dtype}; only BF16, FP16 and FP32 weights can "
            "be changed."
        )


def _note(lora: Lora, label: str, count: int) -> str:
    what = f"the LoRA {lora.label} ({lora.sha256[:12]})"
    return f"{what} is merged at scale {lora.scale:g} into {plural(count, 'weight')} of {label}"
