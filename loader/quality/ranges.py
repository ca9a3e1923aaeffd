"""How large a layer's inputs get: a histogram of |x|, and the range [-clip, clip] that a method chooses of it.

A bin is the first 13 bits of a float32 behind its sign: the exponent and five bits of the mantissa, 32 bins an octave.
So it covers every magnitude, counting is a shift, and a layer's histogram is 64 KiB however much it saw. Of its input a
static layer keeps codes e4m3(clamp(x / scale, -448, 448)) with scale = clip / 448.

    max         the largest magnitude: nothing saturates
    percentile  the largest but for a share of the values: the upper edge of the bin that reaches it
    mse         the clip with the least sum of (x - scale * code)^2 over the histogram
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...converter.stream.quantize import E4M3_MAX, tensor_scale
from ...converter.telling.errors import SettingsError
from ..kernels import E4M3

Method = Literal["max", "percentile", "mse"]

_SHIFT = 18  # of a float32's 31 bits behind the sign, what a bin leaves out
BINS = 1 << (31 - _SHIFT)
_WITHIN = 4  # values that stand for a bin: all that bfloat16 has in one
_OCTAVES = 8  # below the largest magnitude, that a clip is sought in: 1/256 of it would leave E4M3 no advantage


class Histogram:
    """Counts of |x| on the device that x is on, the largest |x|, and whether any is NaN or infinite."""

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        self._largest = torch.zeros((), dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Count the values of x, of any shape and float dtype."""
        magnitudes = x.detach().to(torch.float32).abs().flatten()
        if magnitudes.numel():
            self._largest = torch.maximum(self._largest, magnitudes.amax())  # NaN stays
            bins = magnitudes.view(torch.int32).bitwise_right_shift_(_SHIFT)
            self._counts += torch.bincount(bins, minlength=BINS)

    @property
    def amax(self) -> float:
        """The largest magnitude, 0 before anything was counted; NaN or infinite where a value was."""
        return float(self._largest)

    @property
    def seen(self) -> int:
        """How many values were counted."""
        return int(self._counts.sum())

    def input_scale(self, method: Method, percentile: float) -> float:
        """The static activation scale that the method chooses. `amax` must be finite."""
        clip = self.amax
        if method == "percentile":
            clip = _percentile(self._counts.cpu().numpy(), percentile, clip)
        elif method == "mse" and clip > 0:
            clip = _least_error(self._counts.cpu().numpy(), clip)
        return float(tensor_scale(clip))


def check_method(method: str, percentile: float) -> None:
    """Raise SettingsError for a method that there is not, and for no share of the values."""
    if method not in get_args(Method):
        raise SettingsError(f"method is {method!r:.80}; use one of {', '.join(get_args(Method))}.")
    if isinstance(percentile, bool) or not isinstance(percentile, int | float) or not 0 < percentile <= 100:
        raise SettingsError(f"percentile is {percentile!r:.80}; give a number above 0 and up to 100, such as 99.9.")


def _percentile(counts: npt.NDArray[np.int64], percentile: float, largest: float) -> float:
    """The upper edge of the first bin below which at least `percentile` of the values are, at most the largest."""
    reached = np.cumsum(counts)
    wanted = math.ceil(reached[-1] * percentile / 100)
    bin_ = int(np.searchsorted(reached, wanted))
    return min(float(_edges(np.array([bin_ + 1]))[0]), largest)


def _least_error(counts: npt.NDArray[np.int64], largest: float) -> float:
    """The clip, a bin's upper edge or the largest magnitude, with the least squared error."""
    used = np.flatnonzero(counts)
    offsets = (np.arange(_WITHIN, dtype=np.uint32) << np.uint32(_SHIFT)) // _WITHIN
    bits = (used[:, None].astype(np.uint32) << np.uint32(_SHIFT)) + offsets
    values = np.minimum(bits.view(np.float32), np.float32(largest)).astype(np.float64)
    weights = counts[used, None] / _WITHIN
    top = int(used[-1])
    edges = _edges(np.arange(max(1, top + 1 - (_OCTAVES << (23 - _SHIFT))), top + 1))
    clips = [float(clip) for clip in edges] + [largest]
    errors = [_squared_error(values, weights, float(tensor_scale(clip))) for clip in clips]
    return clips[len(clips) - 1 - int(np.argmin(errors[::-1]))]  # of equal ones the widest


def _squared_error(values: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], scale: float) -> float:
    scaled = torch.from_numpy(np.minimum(values / scale, E4M3_MAX).astype(np.float32))
    codes = scaled.to(E4M3).to(torch.float64).numpy()
    return float((weights * (values - scale * codes) ** 2).sum())


def _edges(bins: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The lower edges of bins."""
    return (bins.astype(np.uint32) << np.uint32(_SHIFT)).view(np.float32)
