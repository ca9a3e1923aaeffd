"""What each weight belongs to: a component's configured class, built on the meta device, names its modules.

No weights are read and no remote code runs: only classes of the installed diffusers and transformers count.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .layout import WEIGHT
from .source import Component

# Sought in a module's class hierarchy, so that subclasses (a VAE's causal convolutions) count as their base.
_KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "ConvTranspose3d", "Embedding")


@dataclass(frozen=True)
class ModuleMap:
    """Modules by checkpoint name (a tensor's key without `.weight`).

    `kinds` gives the torch class that counts (`Linear`, `Conv3d`, `Embedding`, …) or the module's own class name;
    `keep_fp32` the modules that the class keeps in float32; `problem` why there are none, if the class cannot be
    built.
    """

    kinds: Mapping[str, str]
    keep_fp32: frozenset[str] = frozenset()
    problem: str | None = None


def module_map(component: Component) -> ModuleMap:
    """Build the component's class on the meta device and map its checkpoint names to module kinds."""
    keys = [t.name.removesuffix(WEIGHT) for t in component.tensors if t.name.endswith(WEIGHT)]
    try:
        model = build_on_meta(component.library, component.class_name, component.config)
        names = checkpoint_to_module_names(model, keys)
    except Exception as error:  # any class may fail on any config: its weights are then kept, and reported
        return ModuleMap({}, problem=f"{component.class_name or 'its class'} cannot be built ({_one_line(error)})")
    modules = dict(model.named_modules())
    keep = {
        k
        for attr in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for k in getattr(model, attr, None) or ()
    }
    kinds = {key: _kind(modules[names[key]]) for key in keys if names[key] in modules}
    keep_fp32 = frozenset(key for key in kinds if keep & set(names[key].split(".")))
    return ModuleMap(kinds, keep_fp32)


def build_on_meta(library: str, class_name: str | None, config: Mapping[str, Any]) -> torch.nn.Module:
    """The module that `class_name` of diffusers or transformers builds from `config`, on the meta device.

    Raises whatever the class raises, LookupError for a class that neither library has.
    """
    if library not in ("diffusers", "transformers") or class_name is None:
        raise LookupError(f"no class of diffusers or transformers, library {library!r}")
    module = __import__(library)
    cls = getattr(module, class_name, None)
    if cls is None:
        raise LookupError(f"{library} {module.__version__} has no class {class_name}")
    settings = {k: v for k, v in config.items() if k != "quantization_config"}
    with torch.device("meta"), quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a class deprecates inside itself is not for a converter's user
        if library == "diffusers":
            built = cls.from_config(settings)
        else:
            built = cls(cls.config_class.from_dict(settings))
    assert isinstance(built, torch.nn.Module)
    return built


def checkpoint_to_module_names(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint names to module names. They differ only where transformers renames keys while it loads."""
    if not hasattr(model, "base_model_prefix"):
        return {name: name for name in names}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    renamed = {}
    for name in names:
        key, _ = rename_source_key(name + WEIGHT, renamings, converters, model.base_model_prefix, state)
        renamed[name] = str(key).removesuffix(WEIGHT)
    return renamed


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence diffusers' and transformers' loggers: their advice on configs is not for a converter's user."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in loggers]
    for library in loggers:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(loggers, levels, strict=True):
            library.set_verbosity(level)


def _kind(module: torch.nn.Module) -> str:
    bases = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
    return next((kind for kind in _KINDS if kind in bases), type(module).__name__)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
