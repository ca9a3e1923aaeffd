"""Context parallelism: diffusers divides the tokens among ranks (`_cp_plan`), which no linear notices.

What goes wrong there without a word, in BF16 too, is kept away by a hook before each forward: its attention takes a
rank's mask for all ranks', or has NaN of it.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..converter.telling.errors import LoadError


def check_heads(config: Any, heads: int, label: str) -> None:
    """Raise LoadError where the degrees cannot divide the model's attention heads.

    config: diffusers' ContextParallelConfig. A ring divides no heads, and with `ulysses_anything` diffusers pads them.
    """
    degree = config.ulysses_degree
    missing = -heads % degree
    if missing and not (config.ulysses_anything and missing < (heads + missing) // degree):
        raise LoadError(
            f"{label} has {heads} attention heads, which ulysses_degree={degree} cannot divide; use another, or "
            "ring_degree."
        )


def watch_inputs(model: Any) -> None:
    """Check the model's inputs before each forward under context parallelism, however that was enabled."""
    if getattr(model, "_cp_plan", None) is not None:
        model.register_forward_pre_hook(_Inputs(type(model)), with_kwargs=True)


class _Inputs:
    """The hook: drops masks that mask nothing and refuses others, and inputs whose tokens cannot be divided."""

    def __init__(self, cls: Any) -> None:
        self.names = [*inspect.signature(cls.forward).parameters][1:]
        self.masks = [name for name in self.names if name.endswith("_mask")]
        self.divided = dict(_divided(cls._cp_plan))

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        config = model._parallel_config and model._parallel_config.context_parallel_config
        if config is None:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for name, (dim, dims) in self.divided.items():
            _check_tokens(name, given.get(name), dim, dims, config)
        for name in self.masks:
            if given.get(name) is not None:
                _check_mask(name, given[name])
                given[name] = None
        return (), given


def _divided(plan: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int | None]]]:
    """The inputs that a plan divides: along which dimension, of tensors of how many."""
    for inputs in plan.values():
        for name, how in inputs.items() if isinstance(inputs, Mapping) else ():
            if isinstance(name, str) and not isinstance(how, list | tuple):
                yield name, (how.split_dim, how.expected_dims)


def _check_tokens(name: str, value: Any, dim: int, dims: int | None, config: Any) -> None:
    ranks = config.ulysses_degree * config.ring_degree
    anything = config.ulysses_anything or config.ring_anything
    if isinstance(value, Tensor) and value.dim() == dims and value.shape[dim] % ranks and not anything:
        way = "ulysses" if config.ulysses_degree > 1 else "ring"
        raise ValueError(
            f"{name} has {value.shape[dim]} tokens, which {ranks} ranks cannot share equally; pass {way}_anything=True "
            "to ContextParallelConfig."
        )


def _check_mask(name: str, mask: Any) -> None:
    if not bool(mask.all()):
        raise ValueError(
            f"{name} leaves tokens out, of which diffusers' attention makes NaN or something else under context "
            "parallelism; run prompts of one length, or one at a time."
        )
