"""`high_precision_steps`: the W8A8 linears dequantise in the first and last denoising steps of each run.

The step is known from what diffusers' pipelines tell everyone: they set `_num_timesteps` before their loop, and call
`callback_on_step_end` after each step, whatever the scheduler, the number of DiTs and of their calls in a step; a few
have no callback and set `_current_timestep` instead. So the pipeline becomes an instance of a subclass of its own
class, of the same name, which listens to them and passes the user's callback on. Between runs, and after one that
raised, every layer is back at its FP8 product.

What is switched is an attribute of each layer (`W8A8LinearMixin.high_precision`): compiled code guards on it, so a
block has two graphs, one for either kind of step, whatever the number of steps.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from .linear import W8A8LinearMixin

logger = logging.getLogger(__name__)

_CALLBACK = "callback_on_step_end"
_TENSORS = "callback_on_step_end_tensor_inputs"


@dataclass
class HighPrecisionSteps:
    """How many steps at either end of a run are of high precision.

    ran: of the last run, how many steps were so, and how many there were. said: the numbers of steps for which it was
    said that there are no others.
    """

    first: int
    last: int
    ran: tuple[int, int] | None = None
    said: set[int] = field(default_factory=set)

    def holds(self, step: int, steps: int) -> bool:
        """Whether `step` (from 0) of `steps` is of high precision."""
        return step < self.first or step >= steps - self.last

    def __str__(self) -> str:
        ran = "" if self.ran is None else f" ({self.ran[0]} of {self.ran[1]} in the last run)"
        return f"dequantise in the first {self.first} and the last {self.last} steps of a run{ran}"


class _Run:
    """One call of a pipeline: the layers, switched to what the step that it is at wants."""

    def __init__(self, pipe: Any, policy: HighPrecisionSteps) -> None:
        self._policy = policy
        self._layers = w8a8_layers(pipe)
        self._steps = self._step = self._done = self._dequantised = 0

    def begin(self, steps: int) -> None:
        """A loop of `steps` steps is about to begin."""
        policy = self._policy
        self._steps = steps
        if steps <= policy.first + policy.last and steps not in policy.said:
            policy.said.add(steps)
            logger.warning(
                "high_precision_steps=(%d, %d) covers all %d steps: no W8A8 linear runs in FP8",
                policy.first,
                policy.last,
                steps,
            )
        self._enter(0)

    def end_step(self) -> None:
        """A step of the loop is over; after the last one another loop of as many may follow."""
        if not self._steps:
            raise RuntimeError("The pipeline does not say how many steps it takes; leave high_precision_steps out.")
        self._done += 1
        self._dequantised += self._policy.holds(self._step, self._steps)
        self._policy.ran = self._dequantised, self._done
        self._enter((self._step + 1) % self._steps)

    def finish(self) -> None:
        """Leave no layer in high precision, however the run ended."""
        self._switch(False)

    def _enter(self, step: int) -> None:
        self._step = step
        self._switch(self._policy.holds(step, self._steps))

    def _switch(self, high_precision: bool) -> None:
        for layer in self._layers:
            if layer.high_precision is not high_precision:
                layer.high_precision = high_precision


def check_steps(steps: Any, pipeline: type | None = None) -> tuple[int, int] | None:
    """`high_precision_steps` as a pair of counts; None where it asks for nothing.

    Raises ValueError for what is no such pair, and where a pipeline of the class `pipeline` does not tell its steps.
    """
    if steps is None:
        return None
    pair = tuple(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else ()
    if len(pair) != 2 or any(type(count) is not int or count < 0 for count in pair):
        raise ValueError(
            f"high_precision_steps is {steps!r:.80}; give two counts from 0 up, of the first and the last steps, such "
            "as (1, 1)."
        )
    if not any(pair):
        return None
    if pipeline is not None and not _tells_steps(pipeline):
        raise ValueError(
            f"{pipeline.__name__} does not tell which step it is at, so high_precision_steps cannot be kept; leave it "
            "out."
        )
    return cast(tuple[int, int], pair)


def set_high_precision_steps(pipe: Any, steps: Sequence[int] | None) -> None:
    """Let the W8A8 linears of `pipe` dequantise in the first and last denoising steps: `steps` is (first, last).

    Changes the pipeline in place, from its next call on; None or (0, 0) lets every step run in FP8. `load_pipeline`
    does the same with its `high_precision_steps`. Raises ValueError for counts that mean nothing, a pipeline without
    W8A8 linears, and one that does not tell its steps.
    """
    plain: type = getattr(type(pipe), "plain_class", type(pipe))
    pair = check_steps(steps, plain)
    if pair is None:
        pipe.__class__ = plain
        vars(pipe).pop("_high_precision_steps", None)
        return
    if not w8a8_layers(pipe):
        raise ValueError(
            f"{plain.__name__} has no W8A8 linears, so high_precision_steps={pair} would change nothing; leave it out."
        )
    pipe.__class__ = _following(plain)
    pipe._high_precision_steps = HighPrecisionSteps(*pair)


def high_precision_steps_of(pipe: Any) -> HighPrecisionSteps | None:
    """What is set for a pipeline, None where nothing is."""
    found = getattr(pipe, "__dict__", {}).get("_high_precision_steps")
    return found if isinstance(found, HighPrecisionSteps) else None


def w8a8_layers(pipe: Any) -> list[W8A8LinearMixin]:
    """The W8A8 linears of a pipeline's components as they are now, each once."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return list(dict.fromkeys(m for model in models for m in model.modules() if isinstance(m, W8A8LinearMixin)))


