"""Distances of pictures against formulas written once more in numpy, and against what scikit-image gives."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from fp8_convert.converter.telling.errors import SettingsError
from fp8_convert.loader.quality.pictures import distance, load_lpips, psnr, ssim

CPU = torch.device("cpu")


def pair(height: int, width: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Waves, and the same with noise, float32."""
    rng = np.random.default_rng(height)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([0.5 + 0.4 * np.sin(x / (3 + k) + y / (5 + k)) for k in range(channels)], -1)
    noised = np.clip(waves + rng.normal(0, 0.05, waves.shape), 0, 1)
    return waves.astype(np.float32), noised.astype(np.float32)


def ssim_in_numpy(a: np.ndarray, b: np.ndarray) -> float:
    """The paper's formula at every place of the window, one after the other."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for channel in range(a.shape[2]):
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                x, y = (p[top : top + 11, left : left + 11, channel].astype(np.float64) for p in (a, b))
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                found.append(
                    (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
                )  # fmt: skip
    return float(np.mean(found))


# scikit-image 0.26: structural_similarity(…, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
# data_range=1, channel_axis=-1) and peak_signal_noise_ratio(…, data_range=1), both in float64.
GOLDEN = {
    (32, 40, 3): (0.8885766513850744, 25.979815205819218),
    (11, 11, 1): (0.973076796581631, 26.47653860787028),
    (24, 16, 4): (0.8944938942330254, 26.079989913182548),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_against_numpy_and_scikit_image(size: tuple[int, int, int]) -> None:
    a, b = pair(*size)
    found = distance(torch.from_numpy(b), torch.from_numpy(a))
    assert found.ssim == pytest.approx(GOLDEN[size][0], abs=1e-9)
    assert found.ssim == pytest.approx(ssim_in_numpy(a, b), abs=1e-9)
    assert found.psnr == pytest.approx(GOLDEN[size][1], abs=1e-9)
    assert found.psnr == pytest.approx(10 * np.log10(1 / np.mean((a.astype(np.float64) - b) ** 2)), abs=1e-9)
    assert found.lpips is None


def test_a_difference_of_a_tenth_is_twenty_decibels() -> None:
    assert psnr(torch.full((4, 4, 3), 0.6), torch.full((4, 4, 3), 0.5)) == pytest.approx(20, abs=1e-5)


def test_identical_pictures() -> None:
    picture = torch.rand(16, 16, 3)
    found = distance(picture, picture.clone())
    assert (found.psnr, found.ssim, found.identical) == (math.inf, pytest.approx(1), True)


def test_a_picture_smaller_than_the_window_has_no_ssim() -> None:
    assert ssim(torch.rand(10, 64, 3), torch.rand(10, 64, 3)) is None


def test_lpips_is_measured_by_what_is_given() -> None:
    picture = torch.rand(16, 16, 3)
    assert distance(picture, picture, lambda a, b: 0.25).lpips == 0.25


def test_lpips_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert load_lpips(CPU, False) == (None, None)
    found, why = load_lpips(CPU, None)
    assert found is None
    assert why is not None
    assert "pip install 'fp8-convert[lpips]'" in why
    with pytest.raises(SettingsError, match="LPIPS cannot be measured: it is not installed"):
        load_lpips(CPU, True)
