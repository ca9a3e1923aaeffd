"""Ranges of activations, against numpy over the values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from fp8_convert.converter.telling.errors import SettingsError
from fp8_convert.loader.quality.ranges import Histogram, check_method


def histogram(*parts: torch.Tensor) -> Histogram:
    found = Histogram(parts[0].device)
    for part in parts:
        found.add(part)
    return found


def activations(seed: int = 0, outliers: int = 0) -> torch.Tensor:
    """What layers see: a bell with a few values far outside, in BF16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 256, generator=generator)
    x.view(-1)[:outliers] *= 100
    return x.to(torch.bfloat16)


def squared_error(x: torch.Tensor, scale: float) -> float:
    """Of static quantisation, by the reference in numpy."""
    values = x.float().numpy()
    codes = reference.quantize(values, np.float32(scale))
    decoded = np.array([reference.decode(c) for c in range(256)])[codes].reshape(values.shape)
    return float(((values.astype(np.float64) - decoded * scale) ** 2).sum())


def test_the_largest_is_exact_and_gives_the_scale(device: torch.device) -> None:
    x = activations(outliers=3).to(device)
    found = histogram(x[:10], x[10:], x.new_zeros(0, 256))
    assert found.amax == float(x.abs().max())
    assert found.seen == x.numel()
    assert found.input_scale("max", 99.9) == float(np.float32(found.amax) / np.float32(448))


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 100])
def test_percentile(percentile: float) -> None:
    x = activations(outliers=3)
    clip = 448 * histogram(x).input_scale("percentile", percentile)
    exact = float(np.percentile(x.float().abs().numpy(), percentile, method="inverted_cdf"))
    assert exact <= clip * (1 + 1e-6)
    assert clip <= exact * (1 + 2**-5), "no wider than a bin"
    assert clip <= float(x.abs().max()) * (1 + 1e-6)


@pytest.mark.parametrize("outliers", [0, 1, 40])
def test_mse_has_the_least_error_of_all_clips(outliers: int) -> None:
    x = activations(outliers=outliers)
    found = histogram(x).input_scale("mse", 99.9)
    largest = float(x.abs().max())
    candidates = [largest / 448 * 2 ** (-i / 24) for i in range(8 * 24)]
    best = min(squared_error(x, scale) for scale in candidates)
    assert squared_error(x, found) <= best * 1.01
    assert squared_error(x, found) <= squared_error(x, histogram(x).input_scale("max", 99.9))


def test_mse_clips_what_costs_less_than_it_spoils() -> None:
    """A block of values just beneath a code's step, and one value a little above the rest: it is given up."""
    x = torch.full((1, 4096), 1.0)
    x[0, 0] = 1.06
    assert histogram(x).input_scale("max", 99.9) == pytest.approx(1.06 / 448)
    assert histogram(x).input_scale("mse", 99.9) * 448 < 1.06


def test_zeros_get_a_scale_that_keeps_them() -> None:
    for method in ("max", "percentile", "mse"):
        assert histogram(torch.zeros(4, 4)).input_scale(method, 99.9) == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    found = histogram(torch.tensor([1.0, value, 2.0]), torch.tensor([3.0]))
    assert not np.isfinite(found.amax)


def test_magnitudes_of_all_sizes_are_counted() -> None:
    sizes = torch.tensor([0.0, 1e-45, 1e-38, 1e-10, 1.0, 3e38])
    assert histogram(sizes).seen == 6
    assert histogram(sizes).input_scale("percentile", 50) * 448 == pytest.approx(1e-38, rel=2**-5)


@pytest.mark.parametrize(
    ("method", "percentile", "message"),
    [
        ("entropy", 99.9, "method is 'entropy'; use one of max, percentile, mse."),
        ("percentile", 0, "percentile is 0; give a number above 0"),
        ("percentile", 100.1, "percentile is 100.1; give"),
        ("percentile", True, "percentile is True; give"),
    ],
)
def test_what_means_nothing(method: str, percentile: float, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{message}"):
        check_method(method, percentile)
