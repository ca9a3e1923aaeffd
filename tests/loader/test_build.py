"""Which tensor of a checkpoint goes where in a model whose FP8 layers are installed."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import Qwen3Config, Qwen3Model, conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

from fp8_convert.converter.format.layout import W8A8, WeightFormat
from fp8_convert.converter.snapshot.building import build_on_meta
from fp8_convert.converter.telling.errors import LoadError
from fp8_convert.loader.build import install_all, tensor_names
from fp8_convert.loader.checkpoint import Fp8Modules
from fp8_convert.loader.weights import Fp8Weight


def test_scales_follow_their_weight_under_the_names_of_old_vaes() -> None:
    model = build_on_meta("diffusers", AutoencoderKL.__name__, {"block_out_channels": [32]})
    old, new = (f"decoder.mid_block.attentions.0.{name}" for name in ("proj_attn", "to_out.0"))
    leaves = ("weight", "weight_scale", "bias")
    names = tensor_names(model, [f"{old}.{leaf}" for leaf in leaves], [old])
    assert names == {f"{old}.{leaf}": f"{new}.{leaf}" for leaf in leaves}


def test_a_scale_of_no_fp8_module_keeps_its_name() -> None:
    assert tensor_names(nn.Linear(1, 1), ["a.input_scale", "weight"], []) == {
        "a.input_scale": "a.input_scale",
        "weight": "weight",
    }


def small_qwen3() -> Any:
    config = Qwen3Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=32, vocab_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen3Model(config)


def test_renamings_that_were_used_are_kept_for_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [WeightRenaming("^old_layers", "layers"), WeightRenaming("^never", "layers")]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: rules)
    model = small_qwen3()
    key = "old_layers.0.mlp.up_proj"
    names = tensor_names(model, [f"{key}.weight_scale_inv"], [key])
    assert names == {f"{key}.weight_scale_inv": "layers.0.mlp.up_proj.weight_scale_inv"}
    assert model._weight_conversions == rules[:1]


def test_weights_that_the_class_merges_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    rule = WeightConverter(sources, "mlp.gate_up_proj.weight", operations=[Concatenate(dim=0)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [rule])
    with pytest.raises(LoadError, match=r"^Qwen3Model merges layers\.0\.mlp\.up_proj\.weight with other weights"):
        tensor_names(small_qwen3(), ["norm.weight", "layers.0.mlp.up_proj.weight"], [])


def test_installing_what_the_model_has() -> None:
    model = nn.Sequential(nn.Linear(16, 16, device="meta"), nn.LayerNorm(16, device="meta"))
    fp8 = Fp8Modules({"first": WeightFormat(W8A8)}, {"activation_scheme": "static"})
    install_all(model, fp8, {"first.weight": "0.weight"}, dtype=torch.bfloat16, label="part")
    assert isinstance(model[0], Fp8Weight)
    assert "input_scale" in dict(model[0].named_buffers())
    for own, said in (("2", "has no module 2"), ("1", r"cannot be loaded: 1 \(LayerNorm\) cannot hold FP8 weights")):
        with pytest.raises(LoadError, match=rf"^part .*{said}"):
            install_all(model, fp8, {"first.weight": f"{own}.weight"}, dtype=torch.bfloat16, label="part")
