"""The original pipeline, running, and the plan of its conversion: what is measured on it, is measured for that plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...converter.format.layout import W8A8, WEIGHT, WeightFormat
from ...converter.plan.decide import PlannedTensor, group_of
from ...converter.plan.plan import Plan
from ...converter.plan.planning import make_plan
from ...converter.plan.settings import Settings
from ...converter.snapshot.access import HubAccess
from ...converter.snapshot.locate import describe_source, fetch, open_files
from ...converter.snapshot.naming import name_tensors
from ...converter.snapshot.snapshot import Snapshot
from ...converter.telling.errors import ConvertError, LoadError
from ...converter.telling.progress import bars_of_libraries
from ..arguments import choose_dtype, without_habits
from ..assemble import accepted_arguments, assemble, pipeline_class

_ROOMY = 0.5


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear of the running pipeline that is, or would be, FP8.

    tensor: its weight and what becomes of it. group: of the linears that share its scale, by the manifest.
    """

    component: str
    module: nn.Linear
    tensor: PlannedTensor
    group: str | None = None

    @property
    def name(self) -> str:
        """Its name in the component's checkpoint."""
        return self.tensor.module

    @property
    def label(self) -> str:
        return f"{self.component}.{self.name}"

    @property
    def format(self) -> WeightFormat:
        """How its weight is FP8."""
        assert self.tensor.decision.format is not None
        return self.tensor.decision.format

    @property
    def input_scale(self) -> float | None:
        """Its static activation scale, if it has one."""
        return self.tensor.decision.input_scale

    @property
    def domain(self) -> tuple[str, str]:
        """What is converted or kept as one, and shares a per-tensor scale."""
        return self.component, self.group or self.name

    def in_format(self, how: WeightFormat) -> Layer:
        """The same layer, converted in another format."""
        decision = replace(self.tensor.decision, format=how, input_scale=None)
        return replace(self, tensor=replace(self.tensor, decision=decision))


@dataclass(frozen=True)
class Original:
    """A pipeline with its source's own weights, and the plan of converting it."""

    pipe: Any
    plan: Plan

    def layers(self) -> list[Layer]:
        """Every FP8 linear of the components that run W8A8, in the order of the checkpoint."""
        found = []
        for component in self.plan.components:
            if component.rules is None or not component.rules.runs_in_fp8:
                continue
            model = getattr(self.pipe, component.source.name)
            linears = [t for t in component.tensors if t.decision.mode is not None and t.decision.kind == "Linear"]
            names = name_tensors(model, [t.info.name for t in linears]).names
            modules = dict(model.named_modules())
            for tensor in linears:
                module = modules.get(names[tensor.info.name].removesuffix(WEIGHT))
                if not isinstance(module, nn.Linear):
                    raise LoadError(
                        f"{tensor.module} of {component.source.label} is no linear in {type(model).__name__}."
                    )
                group = group_of(tensor, component.rules.fusion_groups)
                found.append(Layer(component.source.name, module, tensor, group))
        return found

    def w8a8_layers(self) -> list[Layer]:
        """Those whose activations become FP8 too."""
        return [layer for layer in self.layers() if layer.format.mode == W8A8]


def open_original(
    source: str | os.PathLike[str],
    settings: Settings,
    access: HubAccess,
    *,
    device: torch.device,
    dtype: torch.dtype | str | None,
    given: Mapping[str, Any],
) -> Original:
    """Load a pipeline that is not converted, and plan its conversion.

    dtype: None is float32 where that fits the device's memory with room to run, else bfloat16. given: components to use
    instead of the source's. Raises ConvertError for a source that cannot be converted so, and LoadError for one that
    cannot be run.
    """
    files = open_files(source, access)
    snapshot = describe_source(files, access)
    if snapshot.pipeline is None:
        raise ConvertError(f"{snapshot.label} is a single component, which makes no pictures; give its pipeline.")
    plan = make_plan(snapshot, settings.resolve(snapshot))
    if not any(c.rules is not None and c.rules.runs_in_fp8 for c in plan.components):
        raise ConvertError(
            f"No component of {snapshot.label} runs in W8A8 by this plan, so there is nothing to measure."
        )
    root = fetch(snapshot, files).root
    chosen = _dtype_that_fits(snapshot, device) if dtype is None else choose_dtype(dtype, None)
    taker = pipeline_class(snapshot.pipeline)
    given = without_habits(given, accepted_arguments(taker), taker.__name__, ())
    with bars_of_libraries(quiet=access.quiet):
        pipe = assemble(root, given, chosen, access.variant).to(device)
    return Original(pipe, plan)


def _dtype_that_fits(snapshot: Snapshot, device: torch.device) -> torch.dtype:
    """float32 where the weights in it take at most `_ROOMY` of the memory that is free, as far as that is known."""
    needed = sum(4 * tensor.numel for component in snapshot.components for tensor in component.tensors)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = 0
    return torch.float32 if needed <= _ROOMY * free else torch.bfloat16
