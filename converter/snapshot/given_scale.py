"""The scale of an FP8 weight that another tool made: read once, and written in this project's shapes.

Every tool multiplies, `w = code * scale`; they differ in names, dtypes and shapes. Values become float32 and never
change: a scale that float32 cannot hold exactly is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..format.header import TensorInfo
from ..format.layout import Block
from ..telling.errors import ConvertError
from ..telling.notebook import Brief

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, repr=False, eq=False)  # arrays have no equality
class GivenScale(Brief):
    """What the codes of one weight are multiplied by: float32 [], [N, 1] for rows, or a grid for blocks.

    block: rows and columns of a block, None for the others. mode: that in which the source says it is to be run, if it
    does. bare: the source has no scale, and the codes are the values. input_scale: for static activations.
    """

    values: Floats
    block: Block | None = None
    mode: str | None = None
    bare: bool = False
    input_scale: float | None = None

    @property
    def channel(self) -> bool:
        return self.block is None and self.values.ndim == 2

    def part(self, number: int, parts: int, rows: int) -> GivenScale:
        """The scale of part `number` of `parts` equal ranges of a weight's `rows`. Raises ValueError inside a block."""
        if self.values.ndim == 0 or parts == 1:
            return self
        if rows % parts or (self.block is not None and rows // parts % self.block[0]):
            raise ValueError(f"{parts} parts of {rows} rows would cut its blocks")
        height = self.values.shape[0] // parts
        cut = self.values[number * height : (number + 1) * height]
        return GivenScale(cut, self.block, self.mode, self.bare, self.input_scale)


BARE = GivenScale(np.array(1, np.float32), bare=True)


def as_float32(dtype: str, data: bytes, name: str, where: str) -> Floats:
    """The elements of a scale as float32 [n]. Raises ConvertError for what float32 cannot hold, and for no scales."""
    if dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F8_E8M0":  # a power of two, as in DeepSeek's ue8m0 scales
        with np.errstate(over="ignore"):
            values = np.ldexp(1.0, np.frombuffer(data, np.uint8).astype(np.int64) - 127).astype(np.float32)
        values[np.frombuffer(data, np.uint8) == 255] = np.nan
    elif dtype in ("F16", "F32", "F64"):
        wide = np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
        with np.errstate(over="ignore"):
            values = wide.astype(np.float32)
        if not np.array_equal(values.astype(wide.dtype), wide, equal_nan=True):
            raise ConvertError(f"{name} in {where} has values that float32 cannot hold; store its scales in float32.")
    else:
        raise ConvertError(f"{name} in {where} has the dtype {dtype}, which is none of scales.")
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ConvertError(f"{name} in {where} holds a scale that is not finite and positive; download the file again.")
    return np.ascontiguousarray(values)


def fitted(values: Floats, scale: TensorInfo, weight: TensorInfo, block: Block | None, where: str) -> GivenScale:
    """The scale in this project's shape for its weight. block: what the source's config says of blocks.

    Raises ConvertError for a shape that is none of a scalar, a scale for each row, and a grid of blocks.
    """
    if scale.numel == 1:
        return GivenScale(values.reshape(()))
    if len(weight.shape) == 2:
        rows, columns = weight.shape
        if scale.shape in ((rows,), (rows, 1)):
            return GivenScale(values.reshape(rows, 1))
        height, width = block or (128, 128)
        if scale.shape == (-(-rows // height), -(-columns // width)):
            return GivenScale(values.reshape(scale.shape), (height, width))
    stated = f"blocks of {block[0]}x{block[1]}" if block else "blocks of 128x128"
    raise ConvertError(
        f"{scale.name} in {where} has the shape {list(scale.shape)} for a weight of {list(weight.shape)}, which is "
        f"neither one scale, nor one for each row, nor one for {stated}; this layout cannot be imported."
    )
