"""What models call the tensors of their checkpoints, by the rules of both libraries, and what stays float32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from pipelines import saved
from torch import nn

from fp8_convert.converter.snapshot.building import build_on_meta
from fp8_convert.converter.snapshot.describing import describe
from fp8_convert.converter.snapshot.files import LocalFiles
from fp8_convert.converter.snapshot.modules import module_map
from fp8_convert.converter.snapshot.naming import name_tensors, stays_float32

OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def old_name(key: str) -> str:
    """A key of a VAE's attention as files from before diffusers 0.17 spell it."""
    for old, new in OLD.items():
        key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return key


@pytest.fixture(scope="module")
def vae() -> Any:
    return build_on_meta("diffusers", AutoencoderKL.__name__, {"block_out_channels": [32]})


def test_old_vaes_in_one_call(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    rename = vae._fix_state_dict_keys_on_load
    monkeypatch.setattr(vae, "_fix_state_dict_keys_on_load", lambda state: calls.append(len(state)) or rename(state))
    expected = {old_name(key): key for key in vae.state_dict()}
    assert sum(key != name for key, name in expected.items()) == 16  # two blocks, four layers, weight and bias
    assert name_tensors(vae, expected).names == expected
    assert calls == [len(expected)]


def test_names_of_today_stay_beside_old_ones(vae: Any) -> None:
    block = "encoder.mid_block.attentions.0"
    names = name_tensors(vae, [f"{block}.to_q.weight", f"{block}.query.weight", "unknown"]).names
    assert names == {
        f"{block}.to_q.weight": f"{block}.to_q.weight",
        f"{block}.query.weight": f"{block}.to_q.weight",
        "unknown": "unknown",
    }


def test_the_converter_leaves_old_vaes_names_alone() -> None:
    """Released versions kept these weights, so that a conversion gives the same bytes."""
    component = next(c for c in describe(LocalFiles(saved("z_image"))).components if c.name == "vae")
    shards = []
    for shard in component.shards:
        tensors = tuple(replace(t, name=old_name(t.name)) for t in shard.header.tensors)
        shards.append(replace(shard, header=replace(shard.header, tensors=tensors)))
    kinds = module_map(replace(component, shards=tuple(shards))).kinds
    assert "encoder.mid_block.attentions.0.query" not in kinds
    assert kinds["encoder.mid_block.attentions.0.group_norm"] == "GroupNorm"


def test_models_of_neither_library() -> None:
    assert name_tensors(nn.Linear(1, 1), ["weight"]).names == {"weight": "weight"}


class Diffusers(nn.Module):
    _keep_in_fp32_modules = ("norm", "time.embed")


class Transformers(nn.Module):
    base_model_prefix = "model"
    _keep_in_fp32_modules = ("wo",)
    _keep_in_fp32_modules_strict = ("mlp.gate",)


@pytest.mark.parametrize(
    ("model", "name", "bf16", "fp16"),
    [
        (Diffusers, "blocks.0.norm.weight", True, True),
        (Diffusers, "blocks.0.norm1.weight", False, False),
        (Diffusers, "time.embed.weight", False, False),  # diffusers compares single segments
        (Transformers, "blocks.0.wo.weight", False, True),
        (Transformers, "blocks.0.wo2.weight", False, False),
        (Transformers, "blocks.0.mlp.gate.weight", True, True),
        (Transformers, "blocks.0.mlp.gate_proj.weight", False, False),
        (nn.Module, "norm.weight", False, False),
    ],
)
def test_what_stays_float32(model: type[nn.Module], name: str, bf16: bool, fp16: bool) -> None:
    assert stays_float32(model(), name, torch.bfloat16) == bf16
    assert stays_float32(model(), name, torch.float16) == fp16
