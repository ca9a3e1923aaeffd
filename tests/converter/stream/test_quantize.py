"""Codes and scales against golden bit patterns and against `reference`, for every value that 16 bits can hold."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8_convert.converter.stream import compiled, quantize

GOLDEN: dict[str, list[list[str]]] = json.loads((Path(__file__).parent / "golden_e4m3.json").read_text())
EVERY_CODE = np.arange(65_536, dtype="<u2")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
AMAXES = [2.0**-149, 2.0**-133, 448 * 2.0**-126, 6e-8, 1e-5, 0.0123, 1.0, 448.0, 65504.0, 3e38]


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def _arithmetic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs with the compiled code and with torch's, which must give the same bits."""
    if request.param == "compiled" and not compiled.available():
        pytest.skip("no C compiler was here when the package was installed")
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "torch":
            patched.setattr(compiled, "_library", None)
        yield


def golden(start: str) -> list[list[str]]:
    return next(rows for title, rows in GOLDEN.items() if title.startswith(start))


def float_of(bits: str) -> np.float32:
    return np.float32(np.array(int(bits, 16), np.uint32).view(np.float32))


def tensor_of(dtype: str, bits: npt.NDArray[Any]) -> torch.Tensor:
    """A torch tensor with these bit patterns."""
    integer = {2: torch.int16, 4: torch.int32}[DTYPES[dtype].itemsize]
    return torch.frombuffer(bytearray(bits.tobytes()), dtype=integer).view(DTYPES[dtype])


def codes_of(x: torch.Tensor, scale: np.float32) -> npt.NDArray[np.uint8]:
    return quantize.quantize_tensor(x, scale).numpy()


def finite_codes(dtype: str) -> npt.NDArray[np.uint16]:
    return EVERY_CODE[np.isfinite(reference.floats(dtype, EVERY_CODE.tobytes()))]


# Golden bit patterns


@pytest.mark.parametrize(("value", "code", "why"), golden("codes at scale 1"))
def test_golden_codes(value: str, code: str, why: str) -> None:
    x = np.array([float.fromhex(value)], np.float32)
    assert reference.encode(x).tolist() == [int(code, 16)], why
    assert codes_of(torch.from_numpy(x), np.float32(1)).tolist() == [int(code, 16)], why


@pytest.mark.parametrize(("amax", "scale", "why"), golden("scales per tensor"))
def test_golden_tensor_scales(amax: str, scale: str, why: str) -> None:
    assert quantize.tensor_scale(float(float_of(amax))).tobytes() == float_of(scale).tobytes(), why
    assert reference.tensor_scale(float_of(amax)).tobytes() == float_of(scale).tobytes(), why


@pytest.mark.parametrize(("amax", "scale", "why"), golden("scales of blocks"))
def test_golden_block_scales(amax: str, scale: str, why: str) -> None:
    x = np.zeros((3, 2), np.float32)
    x[2, 1] = -float_of(amax)
    _, scales, finite = quantize.quantize_blocks(torch.from_numpy(x), (4, 4))
    assert scales.tobytes() == reference.quantize_blocks(x, (4, 4))[1].tobytes() == float_of(scale).tobytes(), why
    assert finite


@pytest.mark.parametrize(("amax", "weight", "code", "divided"), golden("the reciprocal matters"))
def test_codes_come_from_the_reciprocal(amax: str, weight: str, code: str, divided: str) -> None:
    bits = np.array([int(weight, 16)], "<u2")
    scale = quantize.tensor_scale(float(reference.floats("BF16", np.array([int(amax, 16)], "<u2").tobytes())[0]))
    assert reference.encode(reference.floats("BF16", bits.tobytes()) / scale).tolist() == [int(divided, 16)]
    assert codes_of(tensor_of("BF16", bits), scale).tolist() == [int(code, 16)]


def test_every_code_decodes_to_itself() -> None:
    codes = [code for code in range(256) if code & 0x7F != 0x7F]
    values = np.array([reference.decode(code) for code in codes], np.float32)
    assert reference.encode(values).tolist() == codes
    assert codes_of(torch.from_numpy(values), np.float32(1)).tolist() == codes


# Every 16-bit value, per tensor


