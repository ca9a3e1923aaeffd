"""A converted component's config.json: exactly the contract's keys, and what transformers makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from own_manifests import with_scales_of_rows
from pipelines import copied, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp8_convert.converter import convert, verify
from fp8_convert.converter.snapshot.building import quiet_libraries

KEYS = ["quant_method", "activation_scheme", "is_checkpoint_fp8_serialized", "ignored_layers", "weight_block_size"]
BLOCK = [128, 128]

# (source, options) -> {component: (quant_method, weight_block_size)}; components not named gain nothing.
CONVERSIONS: list[tuple[str, dict[str, Any], dict[str, tuple[str, list[int] | None]]]] = [
    ("z_image", {}, {"transformer": ("fp8", None), "text_encoder": ("fp8", BLOCK)}),
    ("z_image", {"compact": True}, {"transformer": ("fp8_convert", None), "text_encoder": ("fp8", BLOCK)}),
    ("z_image", {"weight_block_size": (128, 128)}, {"transformer": ("fp8", BLOCK), "text_encoder": ("fp8", BLOCK)}),
    ("z_image", {"components": ["transformer"]}, {"transformer": ("fp8", None)}),
    (  # nothing is left for W8A8: what is only stored must not be taken for it
        "qwen_image",
        {"components": ["transformer"], "compact": True, "ignored_layers": ["attn", "net"]},
        {"transformer": ("fp8_convert", None)},
    ),
    (
        "qwen_image",
        {},
        {"transformer": ("fp8", None), "text_encoder": ("fp8", BLOCK), "vae": ("fp8_convert", None)},
    ),
    (  # of scales of rows readers of "fp8" know nothing
        "z_image",
        {"manifest": with_scales_of_rows("z-image")},
        {"transformer": ("fp8_convert", None), "text_encoder": ("fp8_convert", None)},
    ),
    ("wan22", {}, {"transformer": ("fp8", None), "transformer_2": ("fp8", None)}),
    (
        "flux",
        {},
        {"transformer": ("fp8", None), "text_encoder": ("fp8", BLOCK), "text_encoder_2": ("fp8", BLOCK)},
    ),
]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize(("name", "options", "expected"), CONVERSIONS)
def test_config_gains_the_contracts_keys_and_nothing_else(
    tmp_path: Path, name: str, options: dict[str, Any], expected: dict[str, tuple[str, list[int] | None]]
) -> None:
    source, output = saved(name), tmp_path / "out"
    convert(source, output, **options)
    assert verify(output).ok
    for folder in (p for p in source.iterdir() if p.is_dir()):
        if folder.name not in expected:
            for file in folder.iterdir():
                assert (output / folder.name / file.name).read_bytes() == file.read_bytes()
            continue
        before, after = read(folder / "config.json"), read(output / folder.name / "config.json")
        gained = after.pop("quantization_config")
        assert after == before
        assert list(after) == list(before)
        assert list(gained) == KEYS
        assert (gained["quant_method"], gained["weight_block_size"]) == expected[folder.name]
        assert gained["activation_scheme"] == "dynamic"
        assert gained["is_checkpoint_fp8_serialized"] is True
        assert gained["ignored_layers"] == sorted(set(gained["ignored_layers"]))
        weights = next((output / folder.name).glob("*.safetensors"))
        with safe_open(weights, "pt") as file:
            kept = {n for n in file.keys() if file.get_slice(n).get_dtype() != "F8_E4M3"}  # noqa: SIM118
        assert {f"{layer}.weight" for layer in gained["ignored_layers"]} <= kept


def test_static_activations_stand_in_the_dits_config_alone(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    convert(saved("z_image"), plain)
    weights = load_file(plain / "transformer" / "diffusion_pytorch_model.safetensors")
    scales = {n.replace(".weight", ".input_scale"): torch.tensor(0.5) for n, w in weights.items() if w.itemsize == 1}
    save_file(scales, tmp_path / "scales.safetensors")
    convert(
        saved("z_image"), tmp_path / "out", activation_scheme="static", input_scales=tmp_path / "scales.safetensors"
    )
    schemes = {
        name: read(tmp_path / "out" / name / "config.json")["quantization_config"]["activation_scheme"]
        for name in ("transformer", "text_encoder")
    }
    assert schemes == {"transformer": "static", "text_encoder": "dynamic"}


def _respelled(source: Path, folder: Path) -> Path:
    """The snapshot with its Qwen2.5-VL under the names that Qwen-Image is published with."""
    copied(source, folder)
    file = folder / "text_encoder" / "model.safetensors"
    published = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): weight
        for name, weight in load_file(file).items()
    }
    save_file(published, file, metadata={"format": "pt"})
    return folder


def _with_tied_head(folder: Path) -> Path:
    """A text encoder whose head is its embedding: the checkpoint has no lm_head.weight."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
    )
    with quiet_libraries():
        transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_head_that_shares_the_embedding_is_ignored_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes an FP8 layer of each linear that the list does not name, and looks for its scale."""
    import transformers
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    convert(_with_tied_head(tmp_path / "source"), tmp_path / "out", manifest="default")
    config = read(tmp_path / "out" / "config.json")
    assert config["quantization_config"]["ignored_layers"] == ["lm_head"]
    assert verify(tmp_path / "out").ok
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    with quiet_libraries():
        model, info = transformers.Qwen3ForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
        )
    assert not any(info.values()), info
    assert type(model.lm_head) is torch.nn.Linear


TEXT_ENCODERS = [
    ("z_image", "text_encoder", False),
    ("qwen_image", "text_encoder", False),
    ("qwen_image", "text_encoder", True),
    ("flux", "text_encoder", False),
    ("flux", "text_encoder_2", False),
]


@pytest.mark.parametrize(("name", "component", "published"), TEXT_ENCODERS)
def test_transformers_own_fp8_reader_finds_every_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, component: str, published: bool
) -> None:
    """Its GPU path (no dequantising), which differs from the CPU's in that it trusts `ignored_layers`."""
    import transformers
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    source = _respelled(saved(name), tmp_path / "source") if published else saved(name)
    convert(source, tmp_path / "out")
    folder = tmp_path / "out" / component
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    cls = getattr(transformers, read(tmp_path / "out" / "model_index.json")[component][1])
    with quiet_libraries():
        model, info = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info

    replaced = {n: m for n, m in model.named_modules() if type(m).__name__ == "FP8Linear"}
    stored = load_file(next(folder.glob("*.safetensors")))
    codes = {n: w for n, w in stored.items() if w.dtype == torch.float8_e4m3fn}
    assert replaced
    assert len(replaced) == len(codes)
    loaded = dict(model.named_parameters()) | dict(model.named_buffers())
    by_block = {in_block(name.removesuffix(".weight")): name for name in codes}
    for module_name in replaced:
        own = by_block.pop(in_block(module_name))
        weight, scale = loaded[f"{module_name}.weight"], loaded[f"{module_name}.weight_scale_inv"]
        assert weight.dtype == torch.float8_e4m3fn
        assert torch.equal(weight.view(torch.uint8), codes[own].view(torch.uint8))
        assert torch.equal(scale, stored[own + "_scale_inv"])
    assert not by_block


def in_block(name: str) -> str:
    """`layers.0.mlp.up_proj`, without what stands before it, which may differ between checkpoint and model."""
    found = re.search(r"(?:layers|block)\.\d.*", name)
    assert found, name
    return found[0]
