"""From a component's config to its module on the meta device, FP8 layers installed, and which tensor goes
where.

Parameters have no memory yet; buffers that no checkpoint holds (rotary tables) are computed as the class does
it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..converter.format import layout
from ..converter.snapshot.modules import bounded, quiet_libraries
from ..converter.snapshot.source import CONFIG, Component
from ..converter.telling.errors import ConvertError, LoadError
from .backend import Choice
from .checkpoint import one_line
from .install import install

_SCALES = (layout.WEIGHT_SCALE, layout.WEIGHT_SCALE_INV, layout.INPUT_SCALE)


def build(component: Component, dtype: torch.dtype) -> nn.Module:
    """The component's class, built from its config as `from_pretrained` would, parameters on the meta device.

    Raises LoadError where the installed libraries have no such class, or it cannot be built from the config.
    """
    from accelerate import init_empty_weights

    library = __import__(component.library) if component.library in ("diffusers", "transformers") else None
    cls = getattr(library, component.class_name or "", None)
    if cls is None:
        raise LoadError(
            f"{component.label} is a {component.library}.{component.class_name}, which is not installed; "
            "upgrade diffusers and transformers."
        )
    settings = {k: v for k, v in component.config.items() if k != layout.CONFIG_KEY}
    try:
        with default_dtype(dtype), init_empty_weights(include_buffers=False), quiet_libraries(), bounded(component):
            if component.library == "diffusers":
                built = cls.from_config(settings)
            else:
                built = cls._from_config(cls.config_class.from_dict(settings), dtype=dtype)
    except ConvertError:  # a sentence already: the config asks for more than its weights can be for
        raise
    except Exception as error:  # whatever a class raises for a config that is not its own
        raise LoadError(
            f"{component.class_name} cannot be built from {component.path(CONFIG)} ({one_line(error)}); convert or "
            "download the snapshot again."
        ) from error
    if not isinstance(built, nn.Module):
        raise LoadError(f"{component.label} is a {component.class_name}, which is no model; correct its class.")
    return built.eval()


def tensor_names(model: Any, keys: Iterable[str], fp8: Iterable[str]) -> dict[str, str]:
    """Checkpoint tensor names to the model's own; `fp8` are checkpoint module names, whose scales follow the
    weight.
    """
    rename, transforms = _renamer(model)
    weights = {module: rename(module + layout.WEIGHT).removesuffix(layout.WEIGHT) for module in fp8}
    names = {}
    for key in keys:
        module, suffix = _split_scale(key)
        names[key] = weights[module] + suffix if module in weights else rename(key)
    if transforms:  # save_pretrained reverts those that were used
        model._weight_conversions = [t for t in transforms if t.was_used()]
    return names


def install_all(
    model: nn.Module,
    modules: Mapping[str, layout.WeightFormat],
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    activation_scheme: str,
    backend: Choice,
    label: str,
) -> None:
    """Turns each of `modules` (by checkpoint name) into its FP8 form, still without
    memory.
    """
    parts = dict(model.named_modules())
    for name, how in modules.items():
        own = names[name + layout.WEIGHT].removesuffix(layout.WEIGHT)
        if own not in parts:
            raise LoadError(f"{label} has the FP8 weight {name}, but {type(model).__name__} has no module {own}.")
        try:
            install(
                parts[own],
                how,
                dtype=dtype,
                activation_scheme=activation_scheme,
                backend=backend,
                name=own,
            )
        except (TypeError, ValueError) as error:
            raise LoadError(f"{label} cannot be loaded: {error}.") from error


def target_dtype(model: nn.Module, name: str, source: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an unquantised tensor in the loaded model: what `from_pretrained(dtype=...)` makes of
    it.
    """
    if not source.is_floating_point:
        return source
    keep = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    transformers = hasattr(model, "base_model_prefix")
    if dtype == torch.float16 or not transformers:
        keep += list(getattr(model, "_keep_in_fp32_modules", None) or [])
    if transformers:
        kept = any(re.search(rf"((^|\.){part}($|\.))", name) for part in keep)
    else:
        kept = bool(set(keep) & set(name.split(".")))
    return torch.float32 if kept else dtype


def _split_scale(key: str) -> tuple[str, str]:
    for suffix in (*_SCALES, layout.WEIGHT):
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix
    return key, ""


def _renamer(model: Any) -> tuple[Callable[[str], str], list[Any]]:
    """The function that turns a checkpoint key into the model's own, and the transforms of transformers it uses."""
    if hasattr(model, "_fix_state_dict_keys_on_load"):  # diffusers: names of old VAEs

        def rename(key: str) -> str:
            keys = {key: None}
            model._fix_state_dict_keys_on_load(keys)
            return next(iter(keys))

        return rename, []
    if not hasattr(model, "base_model_prefix"):
        return lambda key: key, []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()

    def rename_for_transformers(key: str) -> str:
        renamed, merged = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if merged is not None:
            raise LoadError(f"{type(model).__name__} merges {key} with other weights, which FP8 loading cannot do.")
        return str(renamed)

    return rename_for_transformers, renamings


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """PyTorch's default dtype for a while; it is what it was afterwards, whatever happens within."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