def _tells_steps(pipeline: type) -> bool:
    return hasattr(pipeline, "num_timesteps") and (_calls_back(pipeline) or hasattr(pipeline, "current_timestep"))


def _calls_back(pipeline: type) -> bool:
    return _CALLBACK in inspect.signature(pipeline.__call__).parameters


@functools.cache
def _following(plain: Any) -> Any:
    """The subclass of a pipeline's class that follows its steps. It has the same name, which save_pretrained writes."""
    fields: dict[str, Any] = {
        "plain_class": plain,
        "__call__": _call(plain),
        "_num_timesteps": property(lambda pipe: vars(pipe).get("_num_timesteps"), _begin),
        # The class exists in no module, so pickle is told how to make it again.
        "__reduce_ex__": lambda pipe, protocol: (_rebuild, (plain,), pipe.__dict__.copy()),
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
    }
    if not _calls_back(plain):
        fields["_current_timestep"] = property(lambda pipe: vars(pipe).get("_current_timestep"), _at)
    return type(plain.__name__, (plain,), fields)


def _rebuild(plain: type) -> Any:
    made = _following(plain)
    return made.__new__(made)


def _call(plain: Any) -> Callable[..., Any]:
    signature = inspect.signature(plain.__call__)

    @functools.wraps(plain.__call__)
    def call(pipe: Any, *args: Any, **options: Any) -> Any:
        given = signature.bind(pipe, *args, **options)
        run = _Run(pipe, pipe._high_precision_steps)
        if _CALLBACK in signature.parameters:
            _listen(run, given.arguments)
        vars(pipe).update(_run=run, _current_timestep=None)
        try:
            return plain.__call__(*given.args, **given.kwargs)
        finally:
            vars(pipe).pop("_run", None)
            run.finish()

    return call


def _begin(pipe: Any, steps: int) -> None:
    """What `pipe._num_timesteps = steps` does: each pipeline says so right before its loop."""
    vars(pipe)["_num_timesteps"] = steps
    run = vars(pipe).get("_run")
    if run is not None:
        run.begin(steps)


def _at(pipe: Any, timestep: Any) -> None:
    """What `pipe._current_timestep = timestep` does, as each step begins and, with None, after the last one."""
    before = vars(pipe).get("_current_timestep")
    vars(pipe)["_current_timestep"] = timestep
    run = vars(pipe).get("_run")
    if run is not None and before is not None:
        run.end_step()


def _listen(run: _Run, arguments: dict[str, Any]) -> None:
    """Put `run` behind the caller's own callback, or in its place where there is none."""
    theirs: Any = arguments.get(_CALLBACK)
    if hasattr(theirs, "tensor_inputs"):  # a PipelineCallback, whose class pipelines ask for
        arguments[_TENSORS] = theirs.tensor_inputs

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        out = {} if theirs is None else theirs(pipe, step, timestep, tensors)
        run.end_step()
        return cast(dict[str, Any], out)

    arguments[_CALLBACK] = callback
