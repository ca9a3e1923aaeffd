"""Filling a model: which bytes go where, and the bar that tells of them."""

import io
from collections import Counter
from itertools import pairwise
from unittest import mock

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from hypothesis import given
from hypothesis import strategies as st
from runs import assert_same_weights, converted
from torch import nn

from fp8_convert.converter.format.header import TensorInfo, encode_header, parse_header
from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.converter.snapshot.snapshot import Shard
from fp8_convert.converter.stream.reading import BufferPool
from fp8_convert.loader import fill, load_component
from fp8_convert.loader.fill import Filler, _Piece, _Pieces, _Wanted
from fp8_convert.loader.install import install
from fp8_convert.loader.parts import Part
from fp8_convert.loader.tensor_parallel import _cut


@given(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=12), st.integers(1, 50), st.integers(0, 60))
def test_spans_give_every_byte_that_is_wanted_once(tensors: list[tuple[int, bool]], step: int, gap: int) -> None:
    ends = [sum(size for size, _ in tensors[: i + 1]) for i in range(len(tensors))]
    infos = [
        TensorInfo(str(i), "U8", (n,), end - n, end) for i, ((n, _), end) in enumerate(zip(tensors, ends, strict=True))
    ]
    raw = encode_header(infos, {})
    shard = Shard("x", len(raw) + sum(ends[-1:]), parse_header(raw[8:], len(raw) + sum(ends[-1:]), "x"))
    chosen = [info for info, (size, wanted) in zip(infos, tensors, strict=True) if wanted and size]
    pieces = [_Piece(info, info.start, info.end) for info in chosen]
    given_: Counter[str] = Counter()
    read = 0
    with mock.patch.object(fill, "_GAP_BYTES", gap):
        ranges = [*_Wanted(shard, pieces).ranges]
    waiting = _Pieces(pieces)
    for first, last in ranges:
        for start in range(first, last, step):
            stop = min(start + step, last)
            read += stop - start
            for info, low, high in waiting.in_span(start, stop):
                assert max(info.start, start) == low < high == min(info.end, stop)
                given_[info.name] += high - low
    assert dict(given_) == {info.name: info.nbytes for info in chosen}
    gaps = [after.start - before.stop for before, after in pairwise(pieces)]
    assert read == sum(given_.values()) + sum(between for between in gaps if between <= gap)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for out in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", out)
        load_component(converted("z_image"), "transformer", device="cpu")
        told = out.getvalue()
        if out.isatty():
            assert "Loading transformer: 100%" in told
            assert "B/s" in told
        else:
            assert not told


def test_who_wants_no_bars_of_diffusers_gets_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr("sys.stderr", out)
    diffusers_logging.disable_progress_bar()
    try:
        load_component(converted("z_image"), "transformer", device="cpu")
    finally:
        diffusers_logging.enable_progress_bar()
    assert not out.getvalue()


class _Event:
    """Of a stream on which everything is done at once: the CPU's."""

    def record(self, stream: object) -> None: ...
    def synchronize(self) -> None: ...


@pytest.mark.parametrize("span", [1000, 4096, 1 << 20])
@pytest.mark.parametrize("name", ["z_image", "qwen_image"])
def test_spans_through_buffers_give_what_reading_in_place_gives(
    monkeypatch: pytest.MonkeyPatch, name: str, span: int
) -> None:
    """The way onto a GPU, with spans of a few tensors and of pieces of one, on the CPU."""
    folder = converted(name, max_shard_size="1MB")
    wanted = load_component(folder, "transformer", device="cpu")
    monkeypatch.setattr(fill, "_read_in_place", fill._read_through_pinned)
    monkeypatch.setattr(fill, "BufferPool", lambda size, count, pinned: BufferPool(size, count, pinned=False))
    monkeypatch.setattr(fill, "_SPAN_BYTES", span)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    assert_same_weights(load_component(folder, "transformer", device="cpu"), wanted)


def linear(rows: int, columns: int) -> nn.Module:
    """An FP8 linear of blocks without memory, in a model that has it as `layer`."""
    model = nn.Module()
    model.layer = nn.Linear(columns, rows, device="meta", dtype=torch.bfloat16)
    install(model.layer, WeightFormat("w8a8", block=(2, 2)))
    return model


@pytest.mark.parametrize("cast", [False, True], ids=["as-it-is", "cast"])
@given(st.integers(0, 1), st.integers(0, 1), st.integers(1, 60))
def test_a_part_is_set_when_the_whole_tensor_has_passed(cast: bool, rank: int, dim: int, step: int) -> None:
    """Whatever the pieces: a part has all its bytes before the last of them, and what comes then is nobody's."""
    rows, columns = 8, 12
    ranges = ((4 * rank, 4 * rank + 4),) if dim == 0 else ((6 * rank, 6 * rank + 6),)
    blocks = tuple((start // 2, stop // 2) for start, stop in ranges)
    model = linear(rows, columns)
    parts = {"layer.weight": Part((rows, columns), dim, ranges)}
    parts["layer.weight_scale_inv"] = Part((4, 6), dim, blocks)
    if dim == 0:
        parts["layer.bias"] = Part((rows,), 0, ranges)
    for name, part in parts.items():
        _cut(model.layer, name.removeprefix("layer."), part)
    codes = torch.arange(rows * columns, dtype=torch.uint8).view(rows, columns)
    scale, bias = torch.arange(1, 25, dtype=torch.float32).view(4, 6), torch.arange(rows, dtype=torch.float32)
    whole = {"layer.weight": ("F8_E4M3", codes), "layer.weight_scale_inv": ("F32", scale), "layer.bias": ("F32", bias)}
    filler = Filler(model, {name: name for name in whole}, torch.bfloat16, torch.device("cpu"), "it", parts)
    for name, (dtype, tensor) in whole.items():
        info = TensorInfo(name, dtype, tuple(tensor.shape), 0, tensor.nbytes)
        raw, size = tensor.flatten().view(torch.uint8), step * (tensor.itemsize if cast else 1)
        pieces = [(0, info.nbytes)] if cast and filler.wants(info) else filler.to_read(info)
        for first, last in pieces:
            for start in range(first, last, size):
                write = filler.write_cast if cast else filler.write
                write(info, start, raw[start : min(start + size, last)])
    filler.finish()
    for name, (_, tensor) in whole.items():
        (start, stop), part = (blocks if "scale" in name else ranges)[0], name in parts
        wanted = tensor.narrow(dim, start, stop - start) if part else tensor
        found = model.get_parameter(name) if "scale" not in name else model.get_buffer(name)
        assert torch.equal(found.view(torch.uint8).float() if name == "layer.weight" else found.float(), wanted.float())
