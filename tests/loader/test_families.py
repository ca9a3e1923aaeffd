"""DiTs of the shipped manifests' other families, tiny: converted, loaded in both modes, and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8_convert.converter import convert
from fp8_convert.converter.plan.manifest import choose_manifest
from fp8_convert.converter.snapshot.building import quiet_libraries
from fp8_convert.loader import load_component
from fp8_convert.loader.weights import Fp8Weight

BF16 = torch.bfloat16


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(BF16)


def _flux2() -> tuple[dict[str, Any], dict[str, Any]]:
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "axes_dims_rope": (16, 16, 16, 16),
    }
    return config, {
        "hidden_states": _noise(1, 16, 16),
        "encoder_hidden_states": _noise(1, 8, 64),
        "timestep": torch.tensor([0.5], dtype=BF16),
        "img_ids": torch.zeros(1, 16, 4),
        "txt_ids": torch.zeros(1, 8, 4),
        "guidance": torch.tensor([4.0], dtype=BF16),
    }


def _sd3() -> tuple[dict[str, Any], dict[str, Any]]:
    config = {
        "sample_size": 16,
        "in_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }
    return config, {
        "hidden_states": _noise(1, 16, 16, 16),
        "encoder_hidden_states": _noise(1, 8, 64),
        "pooled_projections": _noise(1, 64),
        "timestep": torch.tensor([500.0], dtype=BF16),
    }


def _hunyuan() -> tuple[dict[str, Any], dict[str, Any]]:
    config = {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 64,
        "text_embed_2_dim": 32,
        "image_embed_dim": 32,
        "rope_axes_dim": (16, 24, 24),
    }
    return config, {
        "hidden_states": _noise(1, 9, 2, 4, 4),
        "timestep": torch.tensor([500.0], dtype=BF16),
        "encoder_hidden_states": _noise(1, 8, 64),
        "encoder_attention_mask": torch.ones(1, 8),
        "encoder_hidden_states_2": _noise(1, 8, 32),
        "encoder_attention_mask_2": torch.ones(1, 8),
        "image_embeds": _noise(1, 6, 32),
    }


def _ltx2() -> tuple[dict[str, Any], dict[str, Any]]:
    config = {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "cross_attention_dim": 128,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 32,
        "audio_cross_attention_dim": 64,
        "num_layers": 2,
        "caption_channels": 32,
    }
    return config, {
        "hidden_states": _noise(1, 2 * 4 * 4, 16),
        "audio_hidden_states": _noise(1, 6, 8),
        "encoder_hidden_states": _noise(1, 8, 32),
        "audio_encoder_hidden_states": _noise(1, 8, 32),
        "timestep": torch.tensor([500.0]),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 6,
    }


FAMILIES: dict[str, tuple[str, Callable[[], tuple[dict[str, Any], dict[str, Any]]]]] = {
    "flux.2": ("Flux2Transformer2DModel", _flux2),
    "sd3.5": ("SD3Transformer2DModel", _sd3),
    "hunyuanvideo-1.5": ("HunyuanVideo15Transformer3DModel", _hunyuan),
    "ltx-2": ("LTX2VideoTransformer3DModel", _ltx2),
}


def saved(name: str, folder: Path) -> Path:
    import diffusers

    class_name, describe = FAMILIES[name]
    torch.manual_seed(0)
    with quiet_libraries():
        dit = getattr(diffusers, class_name)(**describe()[0])
        for parameter in dit.parameters():  # tables of modulation begin as they are trained from: at zero, or empty
            parameter.data.normal_(0, 0.05)
        dit.to(BF16).save_pretrained(folder)
    return folder


def output_of(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        result = model(**FAMILIES[name][1]()[1], return_dict=False)
    return torch.cat([part.float().flatten() for part in result])


def dequantised(fp8: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` with the weights that the codes and scales of `fp8` stand for."""
    parts = dict(plain.named_modules())
    for name, module in fp8.named_modules():
        if isinstance(module, Fp8Weight):
            assert module.block is None
            parts[name].weight.data = (module.codes.float() * module.scale).to(BF16)
    return plain


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_converts_loads_and_runs(name: str, tmp_path: Path) -> None:
    import diffusers

    source = saved(name, tmp_path / "source")
    assert choose_manifest(None, None, {"": FAMILIES[name][0]}).name == name
    result = convert(source, tmp_path / "out")
    planned = {t.module for c in result.plan.components for t in c.tensors if t.decision.fp8}
    loaded = load_component(tmp_path / "out", device="cpu")
    streamed = load_component(source, device="cpu", quantization="fp8")
    assert {n for n, m in loaded.named_modules() if isinstance(m, Fp8Weight)} == planned
    states = loaded.state_dict(), streamed.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value.float(), states[1][key].float()), key

    with quiet_libraries():
        plain = getattr(diffusers, FAMILIES[name][0]).from_pretrained(source, dtype=BF16)
    exact, ours = output_of(plain, name), output_of(loaded, name)
    assert torch.isfinite(ours).all()
    stored = output_of(dequantised(loaded, plain), name)
    assert (stored - exact).norm() / exact.norm() < 0.1  # what rounding the weights costs
    assert torch.equal(ours, stored)  # on a CPU without FP8 products it is the same arithmetic: no scale is missed
