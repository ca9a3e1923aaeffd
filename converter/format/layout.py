"""The on-disk contract of an FP8 snapshot: names, config keys, metadata, record. Both sides import only this.

An FP8 weight `NAME.weight` (float8_e4m3fn, source shape) comes with `NAME.weight_scale` (float32, [] per tensor,
[N, 1] per row) or `NAME.weight_scale_inv` (block, float32 [ceil(N/bn), ceil(K/bk)]), and `NAME.input_scale`
(float32 []) where activations are static. `w ~ float(q) * scale` under either name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WEIGHT = ".weight"
WEIGHT_SCALE = ".weight_scale"
WEIGHT_SCALE_INV = ".weight_scale_inv"
INPUT_SCALE = ".input_scale"
SCALE_SUFFIXES = (WEIGHT_SCALE, WEIGHT_SCALE_INV, INPUT_SCALE)

RECORD_FILE = "fp8_convert.json"
CARD = "README.md"
SOURCE_CARD = "README.source.md"  # where a push puts the source's card: README.md is then the snapshot's own
STAGING = ".fp8-convert"  # the folder in an output that is not finished
RECORD_FORMAT = 4
MAX_RECORD_BYTES = 64 * 1024 * 1024  # a larger one is none: it has some hundred bytes a file
METADATA_KEY = "fp8_convert"
CONFIG_KEY = "quantization_config"
QUANT_METHOD = "fp8"  # what other runtimes can read too
QUANT_METHOD_NATIVE = "fp8_convert"  # mixed modes, convolutions, scales of rows: stock readers refuse it by name

SOURCE_DTYPES = ("BF16", "F16", "F32")  # of weights that can become FP8

W8A8 = "w8a8"
STORAGE = "storage"
SCHEME_TENSOR = "tensor"
SCHEME_CHANNEL = "channel"

Block = tuple[int, int]


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is FP8: in which mode it is run, and what one scale covers.

    mode: "w8a8" or "storage". block: rows and columns of a scale's block. channel: whether each row (an output
    channel) has a scale. With neither, one scale covers the tensor; ValueError for both.
    """

    mode: str
    block: Block | None = None
    channel: bool = False

    def __post_init__(self) -> None:
        if self.channel and self.block is not None:
            raise ValueError("a scale covers a row or a block, not both")

    @property
    def per_tensor(self) -> bool:
        """Whether one scale covers the whole tensor."""
        return self.block is None and not self.channel

    @property
    def scheme(self) -> str:
        """`tensor`, `channel`, or for blocks of n rows and k columns `block{n}x{k}`."""
        if self.block is not None:
            return f"block{self.block[0]}x{self.block[1]}"
        return SCHEME_CHANNEL if self.channel else SCHEME_TENSOR

    def scale_key(self, module: str) -> str:
        """The tensor name of a module's weight scale."""
        return module + (WEIGHT_SCALE if self.block is None else WEIGHT_SCALE_INV)

    def scale_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """() per tensor; for a 2-D weight [N, 1] or [ceil(N/bn), ceil(K/bk)]. Raises ValueError for other weights."""
        if self.per_tensor:
            return ()
        rows, columns = weight_shape
        if self.block is None:
            return rows, 1
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    @classmethod
    def read(cls, entry: Any) -> WeightFormat:
        """From the [mode, scheme] of a shard's metadata. Raises ValueError for anything else."""
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in (W8A8, STORAGE):
            raise ValueError(f"the entry {entry!r}")
        mode, scheme = entry
        if scheme == SCHEME_TENSOR:
            return cls(mode)
        if scheme == SCHEME_CHANNEL:
            return cls(mode, channel=True)
        match = re.fullmatch(r"block([1-9]\d*)x([1-9]\d*)", str(scheme))
        if match is None:
            raise ValueError(f"the unknown scheme {scheme!r}")
        return cls(mode, (int(match[1]), int(match[2])))


def quantization_config(
    *, native: bool, activation_scheme: str, ignored_layers: Sequence[str], block: Block | None
) -> dict[str, Any]:
    """What a component's config.json gains under `quantization_config`: these keys and no others."""
    return {
        "quant_method": QUANT_METHOD_NATIVE if native else QUANT_METHOD,
        "activation_scheme": activation_scheme,
        "is_checkpoint_fp8_serialized": True,
        "ignored_layers": list(ignored_layers),
        "weight_block_size": None if block is None else list(block),
    }


def encode_modules(modules: Mapping[str, WeightFormat]) -> str:
    """A shard's `__metadata__["fp8_convert"]`: JSON of {module: [mode, scheme]}, sorted by name."""
    entries = {name: [modules[name].mode, modules[name].scheme] for name in sorted(modules)}
    return json.dumps(entries, separators=(",", ":"))


def decode_modules(metadata: Mapping[str, str]) -> dict[str, WeightFormat]:
    """The FP8 modules of a shard by name; empty for a shard without any. Raises ValueError."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        entries = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(entries, dict):
        raise ValueError("not a JSON object")
    modules = {}
    for name, entry in entries.items():
        try:
            modules[name] = WeightFormat.read(entry)
        except ValueError as error:
            raise ValueError(f"module {name!r} has {error}") from None
    return modules


def shard_name(stem: str, number: int, count: int) -> str:
    """`STEM.safetensors` for a single shard, `STEM-00001-of-00003.safetensors` for the first of three."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def encode_json(data: Any) -> bytes:
    """JSON as this project writes it: two-space indent, order as given, one newline at the end."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
