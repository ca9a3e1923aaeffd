"""What each weight belongs to: a component's configured class, built on the meta device, names its modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ..format.layout import WEIGHT
from ..telling.errors import one_clause
from .building import bounded, build_on_meta
from .fitting import misfit
from .naming import name_tensors, stays_float32
from .snapshot import Component

# Sought in a module's class hierarchy, so that subclasses (a VAE's causal convolutions) count as their base.
_KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "ConvTranspose3d", "Embedding")


@dataclass(frozen=True)
class ModuleMap:
    """Modules by checkpoint name (a tensor's key without `.weight`).

    `kinds` gives the torch class that counts (`Linear`, `Conv3d`, `Embedding`, …) or the module's own class name;
    `keep_fp32` the modules that the class keeps in float32; `tied` the linears, by the model's own names, whose weight
    another module's and stands in the checkpoint under its name alone; `problem` why there are none, if the class
    cannot be built; `misfit` how the tensors differ from the class's own, where that was asked.
    """

    kinds: Mapping[str, str]
    keep_fp32: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    problem: str | None = None
    misfit: str | None = None


def module_map(component: Component, others: Collection[str] | None = None) -> ModuleMap:
    """Build the component's class on the meta device and map its checkpoint names to module kinds.

    others: the tensors that the class need not have, such as scales; where given, all others are held against it.
    """
    keys = [t.name for t in component.tensors if t.name.endswith(WEIGHT)]
    try:
        with bounded(component):
            model = build_on_meta(component.library, component.class_name, component.config)
        names = _names(component, model, keys)
        differs = None
        if others is not None:
            differs = misfit(model, component.class_name, (t for t in component.tensors if t.name not in others))
    except Exception as error:  # any class may fail on any config: its weights are then kept, and reported
        return ModuleMap({}, problem=f"{component.class_name or 'its class'} cannot be built ({one_clause(error)})")
    modules = dict(model.named_modules())
    kinds, keep_fp32 = {}, set()
    for key in keys:
        module = modules.get(names[key].removesuffix(WEIGHT))
        if module is not None:
            kinds[key.removesuffix(WEIGHT)] = _kind(module)
            if stays_float32(model, names[key], torch.float16):  # whatever it is loaded in: files serve every dtype
                keep_fp32.add(key.removesuffix(WEIGHT))
    return ModuleMap(kinds, frozenset(keep_fp32), _tied_linears(modules, set(names.values())), misfit=differs)


def _tied_linears(modules: Mapping[str, torch.nn.Module], stored: set[str]) -> frozenset[str]:
    """Linears, such as a head, that are not among the `stored` weights and share the parameter of one that is."""
    weights = {name: getattr(module, "weight", None) for name, module in modules.items()}
    shared = {id(weight) for name, weight in weights.items() if name + WEIGHT in stored}
    return frozenset(
        name
        for name, weight in weights.items()
        if name + WEIGHT not in stored and id(weight) in shared and _kind(modules[name]) == "Linear"
    )


def _names(component: Component, model: torch.nn.Module, keys: list[str]) -> Mapping[str, str]:
    if component.library == "diffusers":
        return {key: key for key in keys}  # attention of old VAEs has names that no module has: it is kept as it is
    return name_tensors(model, keys).names


def _kind(module: torch.nn.Module) -> str:
    bases = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
    return next((kind for kind in _KINDS if kind in bases), type(module).__name__)
