"""What each weight belongs to: a component's configured class, built on the meta device, names its modules.

No weights are read and no remote code runs: only classes of the installed diffusers and transformers count.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..format.layout import WEIGHT
from ..telling.errors import ConvertError
from .source import CONFIG, Component

# Sought in a module's class hierarchy, so that subclasses (a VAE's causal convolutions) count as their base.
_KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "ConvTranspose3d", "Embedding")

# Keys of configs that say how often something is repeated; a class may loop over them without building a module.
_COUNTS = re.compile(r"(\w*_)?(layers|blocks|depths?|stages|levels|experts|n_layer)(_\w*)?")
_LEAST_COUNT = 1_000
_PARTS_PER_TENSOR = 20  # modules, parameters and buffers; classes of today register two to three
_SPARE_PARTS = 10_000


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
        with bounded(component):
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


@contextlib.contextmanager
def bounded(component: Component) -> Iterator[None]:
    """While the component's class is built in it, more modules than its checkpoint can have weights for are an error.

    A config is untrusted: it may ask for a hundred million layers. Raises ConvertError, also before the build for
    such a number of layers. What a class computes of other numbers (a table as long as the vocabulary, say) is not
    bounded.
    """
    tensors = sum(1 for _ in component.tensors)
    label = f"{component.path(CONFIG)} asks"
    advice = f"than the checkpoint's {tensors} tensors can be for; download both again"
    if (excess := _excessive_count(component.config, max(_LEAST_COUNT, tensors))) is not None:
        raise ConvertError(f"{label} for more layers ({excess}) {advice}.")
    left = _SPARE_PARTS + _PARTS_PER_TENSOR * tensors
    thread = threading.get_ident()

    def count(*_: object) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise ConvertError(f"{label} for more modules {advice}.")

    with contextlib.ExitStack() as hooks:
        for register in (
            register_module_module_registration_hook,
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
        ):
            hooks.callback(register(count).remove)
        yield


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


def _excessive_count(config: Any, limit: int) -> str | None:
    """The first number in a config that counts layers and is larger than `limit`, as "num_layers 100000000"."""
    parts: list[tuple[str, Any]] = [("", config)]
    while parts:
        key, value = parts.pop()
        counts = _COUNTS.fullmatch(key) is not None
        if isinstance(value, dict):
            parts += value.items()
        elif isinstance(value, list):
            if counts and len(value) > limit:
                return f"{key:.80} has {len(value)} entries"
            parts += ((key, item) for item in value)
        elif counts and isinstance(value, int | float) and value > limit:
            return f"{key:.80} is {value!s:.40}"
    return None


def _kind(module: torch.nn.Module) -> str:
    bases = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("torch.")}
    return next((kind for kind in _KINDS if kind in bases), type(module).__name__)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
