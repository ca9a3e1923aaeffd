"""Which layers hold other weights than rounding the original's gives: an FP8 snapshot's files against its original's.

Every tensor is read from both, piece by piece; no pipeline is built. For an FP8 weight with codes q and scales s:

    sqnr     = 10 log10(sum w^2 / sum (w - s q)^2)    what is on disk
    rounding = the same with w / s rounded to the nearest code: the best that these scales allow

Sums are in float64. Codes that another rounding chose (stochastic, error-compensating) are a little below `rounding`; a
wrong scale and damaged codes are far below it. A scale that is too coarse shows in `rounding` itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...converter.format import layout
from ...converter.format.header import TensorInfo
from ...converter.format.layout import WeightFormat
from ...converter.snapshot.files import LocalFiles
from ...converter.snapshot.snapshot import Component, Snapshot
from ...converter.stream.dequantize import dequantize
from ...converter.stream.quantize import E4M3_MAX, TORCH_DTYPES
from ...converter.stream.reading import open_for_reading, read_exactly
from ...converter.telling.progress import Progress
from ..checkpoint import fp8_modules

COARSE_DB = 20.0  # E4M3 gives 31 to 32 dB where its scale fits
MARGIN_DB = 4.0  # below rounding to nearest: stochastic rounding has twice its squared error, which is 3.0 dB
_ONE = 0x38  # the code of 1.0
_PIECE = 4 * 1024 * 1024  # elements


@dataclass(frozen=True)
class LayerError:
    """The error of one layer's weight, or of another tensor that is not as in the original.

    sqnr, rounding: dB, infinite where nothing differs, NaN where something is no number. mode, scheme: None for what
    is not FP8. problem: what is wrong with it, as a clause.
    """

    component: str
    name: str
    mode: str | None
    scheme: str | None
    params: int
    sqnr: float
    rounding: float
    problem: str | None = None

    @property
    def label(self) -> str:
        return f"{self.component}.{self.name}" if self.component else self.name

    @property
    def coarse(self) -> bool:
        """Whether its scale is too coarse for it, although it is rounded right."""
        return self.problem is None and self.sqnr < COARSE_DB

    def to_json(self) -> dict[str, Any]:
        """For scripts; what is infinite or no number is null."""
        finite = {key: round(v, 3) if math.isfinite(v := getattr(self, key)) else None for key in ("sqnr", "rounding")}
        return {**asdict(self), **finite, "identical": self.sqnr == math.inf}


@dataclass(frozen=True)
class _Place:
    """A tensor, and the open file that it is in."""

    tensor: TensorInfo
    fd: int
    data_start: int
    where: str

    def bytes(self, first: int, last: int) -> Tensor:
        """The bytes [first, last), uint8."""
        raw = torch.empty(last - first, dtype=torch.uint8)
        read_exactly(self.fd, memoryview(raw.numpy().data), self.data_start + self.tensor.start + first, self.where)
        return raw

    def elements(self, first: int, last: int) -> Tensor:
        """The elements [first, last): floats in their dtype, codes as uint8."""
        size = self.tensor.itemsize
        return self.bytes(first * size, last * size).view(TORCH_DTYPES.get(self.tensor.dtype, torch.uint8))


Places = Mapping[str, _Place]


def weight_errors(
    fp8: tuple[Snapshot, LocalFiles],
    original: tuple[Snapshot, LocalFiles],
    device: torch.device,
    progress: Progress,
) -> tuple[LayerError, ...]:
    """The errors of every FP8 weight, and of every other tensor that is not the original's, in the snapshot's order.

    Both snapshots have the same tensors but for scales (`alike.check_alike`). device: where the arithmetic runs.
    Raises ConvertError for files that cannot be read, LoadError for FP8 weights that lack a scale.
    """
    snapshot, files = fp8
    theirs = {component.name: component for component in original[0].components}
    progress.start(sum(shard.size for component in snapshot.components for shard in component.shards))
    found: list[LayerError] = []
    for component in snapshot.components:
        with ExitStack() as opened:
            mine = _places(component, files, opened)
            source = _places(theirs[component.name], original[1], opened)
            found += _component_errors(component, mine, source, device, progress)
    progress.close()
    return tuple(found)


def _places(component: Component, files: LocalFiles, opened: ExitStack) -> Places:
    places: dict[str, _Place] = {}
    for shard in component.shards:
        fd = open_for_reading(files.open(shard.path).path, shard.path)
        opened.callback(os.close, fd)
        places |= {t.name: _Place(t, fd, shard.header.data_start, shard.path) for t in shard.header.tensors}
    return places


def _component_errors(
    component: Component, mine: Places, source: Places, device: torch.device, progress: Progress
) -> Iterator[LayerError]:
    formats = fp8_modules(component).modules
    scales = {module + suffix for module in formats for suffix in layout.SCALE_SUFFIXES}
    for name, place in mine.items():
        module = name.removesuffix(layout.WEIGHT)
        if name.endswith(layout.WEIGHT) and module in formats:
            how = formats[module]
            yield _fp8_error(component.name, module, how, (place, mine[how.scale_key(module)], source[name]), device)
        elif name not in scales and (error := _kept_error(component.name, module, place, source[name])) is not None:
            yield error
        progress.advance(place.tensor.nbytes)


def _fp8_error(
    component: str, module: str, how: WeightFormat, places: tuple[_Place, _Place, _Place], device: torch.device
) -> LayerError:
    """The error of an FP8 weight from its codes, its scales and the original's weight."""
    power = error = together = own = best = 0.0  # the sums of w², (w - s q)², w s q, (s q)², and of rounding's error²
    for codes, scale, weights in _pieces(how, *places, device):
        w, held = weights.double(), dequantize(codes, scale, how.block, "F32").double()
        power += float(w.square().sum())
        error += float((w - held).square().sum())
        together += float((w * held).sum())
        own += float(held.square().sum())
        nearest = dequantize(_rounded(weights, codes, scale, how), scale, how.block, "F32").double()
        best += float((w - nearest).square().sum())
    sqnr, rounding = _decibels(power, error), _decibels(power, best)
    gain = together / own if own else math.nan  # what its weights would have to be multiplied by to fit best
    fitted = _decibels(power, power - gain * together)
    problem = _problem(sqnr, rounding, gain, fitted)
    return LayerError(component, module, how.mode, how.scheme, places[0].tensor.numel, sqnr, rounding, problem)


