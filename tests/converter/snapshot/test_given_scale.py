"""Scales of every dtype and shape become float32 ones of ours with the same values, or are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fp8_convert.converter import ConvertError
from fp8_convert.converter.format.header import TensorInfo
from fp8_convert.converter.snapshot.given_scale import GivenScale, as_float32, fitted


def info(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, "F32", shape, 0, 0)


@pytest.mark.parametrize("value", [1.0, 0.0123, 2.0**-126, 3e38, 2.0**-149])
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16), ("F8_E8M0", torch.float8_e8m0fnu)],
)
def test_values_are_those_of_torch(dtype: str, stored: torch.dtype, value: float) -> None:
    tensor = torch.tensor([value, 0.5]).to(stored)
    expected = tensor.float()
    if not bool((expected.isfinite() & (expected > 0)).all()):
        pytest.skip("the dtype has no such number")
    data = tensor.view(torch.uint8).numpy().tobytes()
    assert np.array_equal(as_float32(dtype, data, "x.weight_scale", "here"), expected.numpy())


def test_doubles_that_are_floats() -> None:
    assert as_float32("F64", np.array([0.25]).tobytes(), "x", "here") == np.float32(0.25)
    for value in (0.1, 1e300):
        with pytest.raises(ConvertError, match=r"x\.scale in here has values that float32 cannot hold"):
            as_float32("F64", np.array([value]).tobytes(), "x.scale", "here")


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("F32", np.float32(0).tobytes()),
        ("F32", np.float32(-1).tobytes()),
        ("F32", np.float32("nan").tobytes()),
        ("F32", np.float32("inf").tobytes()),
        ("F8_E8M0", b"\xff"),
    ],
)
def test_what_is_no_scale(dtype: str, data: bytes) -> None:
    with pytest.raises(ConvertError, match="not finite and positive"):
        as_float32(dtype, data, "x.weight_scale", "here")


VALUES = np.arange(1, 13, dtype=np.float32)


@pytest.mark.parametrize(
    ("scale", "weight", "block", "shape", "scheme"),
    [
        ((), (6, 8), None, (), None),
        ((1,), (6, 8), None, (), None),
        ((1, 1), (6, 8), None, (), None),
        ((1,), (6, 8, 3, 3), None, (), None),
        ((6,), (6, 8), None, (6, 1), None),
        ((6, 1), (6, 8), None, (6, 1), None),
        ((2, 3), (200, 300), None, (2, 3), (128, 128)),
        ((2, 3), (100, 300), (64, 128), (2, 3), (64, 128)),
        ((2, 1), (200, 100), None, (2, 1), (128, 128)),
    ],
)
def test_shapes(
    scale: tuple[int, ...],
    weight: tuple[int, ...],
    block: tuple[int, int] | None,
    shape: tuple[int, ...],
    scheme: tuple[int, int] | None,
) -> None:
    found = fitted(VALUES[: int(np.prod(scale))], info("s", *scale), info("w", *weight), block, "here")
    assert (found.values.shape, found.block, found.channel) == (shape, scheme, shape == (6, 1))


@pytest.mark.parametrize(
    ("scale", "weight", "block"),
    [
        ((8,), (6, 8), None),
        ((6,), (6, 8, 3, 3), None),
        ((2, 2), (200, 300), None),
        ((2, 3), (200, 300), (64, 128)),
        ((1, 6), (6, 8), None),
    ],
)
def test_shapes_that_mean_nothing(
    scale: tuple[int, ...], weight: tuple[int, ...], block: tuple[int, int] | None
) -> None:
    with pytest.raises(ConvertError, match="this layout cannot be imported"):
        fitted(VALUES[: int(np.prod(scale))], info("s", *scale), info("w", *weight), block, "here")


def test_parts_of_a_fused_weight() -> None:
    rows = GivenScale(VALUES.reshape(12, 1))
    assert [rows.part(n, 3, 12).values[0, 0] for n in range(3)] == [1, 5, 9]
    grid = GivenScale(VALUES.reshape(6, 2), (128, 128))
    assert grid.part(1, 3, 768).values.tolist() == [[5, 6], [7, 8]]
    assert GivenScale(VALUES[0].reshape(())).part(2, 3, 12).values == 1
    with pytest.raises(ValueError, match="would cut its blocks"):
        GivenScale(VALUES.reshape(6, 2), (128, 128)).part(0, 3, 700)
