"""`quantization_config` of a component's config.json: its keys, and what each of them may hold."""

from collections.abc import Mapping
from typing import Any

from ..converter.format import layout
from ..converter.plan.settings import setting_problem

METHODS = (layout.QUANT_METHOD, layout.QUANT_METHOD_NATIVE)
CONFIG_KEYS = (
    "quant_method", "activation_scheme", "is_checkpoint_fp8_serialized", "ignored_layers", "weight_block_size",
)  # fmt: skip


def config_problem(config: Mapping[str, Any]) -> str | None:
    """The first key that is unknown or whose value means nothing, as a clause; None if all is well."""
    for key, value in config.items():
        if key not in CONFIG_KEYS:
            return f"it has the unknown key {key!r:.80}, and it knows {', '.join(CONFIG_KEYS)}"
        if key == "quant_method":
            problem = None if value in METHODS else f"use {' or '.join(map(repr, METHODS))}"
        elif key == "is_checkpoint_fp8_serialized":
            problem = None if isinstance(value, bool) else "use true or false"
        elif problem := setting_problem(key, value):
            return problem
        if problem:
            return f"{key} is {value!r:.80}; {problem}"
    return None
