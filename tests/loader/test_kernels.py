"""Activation codes against float64, their corner cases, and dequantisation against the plain formula."""

import pytest
import torch

from fp8_convert.loader import kernels

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows, in float32 steps written out: divide, floor, reciprocal, multiply, clamp,
    round.
    """
    wide = x.cpu().float()
    scale = torch.maximum(wide.abs().amax(-1, keepdim=True) / 448, torch.tensor(2.0**-126))
    return (wide * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def assert_same_codes(codes: torch.Tensor, expected: torch.Tensor) -> None:
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (7, 3072), (3, 13824), (5, 100), (0, 64)], ids=str)
def test_rows_have_the_bits_of_the_formula(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).to(device, dtype)
    factor = torch.tensor(0.037, device=device)
    codes, scale = kernels.quantize_rows(x, factor)
    expected_codes, expected_scale = reference(x)
    assert_same_codes(codes, expected_codes)
    assert torch.equal(scale.cpu(), expected_scale * factor.cpu())
    assert scale.shape == (shape[0], 1)


@pytest.mark.parametrize("width", [128, 384, 200, 5])
@pytest.mark.parametrize("rows", [1, 33, 0])
def test_groups_have_the_bits_of_the_formula(device: torch.device, width: int, rows: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)
    codes, scale = kernels.quantize_groups(x)
    groups = -(-width // 128)
    assert scale.shape == (rows, groups)
    if rows > 1:
        assert scale.stride() == (1, rows)
    for group in range(groups):
        columns = slice(128 * group, 128 * group + 128)
        expected_codes, expected_scale = reference(x[:, columns])
        assert_same_codes(codes[:, columns], expected_codes)
        assert torch.equal(scale[:, group : group + 1].cpu(), expected_scale)


def test_rows_of_zeros_stay_zero_and_finite(device: torch.device) -> None:
    x = torch.zeros(4, 256, dtype=torch.bfloat16, device=device)
    for codes, scale in (kernels.quantize_rows(x, torch.ones((), device=device)), kernels.quantize_groups(x)):
        assert codes.float().eq(0).all()
        assert scale.isfinite().all()
        assert scale.gt(0).all()


def test_outlier_keeps_its_own_row_only(device: torch.device) -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(3)).to(device, torch.bfloat16)
    alone, _ = kernels.quantize_rows(x, torch.ones((), device=device))
    x[1, 7] = 6.6e4
    codes, scale = kernels.quantize_rows(x, torch.ones((), device=device))
    assert torch.equal(codes[[0, 2]].view(torch.uint8), alone[[0, 2]].view(torch.uint8))
    assert codes[1, 7].float() == 448
    assert abs(448 * float(scale[1]) / float(x[1, 7]) - 1) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_values_poison_their_row_and_no_other(device: torch.device, bad: float) -> None:
    x = torch.ones(3, 256, dtype=torch.bfloat16, device=device)
    x[1, 7] = bad
    codes, scale = kernels.quantize_rows(x, torch.ones((), device=device))
    rows = (codes.float() * scale).sum(-1)
    assert rows[1].isnan()
    assert rows[[0, 2]].isfinite().all()


def test_strided_rows_equal_contiguous_ones(device: torch.device) -> None:
    x = torch.randn(6, 512, generator=torch.Generator().manual_seed(4)).to(device, torch.bfloat16)
    one = torch.ones((), device=device)
    for view in (x[:, 128:384], x[::2, :256], x.t()[:, :6]):
        codes, scale = kernels.quantize_rows(view, one)
        again, scale_again = kernels.quantize_rows(view.contiguous(), one)
        assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8))
        assert torch.equal(scale, scale_again)


def test_static_codes_saturate(device: torch.device) -> None:
    x = torch.tensor([[-1e4, -1.0, 0.0, 0.3, 1e4]], dtype=torch.bfloat16, device=device)
    scale = torch.tensor(0.01, device=device)
    codes = kernels.quantize_static(x, scale)
    wide = (x.cpu().float() * (1 / scale.cpu())).clamp(-448, 448)
    assert_same_codes(codes, wide.to(torch.float8_e4m3fn))
    assert codes.float().abs().max() == 448


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((48, 80), None),
        ((48, 80), "channel"),
        ((5, 3000), "channel"),
        ((3000, 400), "channel"),
        ((1, 7), "channel"),
        ((8, 4, 3, 3), None),
        ((300, 200), (128, 128)),
        ((256, 384), (128, 128)),
        ((5, 9), (2, 4)),
    ],
    ids=str,
)
def test_every_code_dequantises_with_one_rounding(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], block: tuple[int, int] | str | None
) -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x80  # NaN has two codes, which no conversion writes; -0.0 instead
    if block is None:
        scale = torch.tensor(0.0173)
        full = scale
    elif block == "channel":
        block = None
        scale = full = torch.rand(shape[0], 1, generator=generator) + 0.01
    else:
        (n, k), (bn, bk) = shape, block
        scale = torch.rand(-(-n // bn), -(-k // bk), generator=generator) + 0.01
        full = scale.repeat_interleave(bn, 0).repeat_interleave(bk, 1)[:n, :k]
    fp8 = codes.view(torch.float8_e4m3fn)
    expected = (fp8.float() * full).to(dtype)
    for _ in range(2):  # on CUDA the second call launches what the first one compiled
        weight = kernels.dequantize(fp8.to(device), scale.to(device), dtype, block)
        assert weight.dtype == dtype
        assert torch.equal(weight.cpu().float(), expected.float())
        assert torch.equal(weight.cpu().signbit(), expected.signbit())
