"""SGLang's own loader on snapshots that were written for it: every weight is ours, and nothing else stands there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_loader import Loaded, destination, load
from snapshot import dequantised, quantization_config, read, reconfigure, rewrite

IGNORED = {
    "qwen_image": ["to_qkv", "add_q_proj", "txt_mlp.net.2"],
    "z_image": ["layers.0.attention.to_qkv", "layers.1.attention.to_out"],
    "wan22": ["blocks.0.ffn", "blocks.1.attn1.to_q", "attn2.to_out"],
}
Made, Copy = Callable[..., Path], Callable[[Path], Path]


@pytest.mark.parametrize("ignored", [False, True], ids=["manifest", "ignored-layers"])
@pytest.mark.parametrize("source", [*IGNORED])
def test_every_weight_is_ours(made: Made, source: str, ignored: bool) -> None:
    snapshot = made(source, target="sglang", **({"ignored_layers": IGNORED[source]} if ignored else {}))
    for component in sorted(snapshot.glob("transformer*")):
        loaded = load(component)
        assert (loaded.unset, loaded.unread, loaded.cast) == ([], [], [])
        expected = _theirs(loaded, dequantised(component))
        assert set(expected) == {name for name in loaded.raw if "_scale" not in name}
        for name, weight in expected.items():
            for found in (_raw, _processed):
                theirs = found(loaded, name, quantization_config(component))
                assert torch.equal(theirs, weight.to(theirs.dtype)), name  # it holds FP32 that is not FP8 in BF16
        assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in loaded.raw.values()) > 0


def test_static_activations_come_along(made: Made) -> None:
    component = made("qwen_image", target="sglang", activation_scheme="static") / "transformer"
    loaded = load(component)
    assert (loaded.unset, loaded.unread, loaded.cast) == ([], [], [])
    ours = {name: tensor for name, tensor in read(component)[0].items() if name.endswith(".input_scale")}
    theirs = {name: tensor for name, tensor in loaded.raw.items() if name.endswith(".input_scale")}
    assert ours
    assert theirs == {name: tensor.reshape(1) for name, tensor in ours.items()}


def _theirs(loaded: Loaded, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors by SGLang's names, members of fused ones below each other."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        target, part = destination(loaded.model, name)
        parts.setdefault(target, {})[part] = tensor
    return {name: torch.cat([found[n] for n in sorted(found)]) for name, found in parts.items()}


def _raw(loaded: Loaded, name: str, config: dict[str, Any]) -> torch.Tensor:
    weight = loaded.raw[name]
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    if config["weight_block_size"] is None:
        assert loaded.raw[f"{name}_scale"].shape == (1,)
        return weight.float() * loaded.raw[f"{name}_scale"]
    return _in_blocks(weight, loaded.raw[f"{name}_scale_inv"], config["weight_block_size"])


def _processed(loaded: Loaded, name: str, config: dict[str, Any]) -> torch.Tensor:
    """The weight as its products take it: transposed with a scale for each row, or in blocks."""
    weight = loaded.model.state_dict()[name]
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    state = loaded.model.state_dict()
    if config["weight_block_size"] is None:
        return weight.t().float() * state[f"{name}_scale"]
    return _in_blocks(weight, state[f"{name}_scale_inv"], config["weight_block_size"])


def _in_blocks(weight: torch.Tensor, scale: torch.Tensor, block: list[int]) -> torch.Tensor:
    wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * wide[: weight.shape[0], : weight.shape[1]]


# What --target sglang avoids: none of these stops SGLang, and each runs with garbage there.


def test_modulation_of_a_native_qwen_image_is_cast_without_a_scale(made: Made) -> None:
    loaded = load(made("qwen_image") / "transformer")
    assert loaded.cast == [f"transformer_blocks.{n}.{x}_mod.1.weight" for n in (0, 1) for x in ("img", "txt")]
    assert loaded.unset == [f"{name}_scale" for name in loaded.cast]


def test_scales_of_a_native_z_image_are_dropped(made: Made) -> None:
    loaded = load(made("z_image") / "transformer")
    assert {"layers.0.attention.to_qkv.weight_scale", "layers.0.feed_forward.w13.weight_scale"} <= {*loaded.unset}
    assert {"layers.0.attention.to_q.weight_scale", "layers.0.feed_forward.w1.weight_scale"} <= {*loaded.unread}


def test_ignored_layers_of_a_native_wan_are_cast_without_a_scale(made: Made) -> None:
    loaded = load(made("wan22", ignored_layers=["blocks.0.ffn", "to_out"]) / "transformer")
    assert {"blocks.0.ffn.fc_in.weight", "blocks.1.to_out.weight"} <= {*loaded.cast}


# Each of these changes to a right snapshot is seen.


def _without(*names: str) -> Callable[[Path], None]:
    def change(component: Path) -> None:
        ignored = quantization_config(component)["ignored_layers"]
        assert {*names} <= {*ignored}
        reconfigure(component, ignored_layers=[name for name in ignored if name not in names])

    return change


def _renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda component: rewrite(component, lambda tensors: tensors.update({new: tensors.pop(old)}))


@pytest.mark.parametrize(
    ("source", "change", "fault"),
    [
        ("qwen_image", _renamed("transformer_blocks.0.attn.to_q.weight_scale", "transformer_blocks.0.attn.to_q.scale"),
         {"unset": "transformer_blocks.0.attn.to_q.weight_scale", "unread": "transformer_blocks.0.attn.to_q.scale"}),
        ("qwen_image", _without("transformer_blocks.1.txt_mod"), {"cast": "transformer_blocks.1.txt_mod.1.weight"}),
        ("qwen_image", _without("proj_out"), {"cast": "proj_out.weight"}),
        ("z_image", _renamed("layers.1.attention.to_v.weight_scale_inv", "layers.1.attention.to_v.weight_scale"),
         {"unset": "layers.1.attention.to_qkv.weight_scale_inv", "unread": "layers.1.attention.to_v.weight_scale"}),
        ("wan22", _without("proj_out"), {"cast": "proj_out.weight"}),
    ],
)  # fmt: skip
def test_a_changed_snapshot_is_seen(
    made: Made, copy: Copy, source: str, change: Callable[[Path], None], fault: dict[str, str]
) -> None:
    component = copy(made(source, target="sglang")) / "transformer"
    change(component)
    loaded = load(component)
    for kind, name in fault.items():
        assert name in getattr(loaded, kind)


def test_a_spelling_that_is_ours_alone_is_seen(made: Made, copy: Copy) -> None:
    component = copy(made("wan22", target="sglang", ignored_layers=IGNORED["wan22"])) / "transformer"
    _without("blocks.0.ffn.fc_in")(component)
    assert load(component).cast == ["blocks.0.ffn.fc_in.weight"]


def test_half_of_a_fused_name_is_refused(made: Made, copy: Copy) -> None:
    component = copy(made("z_image", target="sglang")) / "transformer"
    _without("layers.0.feed_forward.w1")(component)
    with pytest.raises(ValueError, match="some but not all shards"):
        load(component)


@pytest.mark.parametrize(
    ("source", "scale"),
    [
        ("qwen_image", "transformer_blocks.0.attn.to_q.weight_scale"),
        ("z_image", "layers.0.feed_forward.w2.weight_scale_inv"),
    ],
)
def test_a_scale_of_another_shape_is_refused(made: Made, copy: Copy, source: str, scale: str) -> None:
    component = copy(made(source, target="sglang")) / "transformer"
    rewrite(component, lambda tensors: tensors.update({scale: tensors[scale].flatten().repeat(2)}))
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        load(component)
