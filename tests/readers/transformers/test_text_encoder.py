"""transformers' own FP8 reader on our text encoders: dequantised as on a CPU, and with its FP8 modules as on a GPU."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from snapshot import dequantised, quantization_config, read, reconfigure, rewrite
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

Made, Copy = Callable[..., Path], Callable[[Path], Path]
SOURCES = ["z_image", "qwen_image"]
FP8 = torch.float8_e4m3fn


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not dequantise: without a GPU its check of the environment turns that on."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)


def load(snapshot: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    name = json.loads((snapshot / "model_index.json").read_text())["text_encoder"][1]
    folder = snapshot / "text_encoder"
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)


def ends(name: str) -> str:
    """The name from its layer on: what stands before differs between files and models."""
    found = re.search(r"(visual\.)?(layers|blocks)\.\d.*", name)
    return found[0] if found else name.rpartition(".")[0].rpartition(".")[2] + "." + name.rpartition(".")[2]


@pytest.mark.parametrize("source", SOURCES)
def test_dequantised_on_a_cpu_every_weight_is_ours(made: Made, source: str) -> None:
    snapshot = made(source)
    model, info = load(snapshot)
    assert not any(info.values()), info
    expected = {ends(name): tensor for name, tensor in dequantised(snapshot / "text_encoder").items()}
    loaded = {ends(name): tensor for name, tensor in model.named_parameters()}
    assert set(loaded) == set(expected)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("source", SOURCES)
def test_on_a_gpu_every_code_and_scale_is_ours(made: Made, as_on_a_gpu: None, source: str) -> None:
    snapshot = made(source)
    model, info = load(snapshot)
    assert not any(info.values()), info
    tensors, _ = read(snapshot / "text_encoder")
    ours = {ends(name): tensor for name, tensor in tensors.items()}
    theirs = {ends(name): tensor for name, tensor in model.state_dict().items()}
    codes = {name for name, tensor in ours.items() if tensor.dtype == FP8}
    assert codes
    assert codes == {name for name, tensor in theirs.items() if tensor.dtype == FP8}
    for name in codes:
        assert torch.equal(theirs[name].view(torch.uint8), ours[name].view(torch.uint8))
        assert torch.equal(theirs[f"{name}_scale_inv"], ours[f"{name}_scale_inv"])


# Each of these changes to a right snapshot is seen.

UP = "layers.0.mlp.up_proj.weight"


def _renamed(component: Path) -> None:
    rewrite(component, lambda tensors: tensors.update({f"{UP}_scale": tensors.pop(f"{UP}_scale_inv")}))


def _scaled(component: Path) -> None:
    rewrite(component, lambda tensors: tensors[f"{UP}_scale_inv"].mul_(2))


@pytest.mark.parametrize("change", [_renamed, _scaled])
def test_a_changed_scale_is_seen_on_a_cpu(made: Made, copy: Copy, change: Callable[[Path], None]) -> None:
    right = made("z_image")
    snapshot = copy(right)
    change(snapshot / "text_encoder")
    model, _ = load(snapshot)
    wrong = dict(model.named_parameters())[UP].float()  # raw codes where it found no scale
    assert not torch.equal(wrong, dequantised(right / "text_encoder")[UP].to(torch.bfloat16).float())


def test_a_renamed_scale_is_seen_on_a_gpu(made: Made, copy: Copy, as_on_a_gpu: None) -> None:
    snapshot = copy(made("z_image"))
    _renamed(snapshot / "text_encoder")
    _, info = load(snapshot)
    assert any(info.values())


def test_a_name_that_is_dropped_from_the_list_is_seen_on_a_gpu(made: Made, copy: Copy, as_on_a_gpu: None) -> None:
    snapshot = copy(made("z_image"))
    ignored = quantization_config(snapshot / "text_encoder")["ignored_layers"]
    assert ignored
    reconfigure(snapshot / "text_encoder", ignored_layers=ignored[1:])
    _, info = load(snapshot)
    assert info["missing_keys"] == {f"{ignored[0]}.weight_scale_inv"}


def test_a_grid_of_another_shape_is_seen(made: Made, copy: Copy) -> None:
    snapshot = copy(made("z_image"))
    scale = f"{UP}_scale_inv"
    rewrite(snapshot / "text_encoder", lambda tensors: tensors.update({scale: tensors[scale].t().contiguous()}))
    try:
        model, _ = load(snapshot)
    except (RuntimeError, ValueError):
        return
    wrong = dict(model.named_parameters())[UP].float()
    assert not torch.equal(wrong, dequantised(made("z_image") / "text_encoder")[UP].to(torch.bfloat16).float())
