"""Parts of tensors, whatever the pieces in which the whole tensor's bytes come."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8_convert.loader.parts import Part


@st.composite
def parts(draw: st.DrawFn) -> Part:
    whole = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dim = draw(st.integers(0, 1)) if len(whole) == 2 else 0
    edges = sorted(draw(st.lists(st.integers(0, whole[dim]), min_size=2, max_size=6).filter(lambda e: len(e) % 2 == 0)))
    return Part(whole, dim, tuple(zip(edges[::2], edges[1::2], strict=True)))


@given(parts(), st.sampled_from([1, 2, 4]), st.data())
def test_any_pieces_give_the_part(part: Part, itemsize: int, data: st.DataObject) -> None:
    size = itemsize * prod(part.whole)
    raw = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    elements = raw.reshape(*part.whole, itemsize)
    wanted = np.concatenate([np.take(elements, range(*pair), part.dim) for pair in part.ranges], part.dim)
    assert part.shape == wanted.shape[:-1]
    memory = torch.full((itemsize * prod(part.shape),), 255, dtype=torch.uint8)
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=8))})
    for start, stop in pairwise(cuts):
        part.copy(itemsize, memory, start, torch.from_numpy(raw[start:stop].copy()))
    assert memory.numpy().tobytes() == wanted.tobytes()


@given(parts(), st.sampled_from([1, 2, 4]))
def test_what_is_to_be_read_is_enough(part: Part, itemsize: int) -> None:
    raw = np.random.default_rng(0).integers(0, 256, itemsize * prod(part.whole), np.uint8)
    whole, read = (torch.zeros(itemsize * prod(part.shape), dtype=torch.uint8) for _ in range(2))
    part.copy(itemsize, whole, 0, torch.from_numpy(raw))
    for start, stop in part.to_read(itemsize):
        part.copy(itemsize, read, start, torch.from_numpy(raw[start:stop].copy()))
    assert torch.equal(whole, read)
    if part.dim == 0:
        assert sum(stop - start for start, stop in part.to_read(itemsize)) == read.numel()
