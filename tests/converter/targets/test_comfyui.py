"""Folders for ComfyUI: read as its loader reads them, and turned back by diffusers' own converters."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from diffusers.loaders import single_file_utils as single_file
from hub_server import HubServer, running_hub
from pipelines import copied, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp8_convert.converter import ConvertError, convert, inspect, plan_conversion, verify
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.format.layout import encode_json
from fp8_convert.converter.format.record import seal
from fp8_convert.converter.telling.progress import Silent
from fp8_convert.loader import load_component, load_pipeline
from fp8_convert.loader.checkpoint import LoadError

# What is quantised with one scale, by the families' manifests.
GROUPS = {
    "z_image": (r"(.*\.attention)\.to_[qkv]", r"(.*\.feed_forward)\.w[13]"),
    "qwen_image": (r"(.*\.attn)\.to_[qkv]", r"(.*\.attn)\.add_[qkv]_proj"),
    "wan22": (r"(.*\.attn1)\.to_[qkv]",),
}
FILES = {
    "z_image": {
        "transformer": "diffusion_models/z-image-transformer-fp8.safetensors",
        "text_encoder": "text_encoders/z-image-text_encoder-fp8.safetensors",
        "vae": "vae/z-image-vae.safetensors",
    },
    "qwen_image": {
        "transformer": "diffusion_models/qwen-image-transformer-fp8.safetensors",
        "text_encoder": "text_encoders/qwen-image-text_encoder-fp8.safetensors",
        "vae": "vae/qwen-image-vae.safetensors",
    },
    "wan22": {
        "transformer": "diffusion_models/wan2.2-transformer-fp8.safetensors",
        "transformer_2": "diffusion_models/wan2.2-transformer_2-fp8.safetensors",
        "vae": "vae/wan2.2-vae.safetensors",
    },
}


def _same(weights: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return weights


def _without_model(weights: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


BACK: dict[tuple[str, str], Callable[..., dict[str, Any]]] = {
    ("z_image", "transformer"): single_file.convert_z_image_transformer_checkpoint_to_diffusers,
    ("z_image", "text_encoder"): _without_model,
    ("z_image", "vae"): single_file.convert_ldm_vae_checkpoint,
    ("qwen_image", "transformer"): _same,
    ("qwen_image", "text_encoder"): _same,
    ("wan22", "transformer"): single_file.convert_wan_transformer_to_diffusers,
    ("wan22", "transformer_2"): single_file.convert_wan_transformer_to_diffusers,
}


class Comfy:
    """One file as ComfyUI takes it: `weights` dequantised in float32, `layers` as its header states them."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        self.layers = json.loads(metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        for layer, stated in self.layers.items():
            assert stated["format"] == "float8_e4m3fn"
            assert tensors[f"{layer}.weight"].dtype == torch.float8_e4m3fn
            scale = tensors.pop(f"{layer}.weight_scale")
            assert (scale.dtype, scale.shape) == (torch.float32, ())
            tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].float() * scale
        assert not [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
        assert not [name for name in tensors if name.endswith("_scale")]
        self.weights = tensors


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder for ComfyUI of a tiny pipeline. Not to be changed."""
    root = tmp_path_factory.mktemp("comfyui")

    def output(name: str) -> Path:
        if not (root / name).exists():
            convert(saved(name), root / name, target="comfyui")
        return root / name

    return output


def expected(name: str, component: str, fp8: set[str]) -> dict[str, torch.Tensor]:
    """The source's weights, those of `fp8` as the formula makes them, dequantised."""
    source = reference.read_safetensors(next((saved(name) / component).glob("*.safetensors")))
    groups: dict[str, list[str]] = {}
    for weight in fp8:
        group = next((m[1] + p for p in GROUPS[name] if (m := re.fullmatch(p, weight.removesuffix(".weight")))), weight)
        groups.setdefault(group, []).append(weight)
    scales = {w: reference.tensor_scale(reference.amax(*(source[m] for m in g))) for g in groups.values() for w in g}
    given = {}
    for weight, (dtype, shape, data) in source.items():
        if weight in fp8:
            codes = reference.quantize(reference.floats(dtype, data), scales[weight])
            values = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float() * float(scales[weight])
            given[weight] = values.reshape(shape)
        else:
            given[weight] = torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).reshape(shape)
    return given


_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


