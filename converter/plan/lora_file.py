"""A LoRA's file as tensors by the names in it, with its digest. What is no plain LoRA is refused by name."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..format.header import PREFIX_BYTES, Header, TensorInfo, header_length, parse_header
from ..format.untrusted import check_size, open_regular, parse_json, read_whole
from ..telling.errors import ConvertError, ResumableError

_MAX_BYTES = 32 * 1024**3
_MAX_CONFIG_BYTES = 16 * 1024**2
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PEFT_PREFIX = "base_model.model."
PEFT_CONFIG = "adapter_config.json"
ALPHA = ".alpha"
_METADATA_KEY = "lora_adapter_metadata"  # where diffusers' save_lora_weights puts the adapter's config

# Names that a PEFT or kohya LoRA has: two matrices for each weight, and the alpha.
_PARTS = re.compile(
    r".+[._](lora_A|lora_B|lora_down|lora_up|lora\.(down|up)|lora_linear_layer\.(down|up)|lora\d\.(down|up))"
    r"(\.default)?\.weight|.+\.alpha"
)
_OTHERS = {
    r"dora_scale|lora_magnitude_vector": "DoRA, which scales each row of a weight by its norm",
    r"[._]lokr_": "LoKr, a Kronecker product",
    r"[._]hada_": "LoHa, a Hadamard product",
    r"[._]lora_mid": "LoCon with a third matrix",
    r"[._]b?oft_": "OFT",
    r"lora_embedding_": "the LoRA of an embedding",
    r"\.diff$": "the difference of a whole tensor",
    r"\.(diff_b|bias)$": "a bias",
    r"\.(set_weight|reshape_weight)$": "a weight that is replaced or reshaped",
}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's content. config: what PEFT or diffusers say of it, {} where nothing is said."""

    label: str
    sha256: str
    config_sha256: str | None
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]


def open_lora(path: Path) -> LoraFile:
    """Read a LoRA's file, and the adapter_config.json beside a PEFT adapter. Raises ConvertError."""
    data = _content(path)
    length = header_length(bytes(data[:PREFIX_BYTES]), len(data), str(path))
    header = parse_header(bytes(data[PREFIX_BYTES : PREFIX_BYTES + length]), len(data), str(path))
    _check_names(header, path)
    tensors = {t.name: _tensor(t, data, header.data_start, path) for t in header.tensors}
    config, config_sha256 = _config(header, path)
    return LoraFile(path.name, hashlib.sha256(data).hexdigest(), config_sha256, tensors, config)


def _content(path: Path) -> bytearray:
    """The file's bytes, which tensors can lie in."""
    fd = open_regular(path, str(path))
    try:
        with open(fd, "rb") as file:
            size = os.fstat(fd).st_size
            check_size(size, _MAX_BYTES, str(path))
            data = bytearray(size)
            if file.readinto(data) != size:
                raise ResumableError(f"{path} became shorter while it was read; check it and run again.")
    except OSError as error:
        raise ResumableError(f"{path} cannot be read ({error.strerror}); check the disk and run again.") from error
    return data


def _check_names(header: Header, path: Path) -> None:
    if not header.tensors:
        raise ConvertError(f"{path} holds no tensors; give the file of a LoRA.")
    for tensor in header.tensors:
        if other := next((what for mark, what in _OTHERS.items() if re.search(mark, tensor.name)), None):
            raise ConvertError(
                f"{tensor.name} in {path} is of {other}, and only plain LoRAs can be merged; merge it with the tool "
                "that made it, and convert the result."
            )
        if not _PARTS.fullmatch(tensor.name):
            raise ConvertError(
                f"{tensor.name} in {path} is no part of a LoRA (lora_A and lora_B, or lora_down and lora_up, and "
                "alpha); give the file of a LoRA."
            )


def _tensor(info: TensorInfo, data: bytearray, data_start: int, path: Path) -> torch.Tensor:
    if info.dtype not in _DTYPES or info.numel == 0:
        raise ConvertError(
            f"{info.name} in {path} is {info.dtype} {list(info.shape)}, and a LoRA's tensors are BF16, F16 or F32 and "
            "not empty; give the file as it was trained."
        )
    dtype, start = _DTYPES[info.dtype], data_start + info.start
    if start % info.itemsize:
        raw = torch.frombuffer(data[start : start + info.nbytes], dtype=dtype)
    else:
        raw = torch.frombuffer(data, dtype=dtype, count=info.numel, offset=start)
    if not bool(torch.isfinite(raw).all()):
        raise ConvertError(f"{info.name} in {path} holds NaN or Inf; give another file of this LoRA.")
    if info.name.endswith(ALPHA) and (info.numel != 1 or raw.item() < 0):
        raise ConvertError(f"{info.name} in {path} is no single number from 0 up; give another file of this LoRA.")
    return raw.view(info.shape)


def _config(header: Header, path: Path) -> tuple[dict[str, Any], str | None]:
    """The adapter's config and, where it lies in a file of its own, that file's digest."""
    beside = path.with_name(PEFT_CONFIG)
    if any(t.name.startswith(PEFT_PREFIX) for t in header.tensors) and beside.is_file():
        raw = read_whole(beside, str(beside), _MAX_CONFIG_BYTES)
        return _object(raw, str(beside)), hashlib.sha256(raw).hexdigest()
    if text := header.metadata.get(_METADATA_KEY):
        return _object(text.encode(), f"{_METADATA_KEY} in {path}"), None
    return {}, None


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise ConvertError(f"{where} {error}; give the file as it was trained.") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{where} is no JSON object; give the file as it was trained.")
    return dict(value)
