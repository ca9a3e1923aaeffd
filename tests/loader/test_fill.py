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

from fp8_convert.converter.format.header import TensorInfo, encode_header, parse_header
from fp8_convert.converter.snapshot.snapshot import Shard
from fp8_convert.converter.stream.reading import BufferPool
from fp8_convert.loader import fill, load_component
from fp8_convert.loader.fill import _Piece, _Pieces, _Wanted


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
