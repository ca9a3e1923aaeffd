"""A component's class, built from its config without memory for its weights.

No weights are read and no remote code runs: only classes of the installed diffusers and transformers count. Converter
and loader build alike, so that both see the same modules.
"""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..format.layout import CONFIG_KEY
from ..telling.errors import ConvertError
from .snapshot import CONFIG, Component

# Keys of configs that say how often something is repeated; a class may loop over them without building a module.
_COUNTS = re.compile(r"(\w*_)?(layers|blocks|depths?|stages|levels|experts|n_layer)(_\w*)?")
_LEAST_COUNT = 1_000
_PARTS_PER_TENSOR = 20  # modules, parameters and buffers; classes of today register two to three
_SPARE_PARTS = 10_000


class NoModelError(LookupError):
    """Neither library has a model of the name; the text is a clause that says so."""


def build_on_meta(
    library: str,
    class_name: str | None,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    buffers: bool = False,
) -> nn.Module:
    """Build `class_name` of diffusers or transformers from `config`, its parameters on the meta device.

    dtype: of the parameters. buffers: compute them (rotary tables), as `from_pretrained` does; else they are on the
    meta device too. Raises NoModelError, and whatever the class raises for a config that is not its own.
    """
    cls = _model_class(library, class_name)
    settings = {k: v for k, v in config.items() if k != CONFIG_KEY}
    with _without_memory(buffers), default_dtype(dtype), quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a class deprecates inside itself is not for a user of ours
        if library == "diffusers":
            from diffusers.models.modeling_utils import no_init_weights

            with no_init_weights():  # as its from_pretrained does: every weight is to come from a file
                built = cls.from_config(settings)
        else:
            built = cls._from_config(cls.config_class.from_dict(settings), dtype=dtype)
    assert isinstance(built, nn.Module)
    return built


def _model_class(library: str, class_name: str | None) -> Any:
    if library not in ("diffusers", "transformers") or class_name is None:
        raise NoModelError(f"no class of diffusers or transformers, library {library!r}")
    with _uncollected():
        module = __import__(library)
        cls = getattr(module, class_name, None)
    if cls is None:
        raise NoModelError(f"{library} {module.__version__} has no class {class_name}")
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise NoModelError(f"{class_name} of {library} {module.__version__} is no model")
    return cls


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause garbage collection: the libraries make a million objects on import, and walking them takes a second."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _without_memory(buffers: bool) -> contextlib.AbstractContextManager[Any]:
    if not buffers:
        return torch.device("meta")
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)  # type: ignore[no-any-return]


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


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set PyTorch's default dtype for a while; it is what it was afterwards, whatever happens within."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
