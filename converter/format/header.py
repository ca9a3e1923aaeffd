"""Safetensors headers: parsed strictly, written with aligned offsets.

A file is an 8-byte little-endian length N, N bytes of JSON, then the data section. The JSON maps a tensor's
name to dtype, shape and [start, end) offsets into the data section; `__metadata__` maps strings to strings.
Headers are untrusted input: sizes, overlaps, holes, duplicates and nesting are checked before anything is read
through them. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..telling.errors import ConvertError, ResumableError
from ..telling.notebook import Brief
from .untrusted import open_regular, parse_json

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
PREFIX_BYTES = 8
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class TensorInfo(Brief):
    """One tensor of a safetensors file; `start` and `end` are byte offsets into the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element; sub-byte dtypes count as 1."""
        return max(1, DTYPE_BITS[self.dtype] // 8)


@dataclass(frozen=True, repr=False)
class Header(Brief):
    """A parsed header. `tensors` are in data order; `raw` is the JSON text exactly as stored."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    raw: bytes

    @property
    def data_start(self) -> int:
        return PREFIX_BYTES + len(self.raw)

    @property
    def file_size(self) -> int:
        return self.data_start + (self.tensors[-1].end if self.tensors else 0)


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """The JSON's length in bytes, from the first 8 bytes of a file of `file_size` bytes."""
    if len(prefix) < PREFIX_BYTES or file_size < PREFIX_BYTES:
        raise ConvertError(f"{where} is too short to be a safetensors file; download it again.")
    (length,) = struct.unpack("<Q", prefix[:PREFIX_BYTES])
    if length > MAX_HEADER_BYTES or length > file_size - PREFIX_BYTES:
        raise ConvertError(
            f"{where} has a corrupt safetensors header (its length is given as {length} bytes in a file of "
            f"{file_size}); download it again."
        )
    return int(length)


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Parse and check the JSON `raw` of a file of `file_size` bytes; `where` names the file in errors."""
    entries = _load_json(raw, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _corrupt(where, "__metadata__ is not a map of strings")
    tensors = sorted((_tensor(n, e, where) for n, e in entries.items()), key=lambda t: (t.start, t.end))
    position = 0
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise _corrupt(where, f"tensor {tensor.name!r:.200} {kind}")
        position = tensor.end
    header = Header(tuple(tensors), metadata, raw)
    if header.file_size != file_size:
        state = "truncated" if file_size < header.file_size else "followed by stray bytes"
        raise ConvertError(
            f"{where} is {state}: its header describes {header.file_size} bytes and the file has "
            f"{file_size}; download it again."
        )
    return header


def read_header(path: Path, where: str) -> Header:
    """Read and check the header of a local file. Raises ConvertError."""
    try:
        with open(open_regular(path, where), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = header_length(file.read(PREFIX_BYTES), size, where)
            raw = file.read(length)
    except OSError as error:
        raise ResumableError(f"{where} cannot be read ({error.strerror}); check the disk and run again.") from error
    return parse_header(raw, size, where)


def encode_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The length prefix and JSON of a file that holds `tensors`, padded so that its data start at 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for t in tensors:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _load_json(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise _corrupt(where, f"{twice!r:.200} is in it twice")
        return entries

    try:
        entries = parse_json(raw, unique)
    except ValueError as error:
        raise _corrupt(where, f"it {error}") from error
    if not isinstance(entries, dict):
        raise _corrupt(where, "it is not a JSON object")
    return entries


def _tensor(name: str, entry: Any, where: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(where, f"tensor {name!r:.200} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS if isinstance(dtype, str) else True:
        raise _corrupt(where, f"tensor {name!r:.200} has the unknown dtype {dtype!r:.80}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 64:
        raise _corrupt(where, f"tensor {name!r:.200} has an invalid shape or invalid offsets")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise _corrupt(where, f"tensor {name!r:.200} has offsets that do not fit its shape and dtype")
    return TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _corrupt(where: str, what: str) -> ConvertError:
    return ConvertError(f"{where} has a corrupt safetensors header: {what}; download it again.")
