"""A scale that is not finite and positive is found on every way into a module, without any digest."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from damage import LAYER, SHARD, set_float
from diffusers import ZImageTransformer2DModel
from layers import BLOCKS, Block, fp8_twin
from pipelines import saved
from runs import converted
from safetensors.torch import load_file, save_file
from torch import nn

from fp8_convert.converter import convert
from fp8_convert.converter.format.header import TensorInfo
from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.loader import LoadError, load_component, load_pipeline
from fp8_convert.loader.fill import Filler
from fp8_convert.loader.install import install

BAD = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0]
SCALE = f"{LAYER}.weight_scale"
STORED = "text_encoder/model.safetensors"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted("z_image"), tmp_path / "snapshot"))


@pytest.mark.parametrize("value", BAD, ids=str)
def test_every_bad_value_is_refused_by_name(snapshot: Path, value: float, device: torch.device) -> None:
    set_float(snapshot / SHARD, SCALE, value)
    message = rf"^{SCALE} of transformer holds {value}, and a scale is finite and positive: .* snapshot again\.$"
    with pytest.raises(LoadError, match=message.replace(".weight", r"\.weight")):
        load_component(snapshot, "transformer", device=device)


def test_whole_pipelines_and_block_scales(snapshot: Path, device: torch.device) -> None:
    name = next(n for n in sorted(load_file(snapshot / STORED)) if n.endswith(".weight_scale_inv"))
    set_float(snapshot / STORED, name, math.nan)
    with pytest.raises(LoadError, match=f"^{name} of text_encoder holds nan"):
        load_pipeline(snapshot, device=device, strict=False)


def test_activation_scales(tmp_path: Path, device: torch.device) -> None:
    layers = [n.removesuffix(".weight_scale") for n in load_file(converted("z_image") / SHARD) if "weight_scale" in n]
    save_file({f"{n}.input_scale": torch.tensor(0.02) for n in layers}, tmp_path / "scales.safetensors")
    convert(
        saved("z_image"), tmp_path / "out", device="cpu", activation_scheme="static",
        input_scales=tmp_path / "scales.safetensors",
    )  # fmt: skip
    set_float(tmp_path / "out" / SHARD, f"{LAYER}.input_scale", -math.inf)
    with pytest.raises(LoadError, match=f"^{LAYER}.input_scale of transformer holds -inf"):
        load_component(tmp_path / "out", "transformer", device=device)
    tensors = load_file(tmp_path / "out" / SHARD)
    with_metadata = load_metadata(tmp_path / "out" / SHARD)
    tensors[f"{LAYER}.input_scale"] = torch.tensor(0.02, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "out" / SHARD, metadata=with_metadata)
    with pytest.raises(LoadError, match=r"input_scale of transformer is BF16 \[\], which is not an activation scale"):
        load_component(tmp_path / "out", "transformer", device=device)


def load_metadata(shard: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        return dict(file.metadata())


def test_plain_from_pretrained(snapshot: Path) -> None:
    set_float(snapshot / SHARD, SCALE, math.inf)
    with pytest.raises(LoadError, match=f"^{SCALE} of transformer holds inf"):
        ZImageTransformer2DModel.from_pretrained(snapshot / "transformer")


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", "balanced"])
def test_plain_from_pretrained_onto_cuda(snapshot: Path, device_map: str) -> None:
    set_float(snapshot / SHARD, SCALE, math.inf)
    with pytest.raises(LoadError, match=f"^{SCALE} of transformer holds inf"):
        ZImageTransformer2DModel.from_pretrained(snapshot / "transformer", device_map=device_map)


@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_state_dicts(value: float, block: Block) -> None:
    layer = fp8_twin(nn.Linear(256, 128), "w8a8", block)
    kept = layer.scale.clone()
    name = "weight_scale_inv" if block == 128 else "weight_scale"
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    state[name].flatten()[-1] = value
    with pytest.raises(LoadError, match=f"^0.{name} of W8A8Linear holds {value}"):
        nn.Sequential(layer).load_state_dict({f"0.{key}": tensor for key, tensor in state.items()})
    assert torch.equal(layer.scale, kept)


@pytest.mark.parametrize("cut", range(1, 16))
def test_pieces_that_end_within_a_number_are_checked_in_host_memory(cut: int) -> None:
    """What CUDA gets: bytes in pieces, into memory that cannot be looked at (here there is none at all)."""
    module = install(nn.Linear(256, 256), WeightFormat("storage", (128, 128)))
    info = TensorInfo("weight_scale_inv", "F32", (2, 2), 0, 16)
    for last in (1.0, math.nan):
        raw = torch.tensor([1.0, 2.0, 3.0, last]).view(torch.uint8)
        filler = Filler(module, {"weight_scale_inv": "weight_scale_inv"}, torch.bfloat16, torch.device("meta"), "vae")
        filler.write(info, cut, raw[cut:])
        filler.write(info, 0, raw[:cut])
        with pytest.raises(LoadError, match="weight_scale_inv of vae holds nan" if math.isnan(last) else "vae lacks "):
            filler.finish()
