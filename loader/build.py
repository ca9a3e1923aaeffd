"""From a component's config to its module on the meta device, FP8 layers installed, and which tensor goes where.

Parameters have no memory yet; buffers that no checkpoint holds (rotary tables) are computed as the class does it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..converter.format import layout
from ..converter.snapshot.building import NoModelError, bounded, build_on_meta
from ..converter.snapshot.naming import name_tensors, stays_float32
from ..converter.snapshot.snapshot import CONFIG, Component
from ..converter.telling.errors import ConvertError, LoadError, one_clause
from .backend import Backend
from .checkpoint import Fp8Modules
from .install import install
from .shared_input import share_inputs


def build(component: Component, dtype: torch.dtype) -> nn.Module:
    """Build the component's class from its config as `from_pretrained` would, parameters on the meta device.

    Raises LoadError where the installed libraries have no such model, or it cannot be built from the config.
    """
    library, class_name = component.library, component.class_name
    try:
        with bounded(component):
            return build_on_meta(library, class_name, component.config, dtype=dtype, buffers=True).eval()
    except ConvertError:  # a sentence already: the config asks for more than its weights can be for
        raise
    except NoModelError as error:
        raise LoadError(
            f"{component.label} is a {library}.{class_name}, and {error}; upgrade diffusers and transformers, or "
            "correct its class."
        ) from error
    except Exception as error:  # whatever a class raises for a config that is not its own
        raise LoadError(
            f"{class_name} cannot be built from {component.path(CONFIG)} ({one_clause(error)}); convert or download "
            "the snapshot again."
        ) from error


def tensor_names(model: Any, keys: Iterable[str], fp8: Iterable[str]) -> dict[str, str]:
    """Name checkpoint tensors as the model does; `fp8` are checkpoint modules, whose scales follow their weight.

    Raises LoadError for a weight that the class merges with others.
    """
    keys, fp8 = list(keys), dict.fromkeys(fp8)
    scales = {key: module for key in keys if (module := _module_of_scale(key)) in fp8}
    plain = dict.fromkeys([*(module + layout.WEIGHT for module in fp8), *(key for key in keys if key not in scales)])
    naming = name_tensors(model, plain)
    if naming.merged:
        merged = next(key for key in plain if key in naming.merged)
        raise LoadError(f"{type(model).__name__} merges {merged} with other weights, which FP8 loading cannot do.")
    if naming.renamings:  # save_pretrained reverts those that were used
        model._weight_conversions = [renaming for renaming in naming.renamings if renaming.was_used()]
    names = {}
    for key in keys:
        if key in scales:
            module = scales[key]
            own = naming.names[module + layout.WEIGHT].removesuffix(layout.WEIGHT)
            names[key] = own + key.removeprefix(module)
        else:
            names[key] = naming.names[key]
    return names


def install_all(
    model: nn.Module,
    fp8: Fp8Modules,
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    backend: Backend = "auto",
    label: str,
) -> None:
    """Turn each of the modules into its FP8 form, still without memory; `names` are those of their weights.

    Raises LoadError for a module that the model has not, or that cannot be FP8.
    """
    parts = dict(model.named_modules())
    for name, how in fp8.modules.items():
        own = names[name + layout.WEIGHT].removesuffix(layout.WEIGHT)
        if own not in parts:
            raise LoadError(f"{label} has the FP8 weight {name}, but {type(model).__name__} has no module {own}.")
        scheme = fp8.activation_scheme
        try:
            install(parts[own], how, dtype=dtype, activation_scheme=scheme, backend=backend, name=own)
        except (TypeError, ValueError) as error:
            raise LoadError(f"{label} cannot be loaded: {error}.") from error
    share_inputs(model)


def target_dtype(model: nn.Module, name: str, source: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an unquantised tensor in the loaded model: what `from_pretrained(dtype=...)` makes of it."""
    if not source.is_floating_point:
        return source
    return torch.float32 if stays_float32(model, name, dtype) else dtype


def _module_of_scale(key: str) -> str | None:
    """The module whose scale the key is, None for any other tensor."""
    return next((key.removesuffix(suffix) for suffix in layout.SCALE_SUFFIXES if key.endswith(suffix)), None)