@pytest.mark.parametrize(("name", "component"), BACK)
def test_every_weight_is_the_formulas(outputs: Callable[[str], Path], name: str, component: str) -> None:
    file = Comfy(outputs(name) / FILES[name][component])
    config = json.loads((saved(name) / component / "config.json").read_text())
    originals = {f"{layer}.weight" for layer in file.layers}
    marked = {n: torch.full_like(w, n in originals, dtype=torch.float32) for n, w in file.weights.items()}

    weights = BACK[name, component](dict(file.weights), config=config)
    fp8 = {n for n, w in BACK[name, component](marked, config=config).items() if bool(w.flatten()[0])}

    given = expected(name, component, fp8)
    assert weights.keys() == given.keys()
    for weight, value in given.items():
        assert weights[weight].dtype == value.dtype, weight
        assert torch.equal(weights[weight], value), weight
    assert (
        len(fp8)
        == {
            "transformer": {"z_image": 28, "qwen_image": 20, "wan22": 20},
            "text_encoder": dict.fromkeys(("z_image", "qwen_image"), 14),
            "vae": {"z_image": 0},
            "transformer_2": {"wan22": 20},
        }[component][name]
    )


@pytest.mark.parametrize("name", FILES)
def test_files_and_nothing_else(outputs: Callable[[str], Path], name: str) -> None:
    folder = outputs(name)

    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}

    assert found == {*FILES[name].values(), "fp8_convert.json"}


@pytest.mark.parametrize("name", FILES)
def test_storage_is_for_full_precision_and_w8a8_is_not(outputs: Callable[[str], Path], name: str) -> None:
    for component, path in FILES[name].items():
        full = {
            stated.get("full_precision_matrix_mult", False) for stated in Comfy(outputs(name) / path).layers.values()
        }
        assert (
            full == {"transformer": {False}, "transformer_2": {False}, "text_encoder": {True}, "vae": set()}[component]
        )


