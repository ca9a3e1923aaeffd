"""Names and values of LoRA files: every spelling gives the same changes, and what is none is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import State, adapter_metadata, kohya, pairs, prefixed, write
from pipelines import copied, saved
from safetensors.torch import load_file, save_file

from fp8_convert.converter import ConvertError, plan_conversion
from fp8_convert.converter.format.header import TensorInfo, encode_header
from fp8_convert.converter.plan.lora import Lora, read_lora
from fp8_convert.converter.plan.lora_request import LoraRequest
from fp8_convert.converter.snapshot.describing import describe
from fp8_convert.converter.snapshot.files import LocalFiles
from fp8_convert.converter.snapshot.snapshot import Snapshot

QWEN = {"transformer_blocks.0.attn.to_q": (256, 256), "transformer_blocks.1.img_mlp.net.2": (256, 1024)}


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return describe(LocalFiles(saved("qwen_image")))


def read(path: Path, snapshot: Snapshot, scale: float = 1.0) -> Lora:
    return read_lora(LoraRequest(path, scale), snapshot)


def renamed(state: State, *changes: tuple[str, str]) -> State:
    for before, after in changes:
        state = {key.replace(before, after): value for key, value in state.items()}
    return state


def _alphas(alpha: float) -> State:
    return {f"{module}.alpha": torch.tensor(alpha) for module in QWEN}


STYLES: Mapping[str, Callable[[State], State]] = {
    "diffusers": lambda s: prefixed("transformer.", s),
    "bare": lambda s: s,
    "diffusion_model": lambda s: prefixed("diffusion_model.", s),
    "default": lambda s: renamed(s, (".weight", ".default.weight")),
    "down-up": lambda s: renamed(s, ("lora_A", "lora_down"), ("lora_B", "lora_up")),
    "dots": lambda s: renamed(prefixed("transformer.", s), ("lora_A", "lora.down"), ("lora_B", "lora.up")),
    "lightning": lambda s: renamed(s, ("lora_A", "lora_down"), ("lora_B", "lora_up")) | _alphas(8.0),
    "kohya": lambda s: kohya(s, lambda module: module, alpha=8.0),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_the_same(tmp_path: Path, snapshot: Snapshot, style: str) -> None:
    state = pairs(QWEN)
    lora = read(write(tmp_path / "x.safetensors", STYLES[style](state)), snapshot, 0.5)
    assert sorted(lora.changes) == [("transformer", module) for module in sorted(QWEN)]
    for module in QWEN:
        change = lora.changes["transformer", module]
        assert torch.equal(change.a, state[f"{module}.lora_A.weight"])
        assert torch.equal(change.b, state[f"{module}.lora_B.weight"])
        assert change.factor == 0.5


def test_alphas(tmp_path: Path, snapshot: Snapshot) -> None:
    """Of kohya's files diffusers bakes alpha / rank into the down matrix."""
    state = pairs(QWEN)
    lora = read(write(tmp_path / "x.safetensors", kohya(state, lambda module: module, alpha=2.0)), snapshot)
    for module in QWEN:
        change = lora.changes["transformer", module]
        assert torch.allclose(change.factor * change.b @ change.a, _delta(state, module) * 2 / 8)


def test_the_config_in_the_metadata(tmp_path: Path, snapshot: Snapshot) -> None:
    config = {"r": 8, "lora_alpha": 16, "alpha_pattern": {"img_mlp.net.2": 4}, "rank_pattern": {}}
    file = write(tmp_path / "x.safetensors", prefixed("transformer.", pairs(QWEN)), adapter_metadata(**config))
    factors = {module: change.factor for (_, module), change in read(file, snapshot).changes.items()}
    assert factors == {"transformer_blocks.0.attn.to_q": 2.0, "transformer_blocks.1.img_mlp.net.2": 0.5}


def test_ranks_differ_and_scale_by_the_root(tmp_path: Path, snapshot: Snapshot) -> None:
    first, second = QWEN.items()
    state = prefixed("transformer.", pairs(dict([first]), 4) | pairs(dict([second]), 16))
    metadata = adapter_metadata(r=4, lora_alpha=8, use_rslora=True, rank_pattern={second[0]: 16})
    factors = [c.factor for c in read(write(tmp_path / "x.safetensors", state, metadata), snapshot).changes.values()]
    assert factors == [4.0, 2.0]


