"""vLLM-Omni's `DiffusersPipelineLoader.load_model` on converted tiny pipelines of the real classes.

Right means: it raises nothing, files have set every element of every parameter that they must set, and each of the
checkpoint's tensors is worth in its layer what the files say, before and after vLLM has processed the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import names
import omni
import pytest
import snapshot
import torch

Made = Callable[..., Path]
Copy = Callable[[Path], Path]
TARGET = {"target": "vllm-omni"}
Z_IMAGE = "z_image_as_published"


# What the target writes


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("qwen_image", {}),
        ("qwen_image", {"ignored_layers": ["to_qkv", "attn.to_out"]}),
        ("qwen_image", {"ignored_layers": ["transformer_blocks.0.attn.add_k_proj", "transformer_blocks.1"]}),
        ("qwen_image_edit", {}),
        ("qwen_image_edit_plus", {}),
        ("qwen_image_layered", {"ignored_layers": ["txt_mlp"]}),
        (Z_IMAGE, {}),
        (Z_IMAGE, {"ignored_layers": ["layers.0.attention.to_q", "w13", "context_refiner"]}),
        ("wan22", {}),
        ("wan22", {"ignored_layers": ["blocks.0.ffn", "to_out"]}),
        ("wan22", {"ignored_layers": ["attn1.to_q", "blocks.1.attn2.to_k"]}),
        ("wan22", {"components": ["transformer_2"]}),
        ("wan22_as_published", {}),
        ("wan22", {"max_shard_size": "1MB"}),
        ("wan22_i2v", {"ignored_layers": ["blocks.0.ffn", "attn1.to_q"]}),
        ("wan22_ti2v", {"ignored_layers": ["blocks.0.attn2.to_out"]}),
        ("wan22", {"activation_scheme": "static"}),
        ("qwen_image", {"activation_scheme": "static", "ignored_layers": ["to_add_out"]}),
    ],
    ids=str,
)
def test_a_snapshot_for_vllm_omni_is_read_right(made: Made, source: str, options: dict[str, Any]) -> None:
    assert names.faults(made(source, **TARGET, **options)) == []


@pytest.mark.parametrize("source", ["qwen_image", Z_IMAGE, "wan22"])
def test_it_is_read_right_by_a_server_that_is_told_the_quantization(made: Made, source: str) -> None:
    """With `--quantization fp8` the files' own config takes the place of online quantisation."""
    assert names.faults(made(source, **TARGET), quantization="fp8") == []


def test_an_encoder_that_transformers_loads_keeps_its_values(made: Made) -> None:
    """Qwen-Image's text encoder has blocks and a config of its own; on a CPU transformers dequantises it."""
    folder = made("qwen_image", **TARGET)
    ours = snapshot.dequantised(folder / "text_encoder")
    theirs = {re.sub(r"^model\.language_model\.", "", name): p for name, p in _encoder(folder).named_parameters()}
    compared = 0
    for name, tensor in ours.items():
        key = re.sub(r"^model\.(language_model\.)?", "", name)
        if "visual" not in name:
            assert torch.equal(theirs[key], tensor.to(theirs[key].dtype)), name
            compared += 1
    assert compared == len(theirs)


def _encoder(folder: Path) -> torch.nn.Module:
    return omni.load(folder).pipeline.get_submodule("text_encoder")


def test_what_it_reads_is_fp8(made: Made) -> None:
    """The layers of the manifest run in FP8 there: that nothing is wrong does not say that something is quantised."""
    pipeline = omni.load(made("wan22", **TARGET)).pipeline
    fp8 = {name for name, p in pipeline.named_parameters() if p.dtype == torch.float8_e4m3fn}
    dits = {f"{dit}.blocks.{n}" for dit in ("transformer", "transformer_2") for n in range(2)}
    layers = ["attn1.to_qkv", "attn1.to_out", *(f"attn2.to_{x}" for x in ("q", "k", "v", "out")), "ffn.net_0.proj"]
    assert fp8 == {f"{block}.{layer}.weight" for block in dits for layer in [*layers, "ffn.net_2"]}


