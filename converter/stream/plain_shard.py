"""One converted shard, read front to back, as the bytes of its plain file: codes dequantised, scales left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch

from ..format.header import TensorInfo
from ..format.layout import WEIGHT, WeightFormat
from ..plan.plain import PlainShard
from ..plan.schedule import Segment, cut
from ..snapshot.files import SourceFile
from ..telling.errors import ConvertError, ResumableError
from .dequantize import dequantize
from .reading import BufferPool, Hasher, SpanReader, open_for_reading, read_exactly

_SLOT_BYTES = 8 * 1024 * 1024
_SLOTS = 6


def stream_plain(shard: PlainShard, source: SourceFile, dtype: str, hasher: Hasher) -> Iterator[torch.Tensor]:
    """Yield the data of the shard's output file in pieces, uint8 [n], each valid until the next one is taken.

    dtype: of the weights, as safetensors spells it. hasher: fed the whole source file in file order. Raises
    ConvertError for weights that the dtype cannot hold, ResumableError where the file differs from its header.
    """
    tensors, data_start = shard.source.header.tensors, shard.source.header.data_start
    kept = {output.name for output in shard.outputs}
    extents = [(i, t.start, t.nbytes, _unit(t, shard.format_of(t))) for i, t in enumerate(tensors)]
    slot_bytes = max(_SLOT_BYTES, *(unit for _, _, _, unit in extents), 1)
    slots = cut(extents, slot_bytes)
    fd = open_for_reading(source.path, source.where)
    try:
        _hash_header(fd, shard, hasher)
        spans = [(data_start + slot.start, data_start + slot.stop) for slot in slots]
        with closing(
            SpanReader(fd, spans, BufferPool(slot_bytes, _SLOTS), where=source.where, hasher=hasher)
        ) as reader:
            for slot in slots:
                span = reader.next()
                for segment in slot.segments:
                    tensor = tensors[segment.tensor]
                    first = tensor.start + segment.start - slot.start
                    data = span.data[first : first + segment.stop - segment.start]
                    if (how := shard.format_of(tensor)) is not None:
                        yield _weights(fd, shard, tensor, how, segment, data, dtype)
                    elif tensor.name in kept:
                        yield data
                span.release()
    finally:
        os.close(fd)


def _unit(tensor: TensorInfo, how: WeightFormat | None) -> int:
    """Bytes at whose multiples a tensor may be split: a row of blocks, a row, or an element."""
    if how is None:
        return tensor.itemsize
    if len(how.scale_shape(tensor.shape)) == 0:
        return 1
    return min(_rows(how), tensor.shape[0]) * tensor.shape[1]


def _rows(how: WeightFormat) -> int:
    """How many rows of a matrix a scale covers."""
    return 1 if how.block is None else how.block[0]


def _weights(
    fd: int, shard: PlainShard, tensor: TensorInfo, how: WeightFormat, segment: Segment, codes: torch.Tensor, dtype: str
) -> torch.Tensor:
    """The plain bytes of a segment of an FP8 weight, whose scales are read from where they lie."""
    if not len(codes):
        return codes
    module = tensor.name.removesuffix(WEIGHT)
    scale = next(t for t in shard.source.header.tensors if t.name == how.scale_key(module))
    if scale.numel == 1:
        values = _scales(fd, shard, scale, 0, 1)
    else:
        width, rows = tensor.shape[1], _rows(how)
        codes = codes.view(-1, width)
        top, bottom = segment.start // width, -(-segment.stop // width)
        columns = scale.shape[1]
        values = _scales(fd, shard, scale, top // rows * columns, -(-bottom // rows) * columns).view(-1, columns)
    weights = dequantize(codes, values, how.block, dtype)
    if not bool(weights.isfinite().all()):
        raise ConvertError(
            f"{tensor.name} in {shard.source.path} holds what {dtype} cannot: NaN, or more than its largest number; "
            "choose the other --dtype, and if it fails too, convert the snapshot again."
        )
    return weights.view(-1).view(torch.uint8)


def _scales(fd: int, shard: PlainShard, scale: TensorInfo, first: int, last: int) -> torch.Tensor:
    """The elements [first, last) of a scale. Raises ConvertError for one that is not finite and positive."""
    data = bytearray(4 * (last - first))
    read_exactly(fd, memoryview(data), shard.source.header.data_start + scale.start + 4 * first, shard.source.path)
    values = np.frombuffer(data, np.float32)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ConvertError(
            f"{scale.name} in {shard.source.path} holds a scale that is not finite and positive; convert or download "
            "the snapshot again."
        )
    return torch.from_numpy(values)


def _hash_header(fd: int, shard: PlainShard, hasher: Hasher) -> None:
    raw = bytearray(shard.source.header.data_start)
    read_exactly(fd, memoryview(raw), 0, shard.source.path)
    if raw[8:] != shard.source.header.raw:
        raise ResumableError(f"{shard.source.path} changed since it was planned; run again.")
    hasher.update(memoryview(raw))
