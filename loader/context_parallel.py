"""Context parallelism: diffusers divides the tokens among ranks (`_cp_plan`), which no linear notices.

What goes wrong there without a word, in BF16 too, is kept away by a hook before each forward: its attention takes a
rank's mask for all ranks', or has NaN of it.
"""

import inspect
from typing import Any

from torch import Tensor

from ..converter.telling.errors import LoadError

# Arguments that say which tokens attention sees, and how much. Other masks of diffusers' models are no such.
_MASKS = (
    "encoder_hidden_states_mask", "encoder_attention_mask", "audio_encoder_attention_mask", "video_self_attention_mask",
)  # fmt: skip
# Inputs that a plan divides at the first block, and that come to it with as many tokens as they are given.
_AT_THE_BLOCKS = {"QwenImageTransformer2DModel": ("hidden_states", "encoder_hidden_states")}


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
        model.register_forward_pre_hook(_check_inputs, with_kwargs=True)


def _check_inputs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """The hook: drops masks that mask nothing and refuses others, and tokens that cannot be divided."""
    config = model._parallel_config and model._parallel_config.context_parallel_config
    if config is None:
        return None
    bound = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs)
    given = bound.arguments
    plan = model._cp_plan
    # By the class itself: FSDP puts one of another name before it.
    at_blocks = next((names for cls in type(model).__mro__ if (names := _AT_THE_BLOCKS.get(cls.__name__))), ())
    for name in (*plan.get("", ()), *at_blocks):
        how = next((inputs[name] for inputs in plan.values() if isinstance(inputs, dict) and name in inputs), None)
        _check_tokens(name, given.get(name), how, config)
    for name in _MASKS:
        if given.get(name) is not None:
            _check_mask(name, given[name])
            given[name] = None
    return bound.args[1:], bound.kwargs


def _check_tokens(name: str, value: Any, how: Any, config: Any) -> None:
    ranks = config.ulysses_degree * config.ring_degree
    if config.ulysses_anything or config.ring_anything or not isinstance(value, Tensor):
        return
    if value.dim() == getattr(how, "expected_dims", None) and value.shape[how.split_dim] % ranks:
        way = "ulysses" if config.ulysses_degree > 1 else "ring"
        raise ValueError(
            f"{name} has {value.shape[how.split_dim]} tokens, which {ranks} ranks cannot share equally; pass "
            f"{way}_anything=True to ContextParallelConfig."
        )


def _check_mask(name: str, mask: Any) -> None:
    if not bool((mask == 1).all()):
        raise ValueError(
            f"{name} leaves tokens out, of which diffusers' attention makes NaN or something else under context "
            "parallelism; run prompts of one length, or one at a time."
        )
