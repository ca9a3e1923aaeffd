"""How far apart two pictures are: PSNR and SSIM, and LPIPS where its package is installed.

Frames are float32 [H, W, C], 0 to 1. PSNR: 10 log10(1 / mean squared error), over all pixels and channels. SSIM: Wang,
Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity" (2004), with
its Gaussian window of 11x11 (sigma 1.5), K1 = 0.01 and K2 = 0.03, each channel alone, where the window fits whole.
LPIPS: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (2018), on AlexNet.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...converter.telling.errors import SettingsError, one_clause

Lpips = Callable[[Tensor, Tensor], float]

_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


@dataclass(frozen=True)
class Distance:
    """How far a picture is from its original. psnr: dB, infinite for identical pictures. ssim: None where a side is
    shorter than the window. lpips: None where it was not measured."""

    psnr: float
    ssim: float | None
    lpips: float | None = None

    @property
    def identical(self) -> bool:
        return math.isinf(self.psnr)


def distance(picture: Tensor, original: Tensor, lpips: Lpips | None = None) -> Distance:
    """The distance between two frames of one size, float32 [H, W, C], which must be finite."""
    return Distance(psnr(picture, original), ssim(picture, original), lpips(picture, original) if lpips else None)


def psnr(picture: Tensor, original: Tensor) -> float:
    """Decibels between two tensors of values from 0 to 1; infinite where they are equal."""
    error = float((picture.double() - original.double()).square().mean())
    return -10 * math.log10(error) if error else math.inf


def ssim(picture: Tensor, original: Tensor) -> float | None:
    """The structural similarity of two frames, at most 1; None where the window does not fit."""
    if min(picture.shape[:2]) < _WINDOW:
        return None
    a, b = picture.double().permute(2, 0, 1), original.double().permute(2, 0, 1)
    mean_a, mean_b = _smoothed(a), _smoothed(b)
    variance_a, variance_b = _smoothed(a * a) - mean_a**2, _smoothed(b * b) - mean_b**2
    covariance = _smoothed(a * b) - mean_a * mean_b
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float((luminance * structure).mean())


def _smoothed(x: Tensor) -> Tensor:
    """Means under the Gaussian window, float64 [C, H, W] -> [C, H - 10, W - 10]."""
    offsets = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).to(x.device)
    by_row = torch.nn.functional.conv2d(x[:, None], weights.view(1, 1, -1, 1))
    return torch.nn.functional.conv2d(by_row, weights.view(1, 1, 1, -1))[:, 0]


def load_lpips(device: torch.device, wanted: bool | None) -> tuple[Lpips | None, str | None]:
    """LPIPS on a device, or None and the reason why it is not measured. wanted: None is where it can be.

    Raises SettingsError where it is wanted and cannot be.
    """
    if wanted is False:
        return None, None
    network, why = _lpips_network()
    if network is not None:
        return _measuring(network.to(device), device), None
    if wanted:
        raise SettingsError(f"LPIPS cannot be measured: {why}, or drop lpips.")
    return None, f"LPIPS is not measured: {why}"


def _lpips_network() -> tuple[Any, str]:
    """The network, or None and why there is none."""
    try:
        import lpips
    except ImportError:
        return None, "it is not installed; pip install 'fp8-convert[lpips]' brings it"
    except Exception as error:  # a torchvision that was built for another torch
        return None, f"its package cannot be imported ({one_clause(error)}); install the torchvision of this torch"
    try:
        with warnings.catch_warnings(action="ignore"):  # of torchvision, about how lpips asks for AlexNet
            return lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False), ""
    except Exception as error:  # whatever a download raises
        return None, (
            f"its AlexNet cannot be had ({one_clause(error)}); let torchvision.models.alexnet(weights='DEFAULT') "
            "download it where there is a connection"
        )


def _measuring(network: Any, device: torch.device) -> Lpips:
    def measure(picture: Tensor, original: Tensor) -> float:
        a, b = (t[..., :3].permute(2, 0, 1)[None].to(device) * 2 - 1 for t in (picture, original))
        return float(network(a, b))

    return measure
