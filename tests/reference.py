"""The conversion's formulas once more, in plain numpy: what the converter's output is compared with.

Nothing of the package and no float8 of torch: E4M3 values are decoded from their 256 codes by the definition of the
format (sign, 4 bits of exponent with bias 7, 3 bits of mantissa, no infinities, NaN at 0x7f), and a number is encoded
by looking for the nearest of them.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]
Block = tuple[int, int] | Literal["channel"] | None  # what a scale covers; None for the whole tensor
Tensor = tuple[str, tuple[int, ...], bytes]  # dtype as safetensors spells it, shape, little-endian bytes

MAX = np.float32(448)


def decode(code: int) -> float:
    """The value of an E4M3 code."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if code & 0x80 else magnitude


_MAGNITUDES = np.array([decode(code) for code in range(127)])  # ascending; float64, so that differences are exact


def encode(values: Floats) -> Codes:
    """The nearest code of every value, ties to the even code; values beyond +-448 become +-448."""
    wanted = np.minimum(np.abs(values.astype(np.float64)), 448)
    above = np.searchsorted(_MAGNITUDES, wanted)  # the first code that is not smaller
    below = np.maximum(above - 1, 0)
    up, down = _MAGNITUDES[above] - wanted, wanted - _MAGNITUDES[below]
    nearest = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (nearest | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def floats(dtype: str, data: bytes) -> Floats:
    """The elements of a BF16, F16 or F32 tensor, widened without rounding."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)


def tensor_scale(amax: np.float32) -> np.float32:
    return np.float32(1) if amax == 0 else max(np.float32(amax / MAX), np.float32(2.0**-126))


def quantize(values: Floats, scale: np.float32) -> Codes:
    with np.errstate(over="ignore"):  # infinity is clamped too
        return encode(np.clip(values * (np.float32(1) / scale), -MAX, MAX))


def quantize_blocks(values: Floats, block: tuple[int, int]) -> tuple[Codes, Floats]:
    """Codes [N, K] and scales [ceil(N / bn), ceil(K / bk)] of a matrix, block by block."""
    rows, columns = values.shape
    codes = np.zeros((rows, columns), np.uint8)
    scales = np.zeros((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = max(np.abs(values[part]).max(), np.float32(1e-4)) / MAX
            codes[part] = quantize(values[part], scales[i, j])
    return codes, scales


def quantize_rows(values: Floats) -> tuple[Codes, Floats]:
    """Codes [N, K] and scales [N, 1] of a matrix, row by row."""
    scales = np.array([[tensor_scale(np.abs(row).max())] for row in values], np.float32)
    return np.stack([quantize(row, scale) for row, (scale,) in zip(values, scales, strict=True)]), scales


def fp8_weight(name: str, source: Tensor, amax: np.float32, block: Block) -> dict[str, Tensor]:
    """The output tensors of the weight `name`; amax is that of all that shares its scale."""
    dtype, shape, data = source
    values = floats(dtype, data)
    module = name.removesuffix(".weight")
    if block is None:
        scale = tensor_scale(amax)
        codes = quantize(values, scale)
        return {name: ("F8_E4M3", shape, codes.tobytes()), f"{module}.weight_scale": ("F32", (), scale.tobytes())}
    if block == "channel":
        codes, scales = quantize_rows(values.reshape(shape))
        return {
            name: ("F8_E4M3", shape, codes.tobytes()),
            f"{module}.weight_scale": ("F32", scales.shape, scales.tobytes()),
        }
    codes, scales = quantize_blocks(values.reshape(shape), block)
    return {
        name: ("F8_E4M3", shape, codes.tobytes()),
        f"{module}.weight_scale_inv": ("F32", scales.shape, scales.tobytes()),
    }


def amax(*sources: Tensor) -> np.float32:
    return np.float32(max(np.abs(floats(dtype, data)).max() for dtype, _, data in sources))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in the order given, without any padding between them."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in tensors.values()))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file that `safetensors` has been seen to accept."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    data = raw[8 + length :]
    return {n: (e["dtype"], tuple(e["shape"]), data[slice(*e["data_offsets"])]) for n, e in header.items()}


def weight_error(values: Floats, codes: Codes, scales: Floats) -> dict[str, float | None]:
    """What codes [N, K] miss of values [N, K], in float64; scales are those of each element, or broadcast to them."""
    decoded = np.array([decode(code) for code in range(256)])[codes] * scales.astype(np.float64)
    signal = np.square(values.astype(np.float64))
    noise = np.square(values.astype(np.float64) - decoded)
    some = signal.sum(1) > 0
    by_row = noise.sum(1)[some] / signal.sum(1)[some]
    return {
        "sqnr_db": float(10 * np.log10(signal.sum() / noise.sum())) if noise.any() else None,
        "row_sqnr_db": float(-10 * np.log10(by_row.mean())) if noise.any() else None,
        "row_error": float(np.sqrt(by_row.max(initial=0))),
        "weights": values.size,
        "saturated": int((codes & 0x7F == 0x7E).sum()),
        "subnormal": int(((codes & 0x7F > 0) & (codes & 0x7F < 8)).sum()),
        "vanished": int(((codes & 0x7F == 0) & (values != 0)).sum()),
    }
