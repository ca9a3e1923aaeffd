"""What a model calls the tensors of its checkpoint, and which of them it keeps in float32.

Names differ where a library renames keys while it loads: transformers by rules of the class, diffusers for the
attention blocks of old VAEs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Naming:
    """Checkpoint keys by the model's own names.

    merged: keys that the class fuses with others into one tensor. renamings: transformers' rules, which know by now
    whether they were used.
    """

    names: Mapping[str, str]
    merged: frozenset[str] = frozenset()
    renamings: tuple[Any, ...] = ()


def name_tensors(model: Any, keys: Iterable[str]) -> Naming:
    """Name every key of a checkpoint as `model` does, in one pass; `keys` are whole keys, `.weight` included."""
    if hasattr(model, "_fix_state_dict_keys_on_load"):
        return _named_by_diffusers(model, keys)
    if hasattr(model, "base_model_prefix"):
        return _named_by_transformers(model, keys)
    return Naming({key: key for key in keys})


def stays_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether the tensor that the model calls `name` stays float32 where `from_pretrained` loads it in `dtype`.

    float16 keeps the most: some classes of transformers keep modules in float32 for it alone.
    """
    transformers = hasattr(model, "base_model_prefix")
    keep = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16 or not transformers:
        keep += list(getattr(model, "_keep_in_fp32_modules", None) or [])
    if transformers:
        return any(re.search(rf"((^|\.){part}($|\.))", name) for part in keep)
    return bool(set(keep) & set(name.split(".")))


def _named_by_diffusers(model: Any, keys: Iterable[str]) -> Naming:
    state = {key: key for key in keys}
    names = dict(state)
    model._fix_state_dict_keys_on_load(state)
    names.update((old, new) for new, old in state.items())
    return Naming(names)


def _named_by_transformers(model: Any, keys: Iterable[str]) -> Naming:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    names, merged = {}, set()
    for key in keys:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        names[key] = str(name)
        if converter is not None:
            merged.add(key)
    return Naming(names, frozenset(merged), tuple(renamings))
