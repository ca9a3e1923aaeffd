"""vLLM's own `Fp8Config` and linears on the tensors of a converted Qwen-Image: fused loading, skip rule, product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import omni
import pytest
import snapshot
import torch
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from vllm.model_executor.layers.quantization.utils.w8a8_utils import requantize_with_max_scale

ATTENTION = "transformer_blocks.0.attn"
MEMBERS = {"q": "to_q", "k": "to_k", "v": "to_v"}
DIM, HEAD = 256, 128


@pytest.fixture(scope="module")
def folder(made: Callable[..., Path]) -> Iterator[Path]:
    folder = made("qwen_image", target="vllm-omni")
    with omni.loading(folder):
        yield folder / "transformer"


def _config(folder: Path, ignored: list[str] | None = None) -> Fp8Config:
    """The config of a snapshot, in a model that says what it fuses, as vLLM's language models do."""
    config = Fp8Config.from_config(snapshot.quantization_config(folder))
    config.ignored_layers += ignored or []
    config.packed_modules_mapping = {"to_qkv": list(MEMBERS.values())}
    return config


def _fused(config: Fp8Config) -> QKVParallelLinear:
    return QKVParallelLinear(DIM, HEAD, DIM // HEAD, quant_config=config, prefix=f"{ATTENTION}.to_qkv")


def _load(layer: LinearBase, tensors: dict[str, torch.Tensor], leaf: str) -> None:
    parameter = getattr(layer, leaf)
    for part, name in MEMBERS.items():
        parameter.weight_loader(parameter, tensors[f"{ATTENTION}.{name}.{leaf}"], part)


def test_the_config_is_taken_as_serialized_fp8(folder: Path) -> None:
    config = _config(folder)
    assert (config.is_checkpoint_fp8_serialized, config.activation_scheme) == (True, "dynamic")
    keys = dict(snapshot.quantization_config(folder))
    assert Fp8Config(**{key: keys[key] for key in keys if key != "quant_method"}).weight_block_size is None


def test_a_fused_layer_is_loaded_and_served_with_the_same_weights(folder: Path) -> None:
    tensors, _ = snapshot.read(folder)
    layer = _fused(_config(folder))
    for leaf in ("weight", "weight_scale", "bias"):
        _load(layer, tensors, leaf)
    codes = torch.cat([tensors[f"{ATTENTION}.{name}.weight"].view(torch.uint8) for name in MEMBERS.values()])
    scale = tensors[f"{ATTENTION}.to_q.weight_scale"]
    assert torch.equal(layer.weight.data.view(torch.uint8), codes)
    assert torch.equal(layer.weight_scale.data, scale.expand(3))

    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight.data.t().view(torch.uint8), codes)
    assert torch.equal(layer.weight_scale.data, scale)

    x = torch.randn(24, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias = layer.bias.data.float()
    exact = x.float() @ (codes.view(torch.float8_e4m3fn).float() * scale).t() + bias
    served = layer(x)[0].float()
    assert (served - exact).norm() / exact.norm() < 0.04  # activations are rounded to E4M3, with one scale here
    assert (served - exact).norm() > 0  # it is FP8 that was run


@pytest.mark.parametrize(
    ("ignored", "skipped"),
    [([], False), ([f"{ATTENTION}.{name}" for name in MEMBERS.values()], True), ([f"{ATTENTION}.to_qkv"], True)],
    ids=["none", "members", "fused"],
)
def test_a_fused_layer_is_skipped_by_all_its_members_or_by_its_own_name(
    folder: Path, ignored: list[str], skipped: bool
) -> None:
    assert isinstance(_fused(_config(folder, ignored)).quant_method, Fp8LinearMethod) != skipped


def test_one_member_alone_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="some but not all shards of"):
        _fused(_config(folder, [f"{ATTENTION}.to_k"]))


@pytest.mark.parametrize(("amax", "changed"), [(0.5, False), (0.014, False), (1e-3, True)])
def test_requantising_at_load_changes_no_code_down_to_an_amax(amax: float, changed: bool) -> None:
    """vLLM takes every per-tensor layer through FP16 once more; a scale far below FP16's own loses bits there."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    scale = (amax / 448 * torch.ones(1)).float()
    codes = (weight / weight.abs().max() * amax * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    _, served = requantize_with_max_scale(codes.clone(), scale, [256])
    assert torch.equal(served.view(torch.uint8), codes.view(torch.uint8)) != changed