def test_a_peft_adapter_has_its_alpha_in_its_config(tmp_path: Path, snapshot: Snapshot) -> None:
    file = write(tmp_path / "adapter_model.safetensors", prefixed("base_model.model.", pairs(QWEN)))
    with pytest.raises(ConvertError, match=r"is a PEFT adapter, whose alpha stands in its adapter_config.json; put"):
        read(file, snapshot)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 4, "bias": "none"}))
    lora = read(file, snapshot)
    assert {change.factor for change in lora.changes.values()} == {0.5}
    assert lora.config_sha256 is not None
    for text, message in (("{", "is not valid JSON.*; give the file as it was trained"), ("[]", "is no JSON object")):
        config.write_text(text)
        with pytest.raises(ConvertError, match=rf"adapter_config\.json {message}"):
            read(file, snapshot)
    config.write_text(json.dumps({"r": 8, "lora_alpha": 2}))
    assert read(file, snapshot).to_json() != lora.to_json()  # what changes bytes is in the record


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "was trained with use_dora, which cannot be merged"),
    "bias": ({"lora_bias": True}, "was trained with lora_bias"),
    "biases": ({"bias": "all"}, "was trained with biases"),
    "type": ({"peft_type": "LOHA"}, "is an adapter of the type 'LOHA'"),
    "alpha": ({"lora_alpha": "8"}, "has the lora_alpha '8', which is no number"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "with init_lora_weights 'pissa_niter_4', which changes"),
    "olora": ({"init_lora_weights": "olora"}, "was trained with init_lora_weights 'olora'"),
    "loftq": ({"loftq_config": {"loftq_bits": 4}}, "was trained with loftq_config"),
    "layers": ({"layer_replication": [[0, 1]]}, "was trained with layer_replication"),
    "alora": ({"alora_invocation_tokens": [1]}, "was trained with alora_invocation_tokens"),
    "arrow": ({"arrow_config": {"a": 1}}, "was trained with arrow_config"),
    "modules": ({"modules_to_save": ["proj_out"]}, "was trained with modules_to_save"),
    "unknown": ({"use_tomorrow": 1}, "was trained with use_tomorrow"),
    "rslora": ({"use_rslora": "false"}, "has the use_rslora 'false', which is neither true nor false"),
    "patterns": ({"alpha_pattern": ["to_q"]}, r"has the alpha_pattern \"\['to_q'\]\""),
    "regex": ({"alpha_pattern": {"(a+)+$": 4}}, r"has the alpha_pattern '\(a\+\)\+\$'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_cannot_be_merged(tmp_path: Path, snapshot: Snapshot, case: str) -> None:
    config, message = CONFIGS[case]
    file = write(tmp_path / "x.safetensors", prefixed("transformer.", pairs(QWEN)), adapter_metadata(**config))
    with pytest.raises(ConvertError, match=message):
        read(file, snapshot)


ONE = torch.ones(8, 256)
REFUSED: dict[str, tuple[State, str]] = {
    "dora": ({"transformer.x.dora_scale": ONE}, r"x.dora_scale in .*x.safetensors is of DoRA, which scales each row"),
    "magnitude": ({"transformer.x.lora_magnitude_vector": ONE}, "is of DoRA"),
    "lokr": ({"lora_unet_x.lokr_w1": ONE}, "is of LoKr"),
    "loha": ({"lora_unet_x.hada_w1_a": ONE}, "is of LoHa"),
    "diff": ({"diffusion_model.x.diff": ONE}, "is of the difference of a whole tensor"),
    "diff_b": ({"diffusion_model.x.diff_b": ONE}, "is of a bias"),
    "bias": ({"transformer.x.lora_B.bias": ONE}, "is of a bias"),
    "whole": ({"transformer.x.weight": ONE}, "transformer.x.weight in .* is no part of a LoRA"),
    "alphas": ({"transformer.x.alpha": torch.ones(2)}, "transformer.x.alpha in .* is no single number from 0 up"),
    "negative": ({"transformer.x.alpha": torch.tensor(-1.0)}, "is no single number from 0 up"),
    "nan": ({"transformer.x.lora_A.weight": ONE * float("nan")}, "holds NaN or Inf; give another file"),
    "fp8": ({"transformer.x.lora_A.weight": ONE.to(torch.float8_e4m3fn)}, r"is F8_E4M3 \[8, 256\], and a LoRA's"),
    "convolution": (
        {f"transformer.x.lora_{part}.weight": torch.ones(8, 8, 1, 1) for part in "AB"},
        "are not those of a linear layer's LoRA; only linear layers can be merged",
    ),
    "none": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora(tmp_path: Path, snapshot: Snapshot, case: str) -> None:
    state, message = REFUSED[case]
    file = write(tmp_path / "x.safetensors", {**(prefixed("transformer.", pairs(QWEN)) if state else {}), **state})
    with pytest.raises(ConvertError, match=message):
        read(file, snapshot)


def test_what_peft_writes_itself_is_plain(tmp_path: Path, snapshot: Snapshot) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["to_q"], init_lora_weights="gaussian", use_rslora=True)
    file = write(tmp_path / "adapter_model.safetensors", prefixed("base_model.model.", pairs(QWEN)))
    config.save_pretrained(tmp_path)
    assert {change.factor for change in read(file, snapshot).changes.values()} == {16 / 8**0.5}
    orphan = {"base_model.model.x.alpha": torch.tensor(8.0)}
    write(file, prefixed("base_model.model.", pairs(QWEN)) | orphan)
    with pytest.raises(ConvertError, match=r"x, of the LoRA adapter_model.safetensors, has no matrices for its alpha"):
        read(file, snapshot)


def test_names_of_a_component_on_its_own(tmp_path: Path) -> None:
    """No converter of a pipeline's brings them into one form."""
    alone = describe(LocalFiles(saved("qwen_image") / "transformer"))
    both = pairs(QWEN) | prefixed("transformer.", pairs(QWEN))
    with pytest.raises(ConvertError, match=r"x.safetensors has two pairs of matrices for transformer.+; give another"):
        read(write(tmp_path / "x.safetensors", both), alone)
    with pytest.raises(ConvertError, match=r"x.lora1.down.weight, of the LoRA x.safetensors, is no name of a LoRA's"):
        read(write(tmp_path / "x.safetensors", {"x.lora1.down.weight": ONE}), alone)


def test_a_pipeline_without_a_transformer(tmp_path: Path) -> None:
    source = copied(saved("qwen_image"), tmp_path / "source")
    index = json.loads((source / "model_index.json").read_text()) | {"transformer": [None, None]}
    (source / "model_index.json").write_text(json.dumps(index))
    file = write(tmp_path / "x.safetensors", prefixed("transformer.", pairs(QWEN)))
    with pytest.raises(ConvertError, match=r"has no transformer for the LoRA x.safetensors; name the component that"):
        read(file, describe(LocalFiles(source)))


def test_weights_that_cannot_be_changed(tmp_path: Path) -> None:
    source = copied(saved("qwen_image") / "transformer", tmp_path / "source")
    shard, module = source / "diffusion_pytorch_model.safetensors", next(iter(QWEN))
    save_file(load_file(shard) | {f"{module}.weight": torch.ones(256, 256, dtype=torch.float64)}, shard)
    with pytest.raises(ConvertError, match=rf"changes {module}.weight, which is F64; only BF16, FP16 and FP32 weights"):
        plan_conversion(source, merge_lora=[write(tmp_path / "x.safetensors", pairs(QWEN))])


def test_a_file_whose_tensors_are_not_aligned(tmp_path: Path, snapshot: Snapshot) -> None:
    """The format asks for no alignment of what follows an alpha of two bytes."""
    state = pairs(QWEN)
    read_aligned = read(write(tmp_path / "x.safetensors", state), snapshot)
    infos, data = [], b""
    for name, tensor in {f"{next(iter(QWEN))}.alpha": torch.tensor(8.0).bfloat16(), **state}.items():
        raw = tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).numpy().tobytes()
        dtype = "BF16" if tensor.dtype == torch.bfloat16 else "F32"
        infos.append(TensorInfo(name, dtype, tuple(tensor.shape), len(data), len(data) + len(raw)))
        data += raw
    (tmp_path / "x.safetensors").write_bytes(encode_header(infos, {}) + data)
    for where, change in read(tmp_path / "x.safetensors", snapshot).changes.items():
        assert torch.equal(change.a, read_aligned.changes[where].a)
        assert torch.equal(change.b, read_aligned.changes[where].b)