def _pieces(
    how: WeightFormat, weight: _Place, scale: _Place, source: _Place, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Codes, their scales and the original's weights (float32), a few rows of blocks at a time."""
    width, across = (1, 1) if how.per_tensor else (weight.tensor.shape[1], scale.tensor.shape[1])
    height = how.block[0] if how.block else 1
    rows = weight.tensor.numel // max(1, width)
    step = max(1, _PIECE // max(1, width * height)) * height
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        covering = (0, 1) if how.per_tensor else (top // height * across, -(-bottom // height) * across)
        codes, weights = (place.elements(top * width, bottom * width).to(device) for place in (weight, source))
        scales = scale.elements(*covering).to(device)
        if not how.per_tensor:
            codes, scales, weights = codes.view(-1, width), scales.view(-1, across), weights.view(-1, width)
        yield codes, scales, weights.float()


def _rounded(weights: Tensor, codes: Tensor, scale: Tensor, how: WeightFormat) -> Tensor:
    """The nearest codes of weights under the scales, uint8."""
    each = dequantize(torch.full_like(codes, _ONE), scale, how.block, "F32")
    return (weights * (1 / each)).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _problem(sqnr: float, rounding: float, gain: float, fitted: float) -> str | None:
    """What is wrong with an FP8 weight. fitted: its SQNR once it is multiplied by `gain`."""
    if math.isnan(sqnr):
        return "holds NaN or Inf, in its codes, its scale or the original"
    if sqnr > rounding - MARGIN_DB:
        return None
    found = f"is not the original's weight rounded: {sqnr:.1f} dB, and rounding gives {rounding:.1f} dB"
    if abs(gain - 1) > 0.02 and fitted > rounding - MARGIN_DB:
        return f"{found}; its scale is {1 / gain:.3g} times the one that fits"
    return found


def _kept_error(component: str, name: str, mine: _Place, source: _Place) -> LayerError | None:
    """The error of a tensor that is not FP8, None where its bytes are the original's."""
    count, dtype = mine.tensor.numel, mine.tensor.dtype
    if dtype == source.tensor.dtype and all(
        torch.equal(mine.bytes(first, last), source.bytes(first, last)) for first, last in _cut(mine.tensor.nbytes)
    ):
        return None
    if not {dtype, source.tensor.dtype} <= TORCH_DTYPES.keys():
        return LayerError(component, name, None, None, count, math.nan, math.inf, "is kept, and is not the original's")
    power = error = 0.0
    for first, last in _cut(count):
        a, b = mine.elements(first, last).double(), source.elements(first, last).double()
        power += float(b.square().sum())
        error += float((a - b).square().sum())
    sqnr = _decibels(power, error)
    about = f"{sqnr:.1f} dB" if dtype == source.tensor.dtype else f"{dtype} instead of {source.tensor.dtype}"
    return LayerError(
        component, name, None, None, count, sqnr, math.inf, f"is kept, and is not the original's: {about}"
    )


def _cut(count: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + _PIECE, count)) for first in range(0, count, _PIECE))


def _decibels(power: float, error: float) -> float:
    if not (math.isfinite(power) and math.isfinite(error)):
        return math.nan
    if error <= 0:
        return math.inf
    return 10 * math.log10(power / error) if power else -math.inf