# What a native snapshot comes to there: the reasons for the target


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("qwen_image", {}, "Unknown quantization type, got fp8_convert"),
        (Z_IMAGE, {}, r"no module or parameter named 'text_encoder.*weight_scale_inv'"),
        (Z_IMAGE, {"components": ["transformer"]}, r"text_encoder\.lm_head\.weight_scale was not set"),
        ("wan22", {"ignored_layers": ["blocks.0.ffn"]}, r"blocks\.0\.ffn\.net_2\.weight_scale was not set"),
        ("wan22", {"ignored_layers": ["to_out"]}, r"blocks\.0\.attn1\.to_out\.weight_scale was not set"),
        ("wan22", {"ignored_layers": ["attn1.to_q"]}, r"blocks\.0\.attn1\.to_qkv\.weight_scale was not set"),
    ],
    ids=str,
)
def test_a_native_snapshot_is_not_read_right(made: Made, source: str, options: dict[str, Any], says: str) -> None:
    assert re.search(says, "\n".join(names.faults(made(source, **options))), re.DOTALL)


def test_a_native_snapshot_of_wan_is_read_right(made: Made) -> None:
    assert names.faults(made("wan22")) == []


def test_one_dit_of_two_is_right_until_the_server_is_told_the_quantization(made: Made) -> None:
    """Of the files' own configs each is for its DiT; a config that the user asks for is for both."""
    folder = made("wan22", components=["transformer"])
    assert names.faults(folder) == []
    found = "\n".join(names.faults(folder, quantization="fp8"))
    assert "transformer_2.blocks.0.ffn.net_2.weight_scale was not set" in found


# That the tests above would see a change of names, shapes, lists or spellings


Change = Callable[[Path], None]


