"""The FP8 weights of a converted snapshot, beside the original's layers that they stand for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...converter.format.layout import INPUT_SCALE, W8A8, WEIGHT
from ...converter.plan.decide import Decision, PlannedTensor, group_of
from ...converter.snapshot.access import HubAccess
from ...converter.telling.errors import ConvertError, LoadError
from .. import kernels
from ..checkpoint import fetched, fp8_modules, open_snapshot, record_of
from ..component import Target, load
from ..weights import Fp8Weight
from .original import Layer, Original


@dataclass(frozen=True)
class SnapshotWeights:
    """What the snapshot's codes and scales stand for, held in host memory and dequantised when asked for."""

    modules: Mapping[Layer, Fp8Weight]

    def __call__(self, layer: Layer) -> Tensor:
        held, device = self.modules[layer], layer.module.weight.device
        return kernels.dequantize(held.codes.to(device), held.scale.to(device), torch.float32, held.block)


def snapshot_weights(source: str | os.PathLike[str], original: Original, access: HubAccess) -> SnapshotWeights:
    """The FP8 linears of every component of the snapshot that has W8A8 layers, by the original's layers.

    Raises LoadError for a snapshot that cannot be loaded, or that is not converted; ConvertError for one that was not
    made from the original's weights alone.
    """
    snapshot, files = open_snapshot(source, access)
    record = record_of(files)
    if record is not None and record.recipe.merged_loras:
        raise ConvertError(
            f"{snapshot.label} has a LoRA merged, so its weights are not the original's; convert without."
        )
    root = fetched(snapshot, files)
    modules: dict[Layer, Fp8Weight] = {}
    for component in snapshot.components:
        found = fp8_modules(component)
        if component.name and any(how.mode == W8A8 for how in found.modules.values()):
            model = load(component, root, {}, Target(torch.device("cpu"), torch.bfloat16))
            modules |= _paired(original, component.name, model, snapshot.label)
    if not modules:
        raise LoadError(f"{snapshot.label} has no W8A8 layers; give a snapshot that was converted from the original.")
    return SnapshotWeights(modules)


def _paired(original: Original, component: str, model: torch.nn.Module, label: str) -> dict[Layer, Fp8Weight]:
    """The model's FP8 linears by the layers of the original that have their names."""
    plan = next((c for c in original.plan.components if c.source.name == component), None)
    tensors = {t.module: t for t in plan.tensors if t.info.name.endswith(WEIGHT)} if plan is not None else {}
    groups = plan.rules.fusion_groups if plan is not None and plan.rules is not None else ()
    theirs = dict(getattr(original.pipe, component, torch.nn.Module()).named_modules())
    held = dict(model.named_modules())
    names: Mapping[str, str] = model.hf_quantizer.names  # type: ignore[union-attr, assignment]
    paired: dict[Layer, Fp8Weight] = {}
    for name, own in names.items():
        module, here = held[own], theirs.get(own)
        if not isinstance(module, Fp8Weight) or not isinstance(module, torch.nn.Linear):
            continue
        if name not in tensors or not isinstance(here, torch.nn.Linear) or here.weight.shape != module.codes.shape:
            raise ConvertError(f"{label} has {name} in {component}, and its original has not; give its own original.")
        tensor = _with_format(tensors[name], module)
        paired[Layer(component, here, tensor, group_of(tensor, groups))] = module
    return paired


def _with_format(tensor: PlannedTensor, module: Fp8Weight) -> PlannedTensor:
    scale = module._buffers.get(INPUT_SCALE.removeprefix("."))
    decision = Decision(
        "snapshot",
        "as the snapshot has it",
        "Linear",
        module.format,
        input_scale=None if scale is None else float(scale),
    )
    return replace(tensor, decision=decision)
