"""What the config of a LoRA says: its alpha, and whether it asks for more than two matrices and an alpha."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ..telling.errors import ConvertError
from .lora_file import LoraFile

# Keys of PEFT's LoraConfig that leave a model as two matrices and an alpha make it.
_HARMLESS = {
    "r", "rank_pattern", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
}  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the weights that were trained on


def check_config(file: LoraFile) -> None:
    """Refuse what a config asks for beside two matrices and an alpha."""
    for key, value in file.config.items():
        if problem := _problem(key.rpartition(".")[2], value):
            raise ConvertError(f"The LoRA {file.label} {problem}")


def _problem(name: str, value: Any) -> str | None:
    if name == "lora_alpha":
        return None if _is_number(value) else f"has the lora_alpha {value!r:.80}, which is no number."
    if name == "alpha_pattern":
        bad = _strange_patterns(value)
        return f"has the alpha_pattern {bad[0]!r:.80}; write out its names." if bad else None
    if name == "use_rslora":
        plain = value is None or isinstance(value, bool)
        return None if plain else f"has the use_rslora {value!r:.80}, which is neither true nor false."
    if name == "init_lora_weights":
        if any(value is start or (isinstance(start, str) and value == start) for start in _PLAIN_STARTS):
            return None
        return (
            f"was trained with init_lora_weights {value!r:.80}, which changes the weights that it is added to; save it "
            "as a plain LoRA (path_initial_model_for_weight_conversion in PEFT)."
        )
    if name == "peft_type" and value not in (None, "LORA"):
        return f"is an adapter of the type {value!r:.40}, and only LoRAs can be merged."
    if name == "bias" and value not in (None, "none"):
        return "was trained with biases, which cannot be merged."
    if name in _HARMLESS or name in ("peft_type", "bias") or not value:
        return None
    return f"was trained with {name}, which cannot be merged."


def _strange_patterns(patterns: Any) -> list[str]:
    """Patterns that are no names: they may be any regular expression, and numbers may be none."""
    if not isinstance(patterns, dict):
        return [] if patterns is None else [str(patterns)]
    return [key for key, value in patterns.items() if not re.fullmatch(r"\^?[\w.]+", key) or not _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def config_of(file: LoraFile, component: str) -> Mapping[str, Any]:
    """The adapter's config; diffusers puts the name of a component before each of its keys."""
    return {key.removeprefix(f"{component}."): value for key, value in file.config.items()}


def stated_alpha(config: Mapping[str, Any], module: str) -> float | None:
    """The alpha that the adapter's config states: for some modules, or for all."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        plain = pattern.removeprefix("^")
        if module == plain or (plain == pattern and module.endswith(f".{plain}")):
            return float(alpha)
    alpha = config.get("lora_alpha")
    return None if alpha is None else float(alpha)
