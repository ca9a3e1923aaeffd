"""Are a checkpoint's tensors those of its class? The loader finds it out only while it reads, or only warns."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from ..format.header import TensorInfo
from .naming import name_tensors

# What a quantisation leaves beside its weights; no class of transformers has a head of such a name.
_OF_QUANTISATION = re.compile(r"scale|amax|smooth|svdquant|lora|quant")


def misfit(model: torch.nn.Module, class_name: str | None, tensors: Iterable[TensorInfo]) -> str | None:
    """What the class does not have, lacks or has in another shape, as a clause; None if the tensors are its own.

    model: built on the meta device. Heads that a class of transformers does without, and buffers, may be there.
    """
    tensors = list(tensors)
    naming = name_tensors(model, (t.name for t in tensors))
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    buffers, modules = dict(model.named_buffers()), dict(model.named_modules())
    for tensor in tensors:
        own = naming.names[tensor.name]
        if own not in shapes and own not in buffers:
            if _belongs(model, own, own.partition(".")[0] in modules):
                return f"{tensor.name} is no tensor of {class_name}"
        elif tensor.name not in naming.merged and own in shapes and tensor.shape != shapes[own]:
            return f"{tensor.name} has the shape {list(tensor.shape)}, and {class_name} wants {list(shapes[own])}"
    absent = _absent(model, {naming.names[t.name] for t in tensors})
    return f"{absent} of {class_name} is missing" if absent else None


def _belongs(model: torch.nn.Module, name: str, beside_others: bool) -> bool:
    """Whether a tensor that the class does not have is more than a head or a tower that it does without."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    if any(re.search(pattern, name) for pattern in ignored):
        return False
    transformers = hasattr(model, "base_model_prefix")
    return not transformers or beside_others or _OF_QUANTISATION.search(name) is not None


def _absent(model: torch.nn.Module, given: set[str]) -> str | None:
    """A parameter that is not given, under none of its names where it is tied to others."""
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return next((same[0] for same in names.values() if not given & {*same}), None)