@pytest.mark.parametrize("amax", AMAXES, ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_at_several_scales(dtype: str, amax: float) -> None:
    bits = finite_codes(dtype)
    scale = quantize.tensor_scale(amax)
    wanted = reference.quantize(reference.floats(dtype, bits.tobytes()), scale)
    np.testing.assert_array_equal(codes_of(tensor_of(dtype, bits), scale), wanted)


def test_half_precision_where_the_cpu_flushes_subnormals() -> None:
    """A process may have told the CPU to take float32 subnormals for zero; those of float16 are none."""
    bits = finite_codes("F16")
    values = reference.floats("F16", bits.tobytes())
    wanted = reference.quantize(values, reference.tensor_scale(np.float32(0.001)))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        codes = codes_of(tensor_of("F16", bits), quantize.tensor_scale(0.001))
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(codes, wanted)


@pytest.mark.parametrize("limit", [2.0**-140, 1e-6, 0.25, 3.0, 1e4, np.inf], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_value_up_to_a_limit_under_its_own_scale(dtype: str, limit: float) -> None:
    """As the converter does it: the scale is that of the tensor's own amax."""
    bits = finite_codes(dtype)
    values = reference.floats(dtype, bits.tobytes())
    bits, values = bits[np.abs(values) <= limit], values[np.abs(values) <= limit]
    x = tensor_of(dtype, bits)
    largest = quantize.amax(x)
    assert largest == np.abs(values).max()
    scale = quantize.tensor_scale(largest)
    assert scale.tobytes() == reference.tensor_scale(np.abs(values).max()).tobytes()
    np.testing.assert_array_equal(codes_of(x, scale), reference.quantize(values, scale))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_codes_may_replace_their_source(dtype: str) -> None:
    """In place, over more elements than are worked on at a time."""
    count = 2 * quantize._CHUNK + 77
    x = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    scale = quantize.tensor_scale(quantize.amax(x))
    wanted = quantize.quantize_tensor(x, scale).clone()
    assert torch.equal(quantize.quantize_tensor(x, scale, x.view(torch.uint8)[:count]), wanted)
    assert torch.equal(x.view(torch.uint8)[:count], wanted)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200), st.sampled_from(AMAXES))
def test_any_float32(bits: list[int], amax: float) -> None:
    x = np.array(bits, np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    for largest in (np.float32(amax), np.abs(x).max(initial=np.float32(0))):
        scale = quantize.tensor_scale(float(largest))
        wanted = reference.quantize(x, reference.tensor_scale(largest))
        np.testing.assert_array_equal(codes_of(torch.from_numpy(x.copy()), scale), wanted)


# amax


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (2, 3, 1, 5), (2, 2, 3, 1, 2)], ids=str)
def test_amax_of_any_shape(dtype: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DTYPES[dtype])
    x.view(-1)[-1] = -17
    assert quantize.amax(x) == 17


def test_amax_of_nothing_and_of_zeros() -> None:
    assert quantize.amax(torch.empty(0)) == 0
    assert quantize.amax(torch.tensor([-0.0, 0.0])) == 0


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_amax_shows_what_is_not_finite(dtype: str, bad: float) -> None:
    for position in (0, 500, 999):
        x = torch.ones(1000, dtype=DTYPES[dtype])
        x[position] = bad
        assert not np.isfinite(quantize.amax(x))


# Blocks


def assert_blocks_equal(dtype: str, bits: npt.NDArray[Any], shape: tuple[int, int], block: tuple[int, int]) -> None:
    wanted_codes, wanted_scales = reference.quantize_blocks(
        reference.floats(dtype, bits.tobytes()).reshape(shape), block
    )
    x = tensor_of(dtype, bits).view(shape)
    codes, scales, finite = quantize.quantize_blocks(x, block)
    np.testing.assert_array_equal(codes.numpy().reshape(shape), wanted_codes)
    assert scales.tobytes() == wanted_scales.tobytes()
    assert scales.shape == wanted_scales.shape
    assert finite
    in_place, _, _ = quantize.quantize_blocks(x, block, x.view(-1).view(torch.uint8)[: x.numel()])
    np.testing.assert_array_equal(in_place.numpy().reshape(shape), wanted_codes)


