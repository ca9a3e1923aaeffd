"""What other tools state of their FP8: ComfyUI's names, and the rest's `quantization_config`.

Of such a config: is it one of codes under scales, and what does it say of blocks?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..format.layout import QUANT_METHOD, QUANT_METHOD_NATIVE, Block
from ..telling.errors import ConvertError

COMFY_METADATA = "_quantization_metadata"  # of a file's header: JSON of {"layers": {layer: {"format": ...}}}
COMFY_FORMAT, COMFY_FULL_PRECISION = "float8_e4m3fn", "full_precision_matrix_mult"
METHODS = {
    QUANT_METHOD: "fp8", QUANT_METHOD_NATIVE: "fp8-convert", "modelopt": "ModelOpt",
    "compressed-tensors": "compressed-tensors",
}  # fmt: skip
_FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors


def config_problem(config: Any) -> str | None:
    """Why a quantization_config is of no layout that is read, as a clause."""
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in METHODS:
        return f"has the quant_method {method!r:.80}"
    algorithm = config.get("quant_algo", config.get("quant_type", "FP8"))
    if method == "modelopt" and algorithm != "FP8":
        return f"was quantised by ModelOpt to {algorithm!r:.80}"
    return _compressed_problem(config) if method == "compressed-tensors" else None


def _compressed_problem(config: Mapping[str, Any]) -> str | None:
    if config.get("format") not in _FORMATS:
        return f"has the compressed-tensors format {config.get('format')!r:.80}"
    if config.get("transform_config"):
        return "has a transform_config: its weights are rotated"
    first: Any = None
    for name, weights in _group_weights(config):
        if weights.get("type") != "float" or weights.get("num_bits") != 8 or weights.get("symmetric") is False:
            return f"has {name!r:.80} in config_groups, whose weights are not symmetric float with 8 bits"
        first = first or weights
        if weights != first:
            return f"has {name!r:.80} in config_groups, whose weights are quantised otherwise than those of the first"
    return None


def block_of(config: Any, label: str) -> Block | None:
    """Rows and columns of a scale's block, as the config states them in one place or the other."""
    stated = []
    if config is not None:
        stated = [config.get("weight_block_size"), *(w.get("block_structure") for _, w in _group_weights(config))]
    for value in stated:
        if value is None:
            continue
        if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
            return value[0], value[1]
        raise ConvertError(f"config.json of {label} states the block {value!r:.80}, which is none.")
    return None


def _group_weights(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What compressed-tensors' groups say of weights, by the groups' names."""
    groups = config.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield name, weights
