"""`quantization_config`: its keys, and what each of them may hold.

One check for what config.json says, for `Fp8Config` and for the settings of `load_pipeline`: whoever wrote a value
that means nothing reads which key it is.
"""

import os
from collections.abc import Collection, Mapping
from typing import Any

from ..converter.format import layout

METHODS = (layout.QUANT_METHOD, layout.QUANT_METHOD_NATIVE)
CONFIG_KEYS = (
    "quant_method", "activation_scheme", "is_checkpoint_fp8_serialized", "ignored_layers", "weight_block_size",
)  # fmt: skip


def config_problem(config: Mapping[str, Any], known: Collection[str] = CONFIG_KEYS) -> str | None:
    """The first key that is unknown or whose value means nothing, as a clause; None if all is well."""
    for key, value in config.items():
        if key not in known:
            return f"it has the unknown key {key!r:.80}, and it knows {', '.join(known)}"
        if not _fits(key, value):
            return f"{key} is {value!r:.80}; {_WANTED[key]}"
    return None


_WANTED = {
    "method": "the only one is 'fp8'",
    "quant_method": f"use {' or '.join(map(repr, METHODS))}",
    "activation_scheme": "use 'dynamic' or 'static'",
    "is_checkpoint_fp8_serialized": "use true or false",
    "ignored_layers": "use a list of names, such as ['img_mlp']",
    "weight_block_size": "use two positive numbers, such as [128, 128], or none",
    "input_scales": "use the path of a safetensors file",
}


def _fits(key: str, value: Any) -> bool:
    match key:
        case "method":
            return bool(value == "fp8")
        case "quant_method":
            return value in METHODS
        case "activation_scheme":
            return value in ("dynamic", "static")
        case "is_checkpoint_fp8_serialized":
            return isinstance(value, bool)
        case "ignored_layers":
            return value is None or (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value))
        case "weight_block_size":
            return value is None or (
                isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int and v > 0 for v in value)
            )
        case _:
            return value is None or isinstance(value, (str, os.PathLike))
