"""Calibrated activation scales: a safetensors file of float32 scalars named `NAME.input_scale`."""

from __future__ import annotations

import math
import struct
from pathlib import Path

from ..format.header import PREFIX_BYTES, header_length, parse_header
from ..format.layout import INPUT_SCALE
from ..format.untrusted import check_text, read_whole
from ..telling.errors import ConvertError

_MAX_BYTES = 64 * 1024 * 1024  # some hundred thousand scales with their names


def read_input_scales(path: Path) -> dict[str, float]:
    """Module name to scale, each finite and positive. Raises ConvertError."""
    check_text(path, "The path of the input scales")
    content = read_whole(path, str(path), _MAX_BYTES)
    length = header_length(content[:PREFIX_BYTES], len(content), str(path))
    header = parse_header(content[PREFIX_BYTES : PREFIX_BYTES + length], len(content), str(path))
    values = {}
    for tensor in header.tensors:
        if not tensor.name.endswith(INPUT_SCALE) or tensor.dtype != "F32" or tensor.numel != 1:
            raise ConvertError(
                f"{tensor.name} in {path} is not a float32 scalar named NAME{INPUT_SCALE}; correct the file."
            )
        (value,) = struct.unpack_from("<f", content, header.data_start + tensor.start)
        if not (math.isfinite(value) and value > 0):
            raise ConvertError(f"{tensor.name} in {path} is {value}, not a positive number; calibrate it again.")
        values[tensor.name.removesuffix(INPUT_SCALE)] = value
    return values