def test_half_a_pair(tmp_path: Path, snapshot: Snapshot) -> None:
    state = prefixed("transformer.", pairs(QWEN))
    del state["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"]
    with pytest.raises(ConvertError, match=r"attn.to_q, of the LoRA x.safetensors, has no up \(lora_B\) matrix"):
        read(write(tmp_path / "x.safetensors", state), snapshot)


def test_names_that_diffusers_cannot_take(tmp_path: Path, snapshot: Snapshot) -> None:
    state = {"lora_unet_x.lora_down.weight": ONE}
    with pytest.raises(ConvertError, match=r"diffusers cannot bring the names of the LoRA x.safetensors into those of"):
        read(write(tmp_path / "x.safetensors", state), snapshot)


UNFIT: dict[str, tuple[State, str]] = {
    "module": (
        prefixed("transformer.", pairs({"transformer_blocks.0.attn.to_qq": (256, 256)})),
        r"changes transformer_blocks.0.attn.to_qq, and transformer has no such weight \(the closest is "
        r"transformer_blocks.0.attn.to_q\)",
    ),
    "text-encoder": (
        prefixed("text_encoder.", pairs({"layers.0.q_proj": (128, 128)})),
        "changes layers.0.q_proj, and text_encoder has no such weight",
    ),
    "kohya-text-encoder": (
        {f"lora_te_layers_0.{k}": v for k, v in pairs({"x": (4, 4)}).items()},
        "changes lora_te_layers_0.x, and transformer has no such weight",
    ),
    "shape": (
        prefixed("transformer.", pairs({"transformer_blocks.0.attn.to_q": (256, 64)})),
        r"changes transformer_blocks.0.attn.to_q.weight by a matrix \[256, 64\], and it is \[256, 256\]",
    ),
    "component": (
        prefixed("unet.", pairs({"x": (4, 4)})),
        "changes unet.x, and transformer has no such weight",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_loras_of_other_models(tmp_path: Path, case: str) -> None:
    state, message = UNFIT[case]
    file = write(tmp_path / "x.safetensors", state)
    with pytest.raises(ConvertError, match=message):
        plan_conversion(saved("qwen_image"), merge_lora=[file])


def test_components_that_are_not_there(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", prefixed("transformer.", pairs(QWEN)))
    with pytest.raises(ConvertError, match=r"has no component 'transformer_2' for the LoRA x.safetensors; it has"):
        plan_conversion(saved("qwen_image"), merge_lora=[f"transformer_2={file}"])
    file = write(tmp_path / "x.safetensors", prefixed("text_encoder.", pairs({"x": (4, 4)})))
    with pytest.raises(ConvertError, match=r"text_encoder.x, of the LoRA x.safetensors, is for text_encoder, and not"):
        plan_conversion(saved("qwen_image"), merge_lora=[f"transformer={file}"])


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"missing.safetensors cannot be opened \(No such file or directory\)"):
        plan_conversion(saved("qwen_image"), merge_lora=[tmp_path / "missing.safetensors"])
    (tmp_path / "short.safetensors").write_bytes(b"\x10")
    with pytest.raises(ConvertError, match="too short to be a safetensors file"):
        plan_conversion(saved("qwen_image"), merge_lora=[tmp_path / "short.safetensors"])


def _delta(state: State, module: str) -> torch.Tensor:
    return state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"]


def test_alphas_that_diffusers_hands_out_apart(tmp_path: Path) -> None:
    """FLUX's loader takes the alphas out of the names; they still scale."""
    module = "transformer_blocks.0.attn.to_q"
    state = prefixed("transformer.", pairs({module: (256, 256)}) | {f"{module}.alpha": torch.tensor(2.0)})
    file = write(tmp_path / "x.safetensors", state)
    lora = read(file, describe(LocalFiles(saved("flux"))))
    assert [change.factor for change in lora.changes.values()] == [2 / 8]


def test_a_fused_projection_is_split(tmp_path: Path) -> None:
    """Z-Image's original names have one matrix for query, key and value."""
    fused = pairs({"lora_unet_layers_0_attention_qkv": (3 * 128, 128)})
    state = {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for key, v in fused.items()}
    lora = read(write(tmp_path / "x.safetensors", state), describe(LocalFiles(saved("z_image"))))
    assert sorted(module for _, module in lora.changes) == [f"layers.0.attention.to_{x}" for x in "kqv"]
    up = torch.cat([lora.changes["transformer", f"layers.0.attention.to_{x}"].b for x in "qkv"])
    assert torch.equal(up, fused["lora_unet_layers_0_attention_qkv.lora_B.weight"])


def test_what_diffusers_would_leave_out(tmp_path: Path) -> None:
    """It takes a fused projection for a copy of the split ones beside it, whatever is in it."""
    names = {f"lora_unet_layers_{i}_attention_qkv": (384, 128) for i in (0, 1)}  # one of them has nothing beside it
    names["lora_unet_layers_0_attention_to_q"] = (128, 128)
    state = renamed(pairs(names), ("lora_A", "lora.down"), ("lora_B", "lora.up"))
    message = "diffusers leaves out lora_unet_layers_0_attention_qkv.lora.down.weight and 1 more of the LoRA x.safe"
    with pytest.raises(ConvertError, match=message):
        read(write(tmp_path / "x.safetensors", state), describe(LocalFiles(saved("z_image"))))


FLUX_QKV = {"double_blocks_0_img_attn_qkv": (3 * 64, 64)}
LEFT_OUT: dict[str, tuple[str, State, str]] = {
    "flux-text-encoder": (
        "flux",
        {f"lora_te2_x.lora_{x}.weight": torch.ones(8, 8) for x in ("down", "up")},
        r"lora_te2_x.lora_down.weight and 1 more of the LoRA x.safetensors when it reads it for FluxPipeline",
    ),
    "flux-final-layer": (
        "flux",
        kohya(pairs({"final_layer_linear": (4, 64)}), lambda module: module, alpha=80.0),
        "lora_unet_final_layer_linear.alpha of the LoRA",
    ),
    "qwen-prefix": ("qwen_image", {f"transformer.{next(iter(QWEN))}.alpha": torch.tensor(8.0)}, "transformer.+alpha"),
    "qwen-of-a-matrix": ("qwen_image", {f"{next(iter(QWEN))}.lora_A.alpha": torch.tensor(80.0)}, ".+lora_A.alpha of"),
    "qwen-nothing": ("qwen_image", {"diffusion_model.nothing.alpha": torch.tensor(8.0)}, ".+nothing.alpha of"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_every_tensor_is_accounted_for(tmp_path: Path, case: str) -> None:
    """Pairs that one pair becomes, and the alphas that are applied, hide nothing that is dropped."""
    source, extra, message = LEFT_OUT[case]
    whole = kohya(pairs(FLUX_QKV), lambda m: m) if source == "flux" else prefixed("diffusion_model.", pairs(QWEN))
    snapshot = describe(LocalFiles(saved(source)))
    assert read(write(tmp_path / "x.safetensors", whole), snapshot).changes
    with pytest.raises(ConvertError, match=f"diffusers leaves out {message}"):
        read(write(tmp_path / "x.safetensors", whole | extra), snapshot)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    state = pairs({"transformer_blocks.0.attn.to_q": (64, 64)})
    state |= {k.replace(".weight", ".default.weight"): 2 * value for k, value in state.items()}
    with pytest.raises(ConvertError, match=r"has two tensors that mean transformer_blocks.0.attn.to_q.lora_"):
        read(write(tmp_path / "x.safetensors", state), describe(LocalFiles(saved("flux"))))


def test_a_fused_projection_keeps_its_alpha(tmp_path: Path) -> None:
    """Three pairs share one alpha, which each of them contains."""
    state = kohya(pairs(FLUX_QKV), lambda module: module, alpha=2.0)
    metadata = adapter_metadata(lora_alpha=2)
    lora = read(write(tmp_path / "x.safetensors", state, metadata), describe(LocalFiles(saved("flux"))))
    whole = _delta(pairs(FLUX_QKV), next(iter(FLUX_QKV))) * 2 / 8
    found = [change.factor * change.b @ change.a for change in lora.changes.values()]
    assert len(found) == 3
    assert torch.allclose(torch.cat(found), whole)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_an_alpha_that_is_stated_twice(tmp_path: Path, snapshot: Snapshot, prefix: str) -> None:
    state = kohya(pairs(QWEN), lambda module: module, alpha=32.0)
    if prefix == "diffusion_model.":
        state = prefixed(prefix, pairs(QWEN) | {f"{module}.alpha": torch.tensor(32.0) for module in QWEN})

    def reading(**config: Any) -> Lora:
        return read(write(tmp_path / "x.safetensors", state, adapter_metadata(**config)), snapshot)

    module = next(iter(QWEN))
    change = reading(lora_alpha=32).changes["transformer", module]
    assert torch.allclose(change.factor * change.b @ change.a, _delta(pairs(QWEN), module) * 32 / 8, rtol=1e-4)
    with pytest.raises(ConvertError, match=r"has the alpha 32 in the file and 16 in the config; take out"):
        reading(lora_alpha=16)
    with pytest.raises(ConvertError, match=r"has an alpha beside it, and the config has use_rslora, which contradict"):
        reading(use_rslora=True)


def test_no_alpha_is_nothing(tmp_path: Path, snapshot: Snapshot) -> None:
    """Zero is an alpha, and the config in the metadata is for names without a prefix too."""
    for prefix in ("transformer.", ""):
        state = prefixed(prefix, pairs(QWEN))
        lora = read(write(tmp_path / "x.safetensors", state, adapter_metadata(lora_alpha=0)), snapshot)
        assert {change.factor for change in lora.changes.values()} == {0.0}
