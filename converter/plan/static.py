"""Static activations: which input scale each W8A8 layer gets, and why a layer can have none.

A file of input scales names its layers `MODULE.input_scale`, or `COMPONENT.MODULE.input_scale` where two components
have a W8A8 layer of that name, as the two DiTs of Wan have. A fusion group reads one input: it takes the largest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from ..format.layout import INPUT_SCALE, W8A8
from ..targets.target import NATIVE
from ..telling.errors import ConvertError
from ..telling.quantities import plural
from .decide import PlannedTensor
from .recipe import Recipe

Decisions = Mapping[str, Mapping[str, PlannedTensor]]  # by component and tensor name
Layer = tuple[str, str]  # a component's name and a module's


def qualified(component: str, module: str) -> str:
    """The module's name behind its component's, which is "" for a folder that is a component itself."""
    return f"{component}.{module}" if component else module


def refuse_static(tensor: PlannedTensor, recipe: Recipe) -> None:
    """Raise ConvertError for a W8A8 weight that has more than one scale: its activations can have no static one."""
    if tensor.decision.per_tensor:
        return
    native = recipe.reader is NATIVE
    whose = f"The manifest {recipe.manifest.name}" if native else f"The target {recipe.target}"
    option = "--manifest" if native else "--target"
    if recipe.block:
        whose, option = "--weight-block-size", "--weight-block-size"
    raise ConvertError(
        f"{whose} gives {tensor.module} {tensor.decision.scheme} scales, and static activations go with one scale per "
        f"tensor; drop --activation-scheme static or pass another {option}."
    )


def with_input_scales(
    decisions: dict[str, dict[str, PlannedTensor]], recipe: Recipe
) -> tuple[dict[str, dict[str, PlannedTensor]], list[str]]:
    """The decisions with the activation scale of every W8A8 module, and notes. Raises ConvertError.

    What the file has for layers that are kept is not used, so that one file serves whatever is kept.
    """
    if recipe.input_scales is None:
        return decisions, []
    given, unused = _assigned(recipe.input_scales, decisions)
    largest: dict[Layer, float] = defaultdict(float)
    for component, tensor in _w8a8(decisions):
        refuse_static(tensor, recipe)
        if (component, tensor.module) not in given:
            raise ConvertError(
                f"The input scales lack {tensor.module}{INPUT_SCALE}{f' of {component}' if component else ''}; "
                "calibrate it or name the layer in --ignored-layers."
            )
        domain = component, tensor.decision.group or tensor.module
        largest[domain] = max(largest[domain], given[component, tensor.module])

    def scaled(component: str, tensor: PlannedTensor) -> PlannedTensor:
        if tensor.decision.mode != W8A8:
            return tensor
        scale = largest[component, tensor.decision.group or tensor.module]
        return replace(tensor, decision=replace(tensor.decision, input_scale=scale))

    notes = []
    if unused:
        layers = plural(len(unused), "layer")
        notes.append(f"the input scales of {layers} that are not W8A8 here, such as {unused[0]}, are not used")
    return {c: {n: scaled(c, t) for n, t in tensors.items()} for c, tensors in decisions.items()}, notes


def _w8a8(decisions: Decisions) -> list[tuple[str, PlannedTensor]]:
    return [(c, t) for c, tensors in decisions.items() for t in tensors.values() if t.decision.mode == W8A8]


def _assigned(given: Mapping[str, float], decisions: Decisions) -> tuple[dict[Layer, float], list[str]]:
    """The scale of each layer that the keys name, and the keys of layers that are not W8A8.

    Raises ConvertError for a key that names no layer, or more than one.
    """
    wanted = {(component, tensor.module) for component, tensor in _w8a8(decisions)}
    linears = {(c, t.module) for c, tensors in decisions.items() for t in tensors.values()}
    scales: dict[Layer, float] = {}
    unused = []
    for key, scale in given.items():
        meant = [(c, key.removeprefix(qualified(c, ""))) for c in decisions if key.startswith(qualified(c, ""))]
        meant += [(c, key) for c in decisions if c]
        owners = [layer for layer in meant if layer in wanted]
        if len(owners) > 1:
            names = " and of ".join(component for component, _ in owners)
            raise ConvertError(
                f"The input scale {key} is of a layer of {names}; name its component too, as in "
                f"{qualified(*owners[-1])}{INPUT_SCALE}."
            )
        if owners and owners[0] in scales:
            raise ConvertError(f"The input scales name {qualified(*owners[0])} twice, with its component and without.")
        if owners:
            scales[owners[0]] = scale
        elif any(layer in linears for layer in meant):
            unused.append(key)
        else:
            raise ConvertError(f"The input scales name {key}, which is no layer of this source; remove it.")
    return scales, unused
