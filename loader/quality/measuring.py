"""One run of the original pipeline that listens to its FP8 layers, and what is measured of its models afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any

from torch import Tensor

from ...converter.telling.errors import ConvertError
from ...converter.telling.progress import Progress
from .influence import Calls, OutputError
from .layer_errors import Listener
from .original import Layer, Original
from .running import Case, Sampling, generate
from .simulation import PlannedWeights, Weights

_CALLBACK = "callback_on_step_end"


@dataclass(frozen=True)
class Run:
    """What the original pipeline did. layers: those that ran. silent: those that did not. frames: by case.

    own: errors of their own outputs. models: compares the outputs of each component.
    """

    original: Original
    weights: Weights
    layers: tuple[Layer, ...]
    silent: tuple[Layer, ...]
    own: Listener
    models: Mapping[str, OutputError]
    frames: tuple[Tensor, ...]

    def output_errors(self, layers: Sequence[Layer], weights: Weights | None) -> dict[str, float]:
        """The output error of each component that ran, with these layers in FP8 (`OutputError.of`)."""
        return {
            component: model.of([layer for layer in layers if layer.component == component], weights)
            for component, model in self.models.items()
        }

    @cached_property
    def plain(self) -> dict[str, float]:
        """With all layers in FP8, less what is rounding."""
        return without_rounding(self.output_errors(self.layers, self.weights), self.rounding)

    @cached_property
    def rounding(self) -> dict[str, float]:
        """Of computing the layers in float32: next to nothing for a pipeline in float32."""
        return self.output_errors(self.layers, None)


def run_original(
    original: Original,
    layers: Sequence[Layer],
    weights: Weights,
    expected: PlannedWeights | None,
    cases: Sequence[Case],
    sampling: Sampling,
    progress: Progress,
) -> Run:
    """Run every case once. expected: weights to compare those of `weights` with.

    Raises ConvertError where no layer ran, and for a model that gives NaN or Inf.
    """
    listener = Listener(weights, expected)
    calls = {name: Calls(getattr(original.pipe, name)) for name in dict.fromkeys(layer.component for layer in layers)}
    sampling = _telling_steps(original.pipe, sampling, listener)
    frames = []
    with ExitStack() as hooks:
        hooks.enter_context(listener.on(layers))
        for kept in calls.values():
            hooks.enter_context(kept.kept_while())
        for case in cases:
            listener.step = 0
            frames.append(generate(original.pipe, case, sampling).frames)
            progress.advance(1)
    ran = listener.sums.keys()
    if not ran:
        raise ConvertError("No FP8 layer ran, so that nothing is known of them; raise --steps.")
    device = original.pipe.device
    models = {name: OutputError(kept, device) for name, kept in calls.items() if kept.kept}
    for name, model in models.items():
        if not math.isfinite(model.energy):
            raise ConvertError(f"The original's {name} gives NaN or Inf; run it with --dtype float32 or bfloat16.")
    return Run(
        original,
        weights,
        tuple(layer for layer in layers if layer in ran),
        tuple(layer for layer in layers if layer not in ran),
        listener,
        models,
        tuple(frames),
    )


def without_rounding(errors: Mapping[str, float], rounding: Mapping[str, float]) -> dict[str, float]:
    """Errors of components less those that are there without FP8."""
    return {component: max(0.0, error - rounding[component]) for component, error in errors.items()}


def _telling_steps(pipe: Any, sampling: Sampling, listener: Listener) -> Sampling:
    """The same sampling, by which the listener learns of each step; without it all steps count as the first."""
    if _CALLBACK not in signature(pipe.__call__).parameters or _CALLBACK in sampling.extra:
        return sampling

    def told(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        listener.step = step + 1
        return values

    return replace(sampling, extra={**sampling.extra, _CALLBACK: told})