@pytest.mark.parametrize("block", [(128, 128), (16, 32), (100, 7), (1, 64), (300, 999)], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_in_blocks(dtype: str, block: tuple[int, int]) -> None:
    bits = finite_codes(dtype)
    assert_blocks_equal(dtype, bits, (bits.size // 256, 256), block)


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 128), (130, 257), (3, 300), (300, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_odd_shapes_in_blocks(dtype: str, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DTYPES[dtype])
    integer = torch.int16 if x.itemsize == 2 else torch.int32
    assert_blocks_equal(dtype, x.view(integer).numpy().reshape(-1), shape, (128, 128))


def test_rows_longer_than_what_is_worked_on_at_a_time() -> None:
    shape = (3, quantize._CHUNK // 2 + 5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert_blocks_equal("BF16", x.view(torch.int16).numpy().reshape(-1), shape, (2, 100_000))


@given(st.data())
def test_any_matrix_in_any_blocks(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    block = data.draw(st.tuples(st.integers(1, 50), st.integers(1, 50)))
    width = 16 if DTYPES[dtype].itemsize == 2 else 32
    count = shape[0] * shape[1]
    drawn = np.frombuffer(
        data.draw(st.binary(min_size=count * width // 8, max_size=count * width // 8)), f"<u{width // 8}"
    )
    bits = np.where(np.isfinite(reference.floats(dtype, drawn.tobytes())), drawn, drawn.dtype.type(0))
    assert_blocks_equal(dtype, bits, shape, block)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_blocks_show_what_is_not_finite(dtype: str, bad: float) -> None:
    for position in ((0, 0), (2, 6), (4, 8)):
        x = torch.ones(5, 9, dtype=DTYPES[dtype])
        x[position] = bad
        _, _, finite = quantize.quantize_blocks(x, (2, 4))
        assert finite is False


# Rows


def assert_rows_equal(dtype: str, bits: npt.NDArray[Any], shape: tuple[int, int]) -> None:
    wanted_codes, wanted_scales = reference.quantize_rows(reference.floats(dtype, bits.tobytes()).reshape(shape))
    x = tensor_of(dtype, bits).view(shape)
    codes, scales, finite = quantize.quantize_rows(x)
    np.testing.assert_array_equal(codes.numpy().reshape(shape), wanted_codes)
    assert (scales.dtype, scales.shape, scales.tobytes()) == (np.float32, (shape[0], 1), wanted_scales.tobytes())
    assert finite is True
    in_place, _, _ = quantize.quantize_rows(x, x.view(-1).view(torch.uint8)[: x.numel()])
    np.testing.assert_array_equal(in_place.numpy().reshape(shape), wanted_codes)


@pytest.mark.parametrize("rows", [1, 256], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_in_rows(dtype: str, rows: int) -> None:
    """In rising order, so that the first rows are of subnormals, and all of one sign."""
    bits = finite_codes(dtype)
    assert_rows_equal(dtype, bits, (rows, bits.size // rows))


@pytest.mark.parametrize("amax", AMAXES, ids=str)
def test_a_row_has_the_scale_that_a_tensor_of_it_alone_would_have(amax: float) -> None:
    x = torch.zeros(3, 5)
    x[1, 2] = -amax
    _, scales, _ = quantize.quantize_rows(x)
    assert scales.tolist() == [[1.0], [float(quantize.tensor_scale(amax))], [1.0]]


@pytest.mark.parametrize("shape", [(1, 1), (300, 3), (3, quantize._CHUNK // 2 + 5), (2 * quantize._CHUNK, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_long_and_short_rows(dtype: str, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DTYPES[dtype])[: 200_000 // shape[1] + 1]
    integer = torch.int16 if x.itemsize == 2 else torch.int32
    assert_rows_equal(dtype, x.view(integer).numpy().reshape(-1), tuple(x.shape))


@given(st.data())
def test_any_matrix_in_rows(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    size = DTYPES[dtype].itemsize * shape[0] * shape[1]
    drawn = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), f"<u{DTYPES[dtype].itemsize}")
    bits = np.where(np.isfinite(reference.floats(dtype, drawn.tobytes())), drawn, drawn.dtype.type(0))
    assert_rows_equal(dtype, bits, shape)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_rows_show_what_is_not_finite(dtype: str, bad: float) -> None:
    for position in ((0, 0), (2, 6), (4, 8)):
        x = torch.ones(5, 9, dtype=DTYPES[dtype])
        x[position] = bad
        _, _, finite = quantize.quantize_rows(x)
        assert finite is False
