"""The range of every W8A8 layer's inputs over a run of the original pipeline, and the static scale that it gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ...converter.plan.static import refuse_static
from ...converter.stream.quantize import E4M3_MAX
from ...converter.telling.errors import ConvertError
from ...converter.telling.notebook import Brief
from ...converter.telling.progress import Progress
from ...converter.telling.quantities import plural
from .original import Layer, Original
from .ranges import Histogram, Method
from .running import Case, Sampling, generate

_NAMED = 5  # of the layers that never ran


@dataclass(frozen=True, repr=False)
class LayerRange(Brief):
    """The inputs of one layer. largest: max|x|. scale: the static one, clip: 448 of it. values: how many were seen."""

    component: str
    name: str
    largest: float
    scale: float
    values: int

    @property
    def clip(self) -> float:
        """What larger magnitudes saturate to."""
        return self.scale * E4M3_MAX


def measure_ranges(
    original: Original, runs: Sequence[Case], sampling: Sampling, progress: Progress
) -> dict[Layer, Histogram]:
    """The histogram of every W8A8 layer's inputs over the runs.

    Raises ConvertError where static activations do not go with the plan, for a layer that never ran, and for one that
    was given NaN or Inf.
    """
    layers = original.w8a8_layers()
    for layer in layers:
        refuse_static(layer.tensor, original.plan.recipe)
    histograms = {layer: Histogram(layer.module.weight.device) for layer in layers}
    with _listening(histograms):
        for case in runs:
            generate(original.pipe, case, sampling)
            progress.advance(1)
    if silent := [layer for layer, histogram in histograms.items() if not histogram.seen]:
        raise _never_ran(silent, len(layers))
    if broken := [layer for layer, histogram in histograms.items() if not math.isfinite(histogram.amax)]:
        raise ConvertError(
            f"The inputs of {plural(len(broken), 'layer')} hold NaN or Inf, such as those of {broken[0].label}; "
            "see that the original makes pictures, in --dtype bfloat16 or float32."
        )
    return histograms


def chosen_ranges(histograms: Mapping[Layer, Histogram], method: Method, percentile: float) -> tuple[LayerRange, ...]:
    """The scale that the method chooses for every layer; a fusion group shares its largest, as conversion has it."""
    scales = {layer: histogram.input_scale(method, percentile) for layer, histogram in histograms.items()}
    shared: dict[tuple[str, str], float] = {}
    for layer, scale in scales.items():
        shared[layer.domain] = max(scale, shared.get(layer.domain, 0.0))
    return tuple(
        LayerRange(layer.component, layer.name, histogram.amax, shared[layer.domain], histogram.seen)
        for layer, histogram in histograms.items()
    )


@contextmanager
def _listening(histograms: Mapping[Layer, Histogram]) -> Iterator[None]:
    """Count what every layer is given."""

    def hear(histogram: Histogram, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        histogram.add(inputs[0])

    handles = [layer.module.register_forward_pre_hook(partial(hear, h)) for layer, h in histograms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _never_ran(silent: Sequence[Layer], count: int) -> ConvertError:
    """A conversion would miss their scales, and one that is made up would be wrong where they do run."""
    components = sorted({layer.component for layer in silent})
    names = ", ".join(layer.label for layer in silent[:_NAMED]) + (", …" if len(silent) > _NAMED else "")
    return ConvertError(
        f"{len(silent)} of {plural(count, 'layer')} never ran and have no range ({names}): {' and '.join(components)} "
        "may have no step of its own with so few; raise --steps, or keep them with --ignored-layers or --component."
    )
