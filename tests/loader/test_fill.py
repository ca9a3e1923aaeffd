"""Filling a model: which bytes go where, and the bar that tells of them."""

import io
from collections import Counter

import pytest
from diffusers.utils import logging as diffusers_logging
from hypothesis import given
from hypothesis import strategies as st
from runs import converted

from fp8_convert.converter.format.header import TensorInfo, encode_header, parse_header
from fp8_convert.converter.snapshot.snapshot import Shard
from fp8_convert.loader import load_component
from fp8_convert.loader.fill import _Tensors


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 50))
def test_spans_give_every_byte_of_every_tensor_once(sizes: list[int], step: int) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    infos = [TensorInfo(str(i), "U8", (n,), end - n, end) for i, (n, end) in enumerate(zip(sizes, ends, strict=True))]
    raw = encode_header(infos, {})
    shard = Shard("x", len(raw) + sum(sizes), parse_header(raw[8:], len(raw) + sum(sizes), "x"))
    tensors = _Tensors(shard)
    given_: Counter[str] = Counter()
    for start in range(0, max(1, sum(sizes)), step):
        stop = min(start + step, sum(sizes))
        for info, low, high in tensors.in_span(start, stop):
            assert max(info.start, start) == low <= high == min(info.end, stop)
            given_[info.name] += high - low
    assert dict(given_) == {info.name: info.nbytes for info in infos}


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
