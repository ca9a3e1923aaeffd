"""The shipped key maps at full size, from their other side: diffusers' own converters, and ComfyUI's names."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils as single_file
from pipelines import saved
from safetensors.torch import load_file

from fp8_convert.converter.snapshot.building import build_on_meta, quiet_libraries
from fp8_convert.converter.targets.key_map import KeyMap
from fp8_convert.converter.targets.key_maps import key_map, mapped_classes
from fp8_convert.converter.telling.errors import ConvertError

_VL_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
_VL_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
_QWEN3 = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
_UMT5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_A14B = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
_KL = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_WAN22_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}
# Every published shape of the classes, by a name of ours: (class, config, converter of diffusers that is its inverse)
MODELS: dict[str, tuple[str, dict[str, Any], Callable[..., Any] | None]] = {
    "qwen-image": ("QwenImageTransformer2DModel", {}, None),
    "qwen-image-layered": (
        "QwenImageTransformer2DModel",
        {"zero_cond_t": True, "use_additional_t_cond": True, "use_layer3d_rope": True},
        None,
    ),
    "z-image": ("ZImageTransformer2DModel", {}, single_file.convert_z_image_transformer_checkpoint_to_diffusers),
    "wan2.2-t2v": ("WanTransformer3DModel", _A14B, single_file.convert_wan_transformer_to_diffusers),
    "wan2.2-i2v": (
        "WanTransformer3DModel",
        {**_A14B, "in_channels": 36},
        single_file.convert_wan_transformer_to_diffusers,
    ),
    "wan2.2-ti2v": (
        "WanTransformer3DModel",
        {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        single_file.convert_wan_transformer_to_diffusers,
    ),
    "wan2.1-i2v": (
        "WanTransformer3DModel",
        {**_A14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        single_file.convert_wan_transformer_to_diffusers,
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": _VL_TEXT, "vision_config": _VL_VISION, "tie_word_embeddings": False},
        None,
    ),
    "qwen3": ("Qwen3Model", _QWEN3, None),
    "qwen3-with-head": ("Qwen3ForCausalLM", _QWEN3, None),
    "umt5": ("UMT5EncoderModel", _UMT5, None),
    "qwen-image-vae": ("AutoencoderKLQwenImage", {}, single_file.convert_wan_vae_to_diffusers),
    "wan-vae": ("AutoencoderKLWan", {}, single_file.convert_wan_vae_to_diffusers),
    "wan2.2-vae": ("AutoencoderKLWan", _WAN22_VAE, None),
    "z-image-vae": ("AutoencoderKL", _KL, single_file.convert_ldm_vae_checkpoint),
}
# What ComfyUI looks for, transcribed from its source; the file names the sources.
COMFYUI = json.loads((Path(__file__).parent / "recorded" / "comfyui.json").read_text())


@functools.cache
def native_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint of a model at full size."""
    class_name, config, _ = MODELS[name]
    library = "diffusers" if hasattr(diffusers, class_name) else "transformers"
    with quiet_libraries():
        model = build_on_meta(library, class_name, config)
    tied = {"lm_head.weight", "encoder.embed_tokens.weight"} if name in ("umt5",) else set()
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}


def map_of(name: str) -> KeyMap:
    class_name, config, _ = MODELS[name]
    found = key_map(class_name, config)
    assert found is not None
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_in_one_original(name: str) -> None:
    native = native_shapes(name)

    originals = map_of(name).to_original(native)

    assert sorted(m for o in originals for m in o.members) == sorted(native)
    for original in originals:
        assert math.prod(original.shape) == sum(math.prod(native[m]) for m in original.members), original.name
    assert len({o.name for o in originals}) == len(originals)


@pytest.mark.parametrize("name", [name for name, (_, _, convert) in MODELS.items() if convert is not None])
def test_diffusers_own_converters_turn_the_original_names_back(name: str) -> None:
    native = native_shapes(name)
    _, config, convert = MODELS[name]
    assert convert is not None

    checkpoint = {o.name: torch.empty(o.shape, device="meta") for o in map_of(name).to_original(native)}
    converted = convert(checkpoint, config=config)

    assert {key: tuple(value.shape) for key, value in converted.items()} == native


def test_rows_of_fused_tensors_are_in_diffusers_order() -> None:
    native = load_file(saved("z_image") / "transformer" / "diffusion_pytorch_model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in native.items()}
    found = key_map("ZImageTransformer2DModel", {})
    assert found is not None
    fused = {o.name: torch.cat([native[m] for m in o.members]) for o in found.to_original(shapes)}

    converted = single_file.convert_z_image_transformer_checkpoint_to_diffusers(dict(fused))

    assert converted.keys() == native.keys()
    assert all(torch.equal(converted[key], native[key]) for key in native)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0] != "Qwen3ForCausalLM"])
def test_the_names_are_those_that_comfyui_looks_for(name: str) -> None:
    names = {o.name for o in map_of(name).to_original(native_shapes(name))}
    shapes = {o.name: list(o.shape) for o in map_of(name).to_original(native_shapes(name))}

    wanted = COMFYUI["models"][name]
    assert not set(wanted["tensors"]) - names
    assert not set(wanted.get("not", ())) & names
    assert {n: shapes[n] for n in wanted.get("shapes", {})} == wanted.get("shapes", {})
    assert wanted.get("count", len(names)) == len(names)


def test_every_class_is_shown() -> None:
    assert {class_name for class_name, _, _ in MODELS.values()} == set(mapped_classes())


def test_tiny_vaes_are_mapped_by_their_config() -> None:
    for pipeline in ("qwen_image", "wan22", "z_image"):
        folder = saved(pipeline) / "vae"
        config: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
        found = key_map(config["_class_name"], config)
        assert found is not None
        native = {
            name: tuple(value.shape)
            for name, value in load_file(folder / "diffusion_pytorch_model.safetensors").items()
        }
        assert sorted(m for o in found.to_original(native) for m in o.members) == sorted(native)


def test_newer_spellings_of_text_encoders_are_read() -> None:
    vl, qwen3 = map_of("qwen2.5-vl"), map_of("qwen3")

    assert vl.original_module("model.language_model.layers.3.mlp.up_proj") == "model.layers.3.mlp.up_proj"
    assert vl.original_module("model.visual.blocks.0.attn.qkv") == "visual.blocks.0.attn.qkv"
    assert qwen3.original_module("model.layers.3.mlp.up_proj") == "model.layers.3.mlp.up_proj"
    assert qwen3.original_module("layers.3.mlp.up_proj") == "model.layers.3.mlp.up_proj"


def test_unknown_classes_have_no_map() -> None:
    assert key_map("FluxTransformer2DModel", {}) is None
    assert key_map(None, {}) is None


def test_a_tensor_without_a_rule_is_named() -> None:
    with pytest.raises(ConvertError, match=r"blocks\.0\.adapter\.weight is not a tensor"):
        map_of("wan2.2-t2v").to_original({"blocks.0.adapter.weight": (1, 1)})
