"""What the hook before forwards under context parallelism does to inputs, by the forwards of diffusers' own classes."""

from __future__ import annotations

import inspect
import pickle
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ContextParallelConfig
from torch import nn

from fp8_convert.loader.context_parallel import _MASKS, _check_inputs, watch_inputs


def model_of(name: str, **degrees: Any) -> Any:
    """A model of the class without its layers, on ranks that are not there."""
    cls = getattr(diffusers, name)
    model = cls.__new__(cls)
    nn.Module.__init__(model)
    model._parallel_config = SimpleNamespace(context_parallel_config=ContextParallelConfig(**degrees))
    return model


def planned() -> list[str]:
    found = (name for name in dir(diffusers) if name.endswith("Model"))
    return [name for name in found if getattr(getattr(diffusers, name), "_cp_plan", None)]


@pytest.mark.parametrize("name", planned())
def test_inputs_that_nothing_is_wrong_with_stay(name: str) -> None:
    """By position and by name, and of any class that diffusers has a plan for."""
    model = model_of(name, ulysses_degree=2)
    x = torch.ones(1, 4, 8)
    args, kwargs = _check_inputs(model, (x,), {"encoder_hidden_states": x})
    assert args[0] is x
    assert {**dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)), **kwargs} == {
        "hidden_states": x,
        "encoder_hidden_states": x,
    }
    with pytest.raises(TypeError, match="multiple values for argument 'hidden_states'"):
        _check_inputs(model, (x,), {"hidden_states": x})
    model._parallel_config = None
    assert _check_inputs(model, (x,), {}) is None


def test_masks_are_those_that_attention_knows() -> None:
    model = model_of("LTX2VideoTransformer3DModel", ulysses_degree=2)
    ones, weights = torch.ones(1, 4), torch.tensor([[1.0, 0.5, 1.0, 1.0]])
    given = {"encoder_attention_mask": ones, "video_self_attention_mask": ones, "perturbation_mask": weights}
    _, kwargs = _check_inputs(model, (), given)
    assert kwargs == {"encoder_attention_mask": None, "video_self_attention_mask": None, "perturbation_mask": weights}
    for name in ("encoder_attention_mask", "video_self_attention_mask"):
        with pytest.raises(ValueError, match=f"{name} leaves tokens out"):
            _check_inputs(model, (), {name: weights})


def test_every_mask_of_a_class_with_a_plan_is_known() -> None:
    """A new one is to be looked at: does attention take it?"""
    others = {"perturbation_mask", "video_keyframes_mask"}
    for name in planned():
        parameters = inspect.signature(getattr(diffusers, name).forward).parameters
        assert {each for each in parameters if each.endswith("_mask")} <= {*_MASKS, *others}, name


def test_packed_tokens_are_not_counted_at_the_door() -> None:
    model = model_of("QwenImageTransformer2DModel", ulysses_degree=2)
    for name in ("hidden_states", "encoder_hidden_states"):
        with pytest.raises(ValueError, match=f"{name} has 5 tokens, which 2 ranks"):
            _check_inputs(model, (), {name: torch.ones(1, 5, 8)})
    for other in ("MiniMaxH3Transformer3DModel", "WanTransformer3DModel"):
        if hasattr(diffusers, other):
            _check_inputs(model_of(other, ulysses_degree=2), (torch.ones(1, 5, 8),), {})


def test_hooks_go_along_with_copies() -> None:
    model = nn.Module()
    model._cp_plan = {"": {}}
    watch_inputs(model)
    assert len(pickle.loads(pickle.dumps(model))._forward_pre_hooks) == 1
