"""Calibrated activation scales: a safetensors file of float32 scalars named `NAME.input_scale`."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from .errors import ConvertError
from .header import read_header
from .layout import INPUT_SCALE


def read_input_scales(path: Path) -> dict[str, float]:
    """Module name to scale, each finite and positive. Raises ConvertError."""
    header = read_header(path, str(path))
    for tensor in header.tensors:
        if not tensor.name.endswith(INPUT_SCALE) or tensor.dtype != "F32" or tensor.numel != 1:
            raise ConvertError(
                f"{tensor.name} in {path} is no float32 scalar named NAME{INPUT_SCALE}; correct the file."
            )
    try:
        values = {name.removesuffix(INPUT_SCALE): float(value) for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{path} cannot be read ({error}); write it again.") from error
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConvertError(f"{name}{INPUT_SCALE} in {path} is {value}, not a positive number; calibrate it again.")
    return values