def _tensors(component: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    return lambda folder: snapshot.rewrite(folder / component, change)


def _rename(component: str, old: str, new: str) -> Change:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return _tensors(component, rename)


def _without(component: str, name: str) -> Change:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return _tensors(component, remove)


def _set(component: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return _tensors(component, lambda tensors: tensors.update({name: change(tensors[name])}))


def _unlist(component: str, *names_: str) -> Change:
    def unlist(folder: Path) -> None:
        listed = snapshot.quantization_config(folder / component)["ignored_layers"]
        assert set(names_) <= set(listed)
        snapshot.reconfigure(folder / component, ignored_layers=[x for x in listed if x not in names_])

    return unlist


def _relist(component: str, old: str, new: str) -> Change:
    def relist(folder: Path) -> None:
        listed = snapshot.quantization_config(folder / component)["ignored_layers"]
        assert old in listed
        snapshot.reconfigure(folder / component, ignored_layers=[new if x == old else x for x in listed])

    return relist


def _config(component: str, **keys: Any) -> Change:
    return lambda folder: snapshot.reconfigure(folder / component, **keys)


QWEN, WAN, Z = "transformer_blocks.0", "blocks.0", "layers.0"
IGNORED = {
    "qwen_image": ["to_qkv", "attn.to_out"],
    "wan22": ["blocks.0.ffn", "attn1.to_q", "blocks.1.attn2.to_out"],
    Z_IMAGE: ["w13"],
}


# fmt: off
CHANGES: dict[str, tuple[str, Change]] = {
    "qwen: a scale called scale":
        ("qwen_image", _rename("transformer", f"{QWEN}.attn.to_add_out.weight_scale", f"{QWEN}.attn.to_add_out.scale")),
    "wan: a scale called weight_scale_inv":
        ("wan22", _rename("transformer_2", f"{WAN}.attn2.to_q.weight_scale", f"{WAN}.attn2.to_q.weight_scale_inv")),
    "z-image: a scale called weight_scale_inv":
        (Z_IMAGE, _rename("transformer", f"{Z}.feed_forward.w2.weight_scale", f"{Z}.feed_forward.w2.weight_scale_inv")),
    "qwen: a scale of shape [2]":
        ("qwen_image", _set("transformer", f"{QWEN}.txt_mlp.net.2.weight_scale", lambda s: s.expand(2).clone())),
    "wan: a scale for each row":
        ("wan22", _set("transformer", f"{WAN}.attn2.to_v.weight_scale", lambda s: s.expand(256, 1).clone())),
    "z-image: a fused scale of shape [2, 2]":
        (Z_IMAGE, _set("transformer", f"{Z}.attention.to_k.weight_scale", lambda s: s.expand(2, 2).clone())),
    "wan: no scale": ("wan22", _without("transformer", f"{WAN}.attn2.to_q.weight_scale")),
    "qwen: no scale for a member": ("qwen_image", _without("transformer", f"{QWEN}.attn.add_v_proj.weight_scale")),
    "wan: another scale": ("wan22", _set("transformer", f"{WAN}.attn2.to_q.weight_scale", lambda s: s * 2)),
    "z-image: a member with a scale of its own":
        (Z_IMAGE, _set("transformer", f"{Z}.attention.to_k.weight_scale", lambda s: s * 1.25)),
    "qwen: a fused name is not listed": ("qwen_image", _unlist("transformer", f"{QWEN}.attn.to_qkv")),
    "qwen: a name is not listed": ("qwen_image", _unlist("transformer", f"{QWEN}.attn.to_out.0")),
    "qwen: the reader's own module's name":
        ("qwen_image", _relist("transformer", f"{QWEN}.attn.to_out.0", f"{QWEN}.attn.to_out")),
    "wan: the checkpoint's spelling alone": ("wan22", _unlist("transformer", f"{WAN}.ffn.net_2")),
    "wan: the members alone": ("wan22", _unlist("transformer_2", f"{WAN}.attn1.to_qkv")),
    "wan: cross-attention in the checkpoint's spelling": ("wan22", _unlist("transformer", "blocks.1.attn2.to_out")),
    "wan: a name cut short": ("wan22", _relist("transformer", f"{WAN}.ffn.net_0.proj", f"{WAN}.ffn.net_0")),
    "z-image: the members alone": (Z_IMAGE, _unlist("transformer", f"{Z}.feed_forward.w13")),
    "z-image: the encoder's head is not listed": (Z_IMAGE, _unlist("transformer", "lm_head")),
    "z-image: an encoder's layer is not listed": (Z_IMAGE, _unlist("transformer", "model.layers.1.mlp.gate_proj")),
    "z-image: an encoder's layer without model.":
        (Z_IMAGE, _relist("transformer", "model.layers.1.mlp.up_proj", "layers.1.mlp.up_proj")),
    "wan: a listed layer has codes": ("wan22", _relist("transformer", f"{WAN}.ffn.net.0.proj", f"{WAN}.attn2.to_k")),
    "qwen: one more key": ("qwen_image", _config("transformer", modules_to_not_convert=[])),
    "wan: another method": ("wan22", _config("transformer", quant_method="fp8_convert")),
    "z-image: not serialized": (Z_IMAGE, _config("transformer", is_checkpoint_fp8_serialized=False)),
}
# fmt: on


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_snapshot_is_seen(made: Made, copy: Copy, change: str) -> None:
    source, alter = CHANGES[change]
    right = made(source, **TARGET, ignored_layers=IGNORED[source])
    wrong = copy(right)
    alter(wrong)
    found = names.faults(wrong, worth=right)
    print("\n".join(found[:2]))  # `-rP` shows what the reader says of it, which is mostly nothing
    assert found


@pytest.mark.parametrize("source", IGNORED)
def test_unchanged_the_same_snapshots_are_read_right(made: Made, source: str) -> None:
    assert names.faults(made(source, **TARGET, ignored_layers=IGNORED[source])) == []
