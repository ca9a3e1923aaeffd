"""What codes miss, against float64, and to the last digit the same however it is computed."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from shards import Weights, fp8, random_tensor, weights, whole

from fp8_convert.converter.format.record import RecordedError, measured_columns
from fp8_convert.converter.plan.schedule import MEMORY, Memory
from fp8_convert.converter.snapshot.files import LocalFiles
from fp8_convert.converter.stream import compiled, quantize
from fp8_convert.converter.stream.component_stream import convert_component
from fp8_convert.converter.stream.engine import Engine
from fp8_convert.converter.stream.supply import FolderSupply
from fp8_convert.converter.stream.weight_error import Missed, weight_error

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHAPE = (96, 200)


@pytest.fixture(params=["compiled", "torch"])
def arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "compiled" and not compiled.available():
        pytest.skip("no C compiler was here when the package was installed")
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "torch":
            patched.setattr(compiled, "_library", None)
        yield


def gaussian(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.02


def with_outlier(sigmas: float) -> torch.Tensor:
    x = gaussian()
    x[3, 5] = 0.02 * sigmas
    return x


def with_small_row(factor: float) -> torch.Tensor:
    x = gaussian()
    x[7] *= factor
    return x


CASES = {
    "gaussian": gaussian(),
    "uniform": torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) - 0.5,
    "an outlier": with_outlier(100),
    "an outlier that makes most codes subnormal": with_outlier(30_000),
    "an outlier that makes most weights vanish": with_outlier(1e6) / 1e3,
    "a small row": with_small_row(2.0**-12),
    "a row of zeros": with_small_row(0),
    "half a code off": torch.full(SHAPE, 17.0).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(448.0)),
}


def error_of(x: torch.Tensor, scheme: reference.Block, cuts: Sequence[int] = ()) -> tuple[RecordedError, Any, Any]:
    """What the codes of x miss, with codes and the scale of every element; `cuts` are elements or rows to cut at."""
    rows, columns = x.shape
    if scheme is None:
        scale = quantize.tensor_scale(quantize.amax(x))
        parts, codes = [], []
        for start, stop in zip((0, *cuts), (*cuts, x.numel()), strict=True):
            piece = x.view(-1)[start:stop].clone()
            missed = Missed.of(piece, start, columns)
            codes.append(
                quantize.quantize_tensor(piece, scale, piece.view(torch.uint8)[: piece.numel()], missed).clone()
            )
            parts.append(missed.in_rows())
        return weight_error(parts, x.numel()), torch.cat(codes).view(x.shape).numpy(), np.array(scale)
    if scheme == "channel":
        missed = Missed.of(x, 0, columns)
        made, scales, _ = quantize.quantize_rows(x, None, missed)
        return weight_error([missed.in_rows(scales)], x.numel()), made.view(x.shape).numpy(), scales
    missed = Missed.of(x, 0, columns, scheme[1])
    made, scales, _ = quantize.quantize_blocks(x, scheme, None, missed)
    by_row = scales.repeat(scheme[0], 0)[:rows]
    full = by_row.repeat(scheme[1], 1)[:, :columns]
    return weight_error([missed.in_rows(by_row)], x.numel()), made.view(x.shape).numpy(), full


def assert_close(found: RecordedError, wanted: dict[str, Any]) -> None:
    """Within the bounds that weight_error.py promises, and the rounding to the digits of records."""
    extreme = 2 * (found.subnormal + found.vanished) > found.weights or found.vanished > 0
    for key, value in asdict(found).items():
        if key == "row_error":
            assert value == pytest.approx(wanted[key], rel=0.01 if extreme else 1e-3, abs=5e-6), key
        elif not key.endswith("_db"):
            assert value == wanted[key], key
        elif value is None or wanted[key] is None:
            assert value is wanted[key], key
        else:
            assert abs(value - wanted[key]) < 0.005 + (0.05 if extreme else 0.001), key


# Against float64


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("scheme", [None, "channel", (16, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_float64_gives(case: str, dtype: str, scheme: reference.Block) -> None:
    x = CASES[case].to(DTYPES[dtype])
    found, codes, scales = error_of(x, scheme)
    assert_close(found, reference.weight_error(x.float().numpy(), codes, scales))


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("power", range(0, 40, 3))
def test_the_bound_holds_however_small_weights_are_beside_the_largest(power: int) -> None:
    """One weight of 1 has a row of its own; the others are smaller and smaller, until no unit is left of them."""
    x = gaussian() * 2.0**-power
    x[0] = 0
    x[0, 0] = 1
    found, codes, scales = error_of(x, None)
    wanted = reference.weight_error(x.numpy(), codes, scales)
    assert found.vanished == wanted["vanished"]
    assert found.row_sqnr_db == pytest.approx(wanted["row_sqnr_db"], abs=0.055)


def test_the_gaussian_s_numbers() -> None:
    """What docs/weight-error.md calls normal."""
    found, *_ = error_of(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16(), None)
    assert found.sqnr_db == pytest.approx(31.5, abs=0.1)
    assert found.row_error == pytest.approx(0.0285, abs=0.001)


@pytest.mark.usefixtures("arithmetic")
def test_golden_numbers() -> None:
    """They are in records: a change of them changes every record."""
    x = torch.arange(-1000, 1000).view(20, 100).float() ** 3 / 7e6
    found = {str(scheme): asdict(error_of(x, scheme)[0]) for scheme in (None, "channel", (8, 32))}
    assert found == GOLDEN


def test_codes_that_miss_nothing_have_no_number() -> None:
    x = torch.tensor([[448.0, -1.5, 0.0], [0.0, -0.0, 2.0**-9]])
    found, *_ = error_of(x, None)
    assert (found.sqnr_db, found.row_sqnr_db, found.row_error) == (None, None, 0)
    assert (found.saturated, found.subnormal, found.vanished) == (1, 1, 0)
    assert error_of(torch.zeros(2, 3), None)[0] == RecordedError(
        sqnr_db=None, row_sqnr_db=None, row_error=0.0, weights=6, saturated=0, subnormal=0, vanished=0
    )


def test_a_scaled_copy_has_the_numbers_of_the_original() -> None:
    assert error_of(gaussian() * 2.0**-20, None)[0] == error_of(gaussian(), None)[0]


# Always the same


@pytest.mark.skipif(not compiled.available(), reason="no C compiler was here when the package was installed")
@pytest.mark.parametrize("scheme", [None, "channel", (16, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_compiled_code_and_torch_agree_to_the_last_bit(
    dtype: str, scheme: reference.Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [error_of(x.to(DTYPES[dtype]), scheme)[0] for x in CASES.values()]
    monkeypatch.setattr(compiled, "_library", None)
    assert [error_of(x.to(DTYPES[dtype]), scheme)[0] for x in CASES.values()] == found


@pytest.mark.usefixtures("arithmetic")
@given(st.sets(st.integers(1, SHAPE[0] * SHAPE[1] - 1), max_size=12), st.sampled_from(sorted(CASES)))
def test_any_cutting_gives_the_same(cuts: set[int], case: str) -> None:
    x = CASES[case].bfloat16()
    assert error_of(x, None, sorted(cuts))[0] == error_of(x, None)[0]


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize(
    "options", [["-O0", "-DPLAIN"], ["-O3", "-DPLAIN"], ["-O3", "-DPLAIN", "-mavx2"]], ids=" ".join
)
def test_every_compilation_of_the_c_code_gives_the_same(options: list[str], tmp_path: Path) -> None:
    source = Path(compiled.__file__).with_name("_e4m3.c")
    built = tmp_path / "plain.so"
    flags = ["-ffp-contract=off", "-fno-trapping-math", "-shared", "-fPIC"]
    if "-mavx2" in options and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX2")
    subprocess.run(["cc", *options, *flags, str(source), "-o", str(built)], check=True)
    plain = ctypes.CDLL(str(built))
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)):
        for x in CASES.values():
            x = x.to(dtype)
            missed, scale = Missed.of(x, 0, x.shape[1]), quantize.tensor_scale(quantize.amax(x))
            codes = torch.empty(x.shape, dtype=torch.uint8)
            factor = torch.from_numpy(np.array([np.float32(1) / scale]))
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, codes, factor, missed.sums, missed.counts)]
            sizes = [ctypes.c_size_t(size) for size in (*x.shape, x.shape[1])]
            getattr(plain, f"codes_{name}")(*pointers[:2], *sizes, *pointers[2:])
            found, wanted, _ = error_of(x, None)
            assert weight_error([missed.in_rows()], x.numel()) == found
            np.testing.assert_array_equal(codes.numpy(), wanted)


def test_where_the_cpu_flushes_subnormals() -> None:
    x = gaussian() * 2.0**-70
    x[0, 0] = 1e20  # what a code is made of is subnormal
    wanted = error_of(x, None)[0]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        assert error_of(x, None)[0] == wanted
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [None, "channel", (16, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_cuda_gives_the_same(dtype: str, scheme: reference.Block) -> None:
    for x in CASES.values():
        x = x.to(DTYPES[dtype])
        found: list[Missed] = []
        for where in (x, x.cuda()):
            width = None if scheme in (None, "channel") else scheme[1]
            missed = Missed.of(where, 0, x.shape[1], width)
            if scheme is None:
                quantize.quantize_tensor(where, quantize.tensor_scale(quantize.amax(where)), None, missed)
            elif scheme == "channel":
                quantize.quantize_rows(where, None, missed)
            else:
                quantize.quantize_blocks(where, scheme, None, missed)
            found.append(missed)
        assert torch.equal(found[0].sums, found[1].sums.cpu())
        assert torch.equal(found[0].counts, found[1].counts.cpu())


# In a stream


def errors_in(w: Weights, folder: Path, memory: Memory, workers: int) -> dict[str, RecordedError]:
    plans = w.write(folder, memory=memory)
    found: dict[str, RecordedError] = {}
    with Engine(workers=workers) as engine:
        streams = convert_component(whole(plans), FolderSupply(LocalFiles(folder)), engine, with_errors=True)
        for stream in streams:
            for _ in stream.chunks:
                pass
            found |= stream.errors
    return found


def decibels_off(values: reference.Floats, scales: reference.Floats, sqnr_db: float) -> float:
    """How far rounding to units of 2^-14 can move a number of decibels, the two digits that it is given with included.

    By the triangle inequality: each weight and what it misses are off by half a unit, by less than one more that the
    reciprocal of the scale is rounded by, or that a row counts in which weights vanish.
    """
    off = 1.5 * 2.0**-14 * float(np.linalg.norm(scales.astype(np.float64)))
    signal = float(np.linalg.norm(values.astype(np.float64)))
    noise = signal * 10 ** (-sqnr_db / 20)
    if off >= noise:
        return math.inf
    return 0.006 - 20 * math.log10(1 - off / noise) - 20 * math.log10(1 - off / signal)


@given(weights())
def test_any_component_in_any_memory(tmp_path_factory: pytest.TempPathFactory, w: Weights) -> None:
    folder = tmp_path_factory.mktemp("errors")
    found = errors_in(w, folder, MEMORY, 2)
    assert found == errors_in(w, folder, Memory(64, 256), 1)
    written = {name: tensor for shard in w.expected() for name, tensor in shard.items()}
    sources = {name: tensor for shard in w.shards for name, tensor in shard.items()}
    assert set(found) == {name.removesuffix(".weight") for name in w.decisions}
    for name, decision in w.decisions.items():
        module, (dtype, shape, data) = name.removesuffix(".weight"), sources[name]
        values = reference.floats(dtype, data).reshape(shape[0], -1)
        codes = np.frombuffer(written[name][2], np.uint8).reshape(values.shape)
        key = f"{module}.weight_scale_inv" if decision.block else f"{module}.weight_scale"
        _, scale_shape, scale_data = written[key]
        scales = np.frombuffer(scale_data, np.float32).reshape(scale_shape)
        if block := decision.block:
            scales = scales.repeat(block[0], 0).repeat(block[1], 1)[: values.shape[0], : values.shape[1]]
        wanted = reference.weight_error(values, codes, scales)
        counts = ("weights", "saturated", "subnormal", "vanished")
        assert [asdict(found[module])[key] for key in counts] == [wanted[key] for key in counts]
        if wanted["sqnr_db"] is not None and wanted["sqnr_db"] < 60:
            off = decibels_off(values, np.broadcast_to(scales, values.shape), wanted["sqnr_db"])
            assert found[module].sqnr_db == pytest.approx(wanted["sqnr_db"], abs=off)


def test_nothing_is_measured_that_nobody_asked_for(tmp_path: Path) -> None:
    w = Weights([{"a.weight": random_tensor("BF16", (4, 8), 1)}], {"a.weight": fp8()})
    with Engine() as engine:
        for stream in convert_component(whole(w.write(tmp_path)), FolderSupply(LocalFiles(tmp_path)), engine):
            assert list(stream.chunks)
            assert stream.errors == {}


def test_rows_that_are_too_long_are_not_measured() -> None:
    assert measured_columns((4, 2**17)) == 2**17
    assert measured_columns((4, 2**17 + 1)) is None
    assert measured_columns((4, 3, 5, 5)) == 75
    assert measured_columns((0, 8)) is None
    x = torch.full((1, 2**17), 448.0)  # the largest sum that there can be
    found, *_ = error_of(x, None)
    assert (found.sqnr_db, found.saturated) == (None, 2**17)


GOLDEN: dict[str, dict[str, Any]] = {
    "None": {
        "sqnr_db": 31.77,
        "row_sqnr_db": 31.62,
        "row_error": 0.02876,
        "weights": 2000,
        "saturated": 25,
        "subnormal": 38,
        "vanished": 24,
    },
    "channel": {
        "sqnr_db": 32.25,
        "row_sqnr_db": 31.97,
        "row_error": 0.02643,
        "weights": 2000,
        "saturated": 144,
        "subnormal": 4,
        "vanished": 2,
    },
    "(8, 32)": {
        "sqnr_db": 32.52,
        "row_sqnr_db": 31.92,
        "row_error": 0.03438,
        "weights": 2000,
        "saturated": 107,
        "subnormal": 22,
        "vanished": 13,
    },
}
