"""The arithmetic of merging: the reference's bits, however rows are cut, on any number of threads and on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import Weights, fp8, random_tensor, whole

from fp8_convert.converter.plan.lora import LowRank
from fp8_convert.converter.plan.plan import ShardPlan
from fp8_convert.converter.plan.schedule import Memory
from fp8_convert.converter.snapshot.files import LocalFiles
from fp8_convert.converter.stream import compiled
from fp8_convert.converter.stream.component_stream import convert_component
from fp8_convert.converter.stream.engine import Engine
from fp8_convert.converter.stream.merging import merge, product
from fp8_convert.converter.stream.supply import FolderSupply

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the compiled code and with torch's, which must give the same bits."""
    if request.param == "compiled" and not compiled.available():
        pytest.skip("installed without a C compiler")
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "torch":
            patched.setattr(compiled, "_library", None)
        yield request.param


def chain(b: reference.Floats, a: reference.Floats) -> reference.Floats:
    """b @ a element by element and step by step, each step rounded once to float32."""
    total = np.zeros((b.shape[0], a.shape[1]), np.float32)
    for k in range(a.shape[0]):
        exact = np.float64(b[:, k, None]) * np.float64(a[None, k, :])
        total = (np.float64(total) + exact).astype(np.float32)
    return total


def low_rank(shape: tuple[int, int], rank: int, seed: int, factor: float = 0.75) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*s, generator=generator) for s in ((rank, shape[1]), (shape[0], rank)))
    return LowRank(a, b, factor)


def merged(weight: torch.Tensor, *changes: LowRank) -> torch.Tensor:
    """The reference: A and B in the weight's dtype, the sum in order, everything rounded as the docstring says."""
    for change in changes:
        a, b = (t.to(weight.dtype).float().numpy() for t in (change.a, change.b))
        delta = torch.from_numpy(chain(b, a) * np.float32(change.factor)).to(weight.dtype)
        weight = (weight.float() + delta.float()).to(weight.dtype)
    return weight


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
def test_the_sum_is_in_order(way: str, rank: int) -> None:
    change = low_rank((37, 1030), rank, seed=rank)
    assert np.array_equal(product(change.b, change.a).numpy(), chain(change.b.numpy(), change.a.numpy()))


def test_it_is_a_matrix_product(way: str) -> None:
    """As torch makes it, whose sums are in this order while the rank is not split."""
    change = low_rank((256, 512), 32, seed=5)
    exact = change.b.double() @ change.a.double()
    assert (product(change.b, change.a) - exact).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_any_part_of_a_weight(way: str, dtype: torch.dtype, device: str) -> None:
    """Elements from the middle of a row to the middle of another one, as slots are cut."""
    shape = (50, 40)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    changes = [low_rank(shape, 4, seed=2), low_rank(shape, 9, seed=3, factor=-0.1)]
    expected = merged(weight, *changes).flatten()
    for start, stop in ((0, 2000), (0, 1), (39, 41), (123, 1777), (1999, 2000), (80, 120)):
        part = weight.flatten()[start:stop].clone().to(device)
        assert merge(part, start, changes) is part
        assert torch.equal(part.cpu().view(torch.uint8), expected[start:stop].view(torch.uint8)), (start, stop)


def test_many_rows_are_taken_in_turns(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8_convert.converter.stream import merging

    monkeypatch.setattr(merging, "_STEP", 100)
    weight = torch.randn((31, 40), generator=torch.Generator().manual_seed(1))
    change = low_rank((31, 40), 4, seed=2)
    assert torch.equal(merge(weight.flatten().clone(), 0, [change]), merged(weight, change).flatten())


SHAPE = (48, 64)
SIZES = [Memory(16, 16), Memory(200, 800), Memory(1024, 8 * 1024), Memory(8 * 2**20, 192 * 2**20)]


def component(folder: Path, memory: Memory, dtype: str) -> tuple[list[ShardPlan], list[dict[str, reference.Tensor]]]:
    """Every way in which a weight is taken, over two shards, with what the reference gives for the merged ones."""
    names = ["alone", "kept", "one", "two", "block"]
    sources = {f"{n}.weight": random_tensor(dtype, SHAPE, seed) for seed, n in enumerate(names)}
    changes = {name: low_rank(SHAPE, 5, seed) for seed, name in enumerate(sources)}
    decisions = {
        "alone.weight": fp8(),
        "one.weight": fp8(group="g"),
        "two.weight": fp8(group="g"),
        "block.weight": fp8((16, 24)),
    }
    shards = [
        {k: sources[k] for k in ("alone.weight", "kept.weight", "one.weight")},
        {k: sources[k] for k in ("two.weight", "block.weight")},
    ]
    plans = [
        replace(plan, tensors=tuple(replace(t, merges=(changes[t.info.name],)) for t in plan.tensors))
        for plan in Weights(shards, decisions).write(folder, memory=memory)
    ]
    after = {name: _merged_bytes(tensor, changes[name]) for name, tensor in sources.items()}
    return plans, Weights([{k: after[k] for k in shard} for shard in shards], decisions).expected()


def _merged_bytes(tensor: reference.Tensor, change: LowRank) -> reference.Tensor:
    dtype, shape, data = tensor
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    weight = torch.frombuffer(bytearray(data), dtype=kind).view(*shape)
    return dtype, shape, merged(weight, change).flatten().view(torch.uint8).numpy().tobytes()


@settings(max_examples=20)
@given(st.sampled_from(SIZES), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["BF16", "F32"]))
def test_any_slots_and_threads(
    tmp_path_factory: pytest.TempPathFactory, memory: Memory, workers: int, readers: int, dtype: str
) -> None:
    _check(tmp_path_factory.mktemp("any"), memory, dtype, Engine(workers=workers, readers=readers))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_on_cuda(tmp_path: Path, dtype: str) -> None:
    _check(tmp_path, SIZES[2], dtype, Engine("cuda"))


def _check(folder: Path, memory: Memory, dtype: str, engine: Engine) -> None:
    plans, expected = component(folder, memory, dtype)
    with engine:
        for stream, wanted in zip(
            convert_component(whole(plans), FolderSupply(LocalFiles(folder)), engine), expected, strict=True
        ):
            found: dict[str, bytearray] = {}
            for chunk in stream.chunks:
                found.setdefault(chunk.name, bytearray()).extend(chunk.data.cpu().numpy().tobytes())
            assert found == {name: data for name, (_, shape, data) in wanted.items() if math.prod(shape)}