def test_codes_are_those_of_the_native_target(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    convert(saved("z_image"), tmp_path / "native", components=["transformer"])
    native = load_file(tmp_path / "native" / "transformer" / "diffusion_pytorch_model.safetensors")
    comfy = load_file(outputs("z_image") / FILES["z_image"]["transformer"])

    fused = comfy["layers.1.attention.qkv.weight"].view(torch.uint8)
    members = [native[f"layers.1.attention.to_{x}.weight"].view(torch.uint8) for x in "qkv"]

    assert torch.equal(fused, torch.cat(members))
    assert torch.equal(comfy["layers.1.attention.qkv.weight_scale"], native["layers.1.attention.to_k.weight_scale"])


def test_kept_members_of_a_fused_projection_are_joined_too(tmp_path: Path) -> None:
    result = convert(saved("z_image"), tmp_path / "out", target="comfyui", ignored_layers=["layers.1.attention.to_k"])

    file = Comfy(tmp_path / "out" / FILES["z_image"]["transformer"])
    source = load_file(saved("z_image") / "transformer" / "diffusion_pytorch_model.safetensors")
    members = [source[f"layers.1.attention.to_{x}.weight"] for x in "qkv"]
    assert "layers.1.attention.qkv" not in file.layers
    assert torch.equal(file.weights["layers.1.attention.qkv.weight"], torch.cat(members))
    assert "layers.0.attention.qkv" in file.layers
    assert any("names one member of a fused projection" in note for note in result.plan.notes)


def test_compact_stores_in_one_scale_for_full_precision(tmp_path: Path) -> None:
    convert(saved("qwen_image"), tmp_path / "out", target="comfyui", compact=True)

    layers = Comfy(tmp_path / "out" / FILES["qwen_image"]["transformer"]).layers

    assert layers["transformer_blocks.0.img_mlp.net.2"] == {
        "format": "float8_e4m3fn",
        "full_precision_matrix_mult": True,
    }
    assert layers["transformer_blocks.0.attn.to_q"] == {"format": "float8_e4m3fn"}
    assert verify(tmp_path / "out", source=saved("qwen_image")).ok


def test_many_shards_become_one_file_with_the_same_bytes(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    sharded = saved("z_image", max_shard_size="300KB")

    convert(sharded, tmp_path / "out", target="comfyui", workers=3)

    path = FILES["z_image"]["transformer"]
    assert (tmp_path / "out" / path).read_bytes() == (outputs("z_image") / path).read_bytes()
    entry = json.loads((tmp_path / "out" / "fp8_convert.json").read_text())["shards"][path]
    parts = [entry, *entry["parts"]]
    assert entry["component"] == "transformer"
    assert {p["source"] for p in parts} == {
        f"transformer/{p.name}" for p in (sharded / "transformer").glob("*.safetensors")
    }
    for part in parts:
        data = (sharded / part["source"]).read_bytes()
        assert part["source_size"] == len(data)
        assert part["source_sha256"] == hashlib.sha256(data).hexdigest()
    assert verify(tmp_path / "out", source=sharded).ok


class Stop(Silent):
    """Stops a conversion after a share of its bytes, as Ctrl-C does."""

    def __init__(self, source: Path, share: float) -> None:
        super().__init__()
        plan = plan_conversion(source, target="comfyui")
        self.left = int(share * (plan.bytes_to_read + plan.bytes_read_twice))

    def advance(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("share", "shards_kept"), [(0.1, False), (0.97, True)])
def test_an_interrupted_run_goes_on_with_the_next_file(tmp_path: Path, share: float, shards_kept: bool) -> None:
    source = saved("z_image", max_shard_size="2MB")
    convert(source, tmp_path / "whole", target="comfyui")

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", target="comfyui", progress=Stop(source, share))
    assert not (tmp_path / "out" / "fp8_convert.json").exists()
    with pytest.raises(LoadError, match="unfinished"):
        load_pipeline(tmp_path / "out")
    result = convert(source, tmp_path / "out", target="comfyui")

    assert (result.resumed_shards > 1) is shards_kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_is_written_anew_where_one_of_its_shards_changed(tmp_path: Path) -> None:
    source = copied(saved("z_image", max_shard_size="2MB"), tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", target="comfyui", progress=Stop(source, 0.97))
    shard = sorted((source / "transformer").glob("*.safetensors"))[-1]
    weights = load_file(shard)
    save_file({name: -weight for name, weight in weights.items()}, shard, {"format": "pt"})

    convert(source, tmp_path / "out", target="comfyui")

    assert verify(tmp_path / "out", source=source).ok


def test_a_finished_file_that_is_damaged_is_written_anew(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(saved("z_image"), tmp_path / "out", target="comfyui", progress=Stop(saved("z_image"), 0.97))
    staged = tmp_path / "out" / ".fp8-convert" / "new" / FILES["z_image"]["transformer"]
    raw = bytearray(staged.read_bytes())
    raw[-1] ^= 1
    staged.write_bytes(raw)

    convert(saved("z_image"), tmp_path / "out", target="comfyui")

    assert contents(tmp_path / "out") == contents(outputs("z_image"))


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    source = saved("wan22")
    first = convert(source, tmp_path / "out", target="comfyui")
    again = convert(source, tmp_path / "out", target="comfyui", check=True)
    assert not first.already_done
    assert again.already_done
    with pytest.raises(ConvertError, match=r"target was 'comfyui' and is now 'native'"):
        convert(source, tmp_path / "out")


def test_a_finished_folder_is_shown_while_it_is_replaced(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(outputs("z_image"), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        convert(
            saved("z_image"), folder, target="comfyui", compact=True, force=True, progress=Stop(saved("z_image"), 0.97)
        )
    inspection = inspect(folder)
    assert inspection.ok
    assert str(inspection.unfinished) == "unfinished, 2 of 3 shards"
    convert(saved("z_image"), folder, target="comfyui", compact=True, force=True)
    assert verify(folder, source=saved("z_image")).ok
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {
        *(Path(path).name for path in FILES["z_image"].values()),
        "fp8_convert.json",
    }


# From the Hub, and of one component


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path / "home") as server:
        yield server


def test_streamed_from_the_hub_it_is_the_same(hub: HubServer, tmp_path: Path) -> None:
    source = copied(saved("z_image", max_shard_size="300KB"), tmp_path / "source")
    (source / "LICENSE").write_text("a licence")
    hub.add_repo("Tongyi-MAI/Z-Image-Turbo", source)

    convert("Tongyi-MAI/Z-Image-Turbo", tmp_path / "streamed", target="comfyui", stream=True)
    convert(source, tmp_path / "local", target="comfyui")

    streamed, local = contents(tmp_path / "streamed"), contents(tmp_path / "local")
    del streamed["fp8_convert.json"], local["fp8_convert.json"]
    assert streamed == local
    assert "LICENSE" in local
    assert verify(tmp_path / "streamed", source="Tongyi-MAI/Z-Image-Turbo").ok


def test_a_component_on_its_own(tmp_path: Path) -> None:
    source = saved("wan22") / "transformer"

    convert(source, tmp_path / "out", target="comfyui")

    (file,) = (tmp_path / "out").rglob("*.safetensors")
    assert file.relative_to(tmp_path / "out").as_posix() == "diffusion_models/wan2.2-diffusion_model-fp8.safetensors"
    assert verify(tmp_path / "out", source=source).ok
    assert inspect(tmp_path / "out").ok


def test_components_that_are_not_asked_for_are_not_written(tmp_path: Path) -> None:
    result = convert(saved("z_image"), tmp_path / "out", target="comfyui", components=["transformer"])

    assert contents(tmp_path / "out").keys() == {FILES["z_image"]["transformer"], "fp8_convert.json"}
    assert any("text_encoder is left out" in note for note in result.plan.notes)
    assert any("vae is left out" in note for note in result.plan.notes)
    assert verify(tmp_path / "out", source=saved("z_image")).ok


# What ComfyUI looks for beside weights


def test_umt5_brings_its_tokenizer(tmp_path: Path) -> None:
    source = copied(saved("wan22"), tmp_path / "source")
    (source / "tokenizer" / "spiece.model").write_bytes(b"\x0a\x0bpieces")

    convert(source, tmp_path / "out", target="comfyui")

    path = "text_encoders/wan2.2-text_encoder.safetensors"
    weights = load_file(tmp_path / "out" / path)
    original = load_file(source / "text_encoder" / "model.safetensors")
    assert bytes(weights.pop("spiece_model").tolist()) == b"\x0a\x0bpieces"
    assert weights.keys() == original.keys()
    assert all(torch.equal(weights[name], original[name]) for name in original)
    entry = json.loads((tmp_path / "out" / "fp8_convert.json").read_text())["shards"][path]
    assert [part["source"] for part in entry["parts"]] == ["tokenizer/spiece.model"]
    assert verify(tmp_path / "out", source=source).ok
    assert convert(source, tmp_path / "out", target="comfyui").already_done


def test_another_tokenizer_is_another_source(tmp_path: Path) -> None:
    source = copied(saved("wan22"), tmp_path / "source")
    (source / "tokenizer" / "spiece.model").write_bytes(b"pieces")
    convert(source, tmp_path / "out", target="comfyui")
    folder = copied(tmp_path / "out", tmp_path / "forged")
    path = folder / "text_encoders" / "wan2.2-text_encoder.safetensors"
    path.write_bytes(path.read_bytes().replace(b"pieces", b"places"))
    reseal(folder, path.relative_to(folder).as_posix())
    problems = {f.problem for f in verify(folder, source=source).findings}
    assert problems == {"spiece_model differs from what the source gives"}

    (source / "tokenizer" / "spiece.model").write_bytes(b"places")
    with pytest.raises(ConvertError, match=r"source's tokenizer/spiece\.model has changed"):
        convert(source, tmp_path / "out", target="comfyui")
    assert not verify(tmp_path / "out", source=source).ok


def test_umt5_without_its_tokenizer_is_left_out_and_said() -> None:
    notes = plan_conversion(saved("wan22"), target="comfyui").notes
    assert any("text_encoder is left out: ComfyUI reads the tokenizer tokenizer/spiece.model" in n for n in notes)


@pytest.mark.parametrize(("name", "marked"), [("qwen_image_edit_plus", True), ("qwen_image_edit", False)])
def test_edit_models_say_how_references_are_timed(tmp_path: Path, name: str, marked: bool) -> None:
    convert(saved(name), tmp_path / "out", target="comfyui", components=["transformer"])
    (file,) = (tmp_path / "out").rglob("*.safetensors")
    assert ("__index_timestep_zero__" in load_file(file)) is marked


def test_static_activations_bring_their_scales(tmp_path: Path) -> None:
    plan = plan_conversion(saved("z_image"), components=["transformer"])
    modules = [t.module for c in plan.components for t in c.tensors if t.decision.fp8]
    scales = {f"{m}.input_scale": torch.tensor(0.5 + i / 64) for i, m in enumerate(modules)}
    save_file(scales, tmp_path / "scales.safetensors")
    static = {"activation_scheme": "static", "input_scales": tmp_path / "scales.safetensors"}

    convert(saved("z_image"), tmp_path / "out", target="comfyui", **static)  # type: ignore[arg-type]

    written = load_file(tmp_path / "out" / FILES["z_image"]["transformer"])
    largest = max(scales[f"layers.0.attention.to_{x}.input_scale"] for x in "qkv")
    assert written["layers.0.attention.qkv.input_scale"] == largest
    assert verify(tmp_path / "out", source=saved("z_image")).ok


# What cannot be written


OWN = """
name = "own"
description = "A manifest without fusion groups"
[components.transformer]
classes = ["ZImageTransformer2DModel"]
mode = "w8a8"
kinds = ["Linear"]
[[components.transformer.eligible]]
pattern = "layers.*.feed_forward.*"
why = "a test"
[[components.transformer.eligible]]
pattern = "layers.*.attention.to_*"
why = "a test"
"""


def test_members_of_a_fused_projection_need_one_scale(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN)
    with pytest.raises(ConvertError, match=r"no fusion group of the manifest gives them one scale"):
        plan_conversion(saved("z_image"), target="comfyui", manifest=str(tmp_path / "own.toml"))


def test_members_of_a_fused_projection_are_converted_together(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN.replace("attention.to_*", "attention.to_q"))
    with pytest.raises(ConvertError, match=r"to_q\.weight and .*to_k\.weight are one tensor .* stored differently"):
        plan_conversion(saved("z_image"), target="comfyui", manifest=str(tmp_path / "own.toml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_shard_size": "1MB"}, "writes one file a component; drop --max-shard-size"),
        ({"weight_block_size": [128, 128]}, "ComfyUI reads one scale per tensor; drop --weight-block-size"),
        ({"components": ["vae"]}, "keeps vae: ComfyUI has FP8 for linear layers alone"),
    ],
)
def test_settings_that_do_not_go_with_it(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        plan_conversion(saved("qwen_image"), target="comfyui", **arguments)


def test_a_model_without_a_key_map_is_refused_by_name() -> None:
    with pytest.raises(ConvertError, match=r"names in ComfyUI .*FluxTransformer2DModel"):
        plan_conversion(saved("flux"), target="comfyui", components=["transformer"])


# The finished folder


def test_the_loader_says_what_it_is_for(outputs: Callable[[str], Path]) -> None:
    for load in (load_pipeline, lambda folder: load_component(folder, "transformer")):
        with pytest.raises(LoadError, match=r"was written with --target comfyui: .* `fp8-convert import` and --base"):
            load(outputs("z_image"))


def test_it_is_not_converted_again(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="already converted"):
        convert(outputs("z_image"), tmp_path / "again")


def test_inspect_shows_it(outputs: Callable[[str], Path]) -> None:
    inspection = inspect(outputs("z_image"))
    assert inspection.ok
    assert inspection.target == "comfyui"
    fp8 = {c.name: sum(g.tensors for g in c.groups if g.what == "fp8") for c in inspection.components}
    assert fp8 == {"transformer": 20, "text_encoder": 14, "vae": 0}
    assert inspect(outputs("z_image") / FILES["z_image"]["transformer"]).ok


def edited(folder: Path, path: str, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change a file's header and metadata."""
    raw = (folder / path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    stated = json.loads(header["__metadata__"]["_quantization_metadata"])
    change(header, stated["layers"])
    if "_quantization_metadata" in header["__metadata__"]:
        header["__metadata__"]["_quantization_metadata"] = json.dumps(stated)
    text = json.dumps(header).encode()
    (folder / path).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    reseal(folder, path)


def reseal(folder: Path, path: str) -> None:
    """State a file's new digest in the record, as one who forges it would."""
    data = (folder / path).read_bytes()
    record = json.loads((folder / "fp8_convert.json").read_text())
    for entry in (record["files"][path], record["shards"][path]):
        entry["size"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (folder / "fp8_convert.json").write_bytes(encode_json(seal(record)))


QKV = "layers.0.attention.qkv"
EDITS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "a layer is not stated": (lambda header, layers: layers.pop(QKV), "is not right of layers.0.attention.qkv"),
    "a layer too many": (lambda header, layers: layers.update(more=layers[QKV]), "is not right of more"),
    "another format": (lambda header, layers: layers.update({QKV: {"format": "nvfp4"}}), f"is not right of {QKV}"),
    "full precision": (
        lambda header, layers: layers[QKV].update(full_precision_matrix_mult=True),
        f"is not right of {QKV}",
    ),
    "a scale's name": (
        lambda header, layers: header.update({f"{QKV}.scale_weight": header.pop(f"{QKV}.weight_scale")}),
        "has no scale",
    ),
    "a scale's shape": (lambda header, layers: header[f"{QKV}.weight_scale"].update(shape=[1]), "instead of"),
    "no statement": (
        lambda header, layers: header["__metadata__"].pop("_quantization_metadata"),
        "ComfyUI would take codes for weights",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_verify_finds_what_comfyui_would_misread(outputs: Callable[[str], Path], tmp_path: Path, edit: str) -> None:
    folder = copied(outputs("z_image"), tmp_path / "spoilt")
    change, message = EDITS[edit]
    edited(folder, FILES["z_image"]["transformer"], change)

    findings = verify(folder).findings

    assert any(message in finding.problem for finding in findings), findings


def test_verify_finds_scales_that_differ_within_a_group(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(outputs("z_image"), tmp_path / "spoilt")
    path = folder / FILES["z_image"]["transformer"]
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    start = json.loads(raw[8 : 8 + length])["layers.0.feed_forward.w1.weight_scale"]["data_offsets"][0]
    raw[8 + length + start : 8 + length + start + 4] = np.float32(0.5).tobytes()
    path.write_bytes(raw)

    problems = [finding.problem for finding in verify(folder).findings]

    assert "layers.0.feed_forward.w1, layers.0.feed_forward.w3 must share one scale and do not" in problems


def test_verify_against_the_source_finds_other_codes(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(outputs("z_image"), tmp_path / "spoilt")
    path = FILES["z_image"]["transformer"]
    raw = bytearray((folder / path).read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    start = json.loads(raw[8 : 8 + length])["layers.1.attention.qkv.weight"]["data_offsets"][0]
    raw[8 + length + start + 256 * 256] ^= 1  # the first code of to_k
    (folder / path).write_bytes(raw)
    reseal(folder, path)

    problems = [finding.problem for finding in verify(folder, source=saved("z_image")).findings]

    assert "layers.1.attention.to_k.weight differs from what the source gives" in problems


def test_verify_and_inspect_of_a_truncated_file(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    folder, path = copied(outputs("z_image"), tmp_path / "spoilt"), FILES["z_image"]["vae"]
    (folder / path).write_bytes((folder / path).read_bytes()[:-2])
    assert [(f.path, "bytes instead of" in f.problem) for f in verify(folder).findings] == [(path, True)]
    with pytest.raises(ConvertError, match="truncated"):
        inspect(folder)


def test_verify_and_inspect_of_a_folder_without_a_file(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    folder, path = copied(outputs("z_image"), tmp_path / "spoilt"), FILES["z_image"]["vae"]
    (folder / path).unlink()
    assert {(f.path, f.problem) for f in verify(folder).findings} == {(path, "is missing")}
    with pytest.raises(ConvertError, match=rf"lacks {path}; convert it again"):
        inspect(folder)


def test_the_command_line(tmp_path: Path) -> None:
    from click.testing import CliRunner

    for arguments in (
        [str(saved("z_image")), "-o", str(tmp_path / "out"), "--target", "comfyui"],
        ["verify", str(tmp_path / "out")],
        ["inspect", str(tmp_path / "out")],
        [str(saved("z_image")), "--target", "comfyui", "--dry-run"],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output


def test_nothing_that_becomes_fp8_is_refused() -> None:
    with pytest.raises(ConvertError, match="becomes FP8"):
        plan_conversion(saved("wan22"), target="comfyui", ignored_layers=["re:.*"])


def test_the_card_is_carried_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: openrail++\n---\nA model.\n")
    result = convert(source, tmp_path / "out", target="comfyui")
    assert (tmp_path / "out/README.md").read_bytes() == (source / "README.md").read_bytes()
    assert any(note.endswith("left out: ComfyUI has its own") for note in result.plan.notes)


@pytest.mark.parametrize("value", [None, 5])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, value: object) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    path = source / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": value}))
    with pytest.raises(ConvertError, match="The config of AutoencoderKL cannot be read"):
        plan_conversion(source, target="comfyui")
