"""Whole conversions of real pipelines: every tensor of the output against the formulas in plain numpy."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_manifests import with_scales_of_rows
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pipelines import copied, saved
from reference import Block, Tensor, amax, fp8_weight, read_safetensors
from safetensors.torch import load_file, save_file

from fp8_convert.converter import ConvertError, convert, plan_conversion, verify
from fp8_convert.converter.cli.demo import run_demo
from fp8_convert.converter.telling.progress import Silent

QWEN_TEXT = r"model\.layers\.\d+\.(self_attn\.[qo]_proj|mlp\.(gate|up|down)_proj)"
QWEN_ATTENTION = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
QWEN_VAE = (
    r"(encoder|decoder)\.(down_blocks|mid_block|up_blocks)\..*(conv\d|conv_shortcut|resample\.1|time_conv|to_qkv|proj)"
)
FLUX_DIT = (
    r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
)
# Which modules become FP8, per pipeline and component: written from the models' descriptions, not from the manifests.
# The tiny encoders' k and v projections have 64 rows, no multiple of the block.
FP8 = {
    "qwen_image": {
        "transformer": QWEN_ATTENTION + r"|transformer_blocks\.\d+\.txt_mlp\.net\.(0\.proj|2)",
        "text_encoder": QWEN_TEXT,
        "vae": QWEN_VAE,
    },
    "qwen_image_edit": {
        "transformer": QWEN_ATTENTION + r"|transformer_blocks\.\d+\.(txt|img)_mlp\.net\.(0\.proj|2)",
        "text_encoder": QWEN_TEXT,
        "vae": QWEN_VAE,
    },
    "qwen_image_layered": {
        "transformer": QWEN_ATTENTION + r"|transformer_blocks\.\d+\.(txt|img)_mlp\.net\.(0\.proj|2)",
        "text_encoder": QWEN_TEXT,
        "vae": QWEN_VAE,
    },
    "z_image": {
        "transformer": r"(layers|noise_refiner|context_refiner)\.\d+\."
        r"(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
        "text_encoder": QWEN_TEXT.replace(r"model\.", "", 1),
    },
    "wan22": dict.fromkeys(
        ["transformer", "transformer_2"],
        r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))",
    ),
    "flux": {
        "transformer": FLUX_DIT,
        "text_encoder": r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
        "text_encoder_2": r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.wi_[01])",
    },
}
GROUPS = [
    (r"(.*attn1?|.*attention)\.to_([qkv])", "qkv"),
    (r"(.*attn)\.add_([qkv])_proj", "added qkv"),
    (r"(.*feed_forward)\.w([13])", "w13"),
]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in read_safetensors(file).items()}


def group_of(name: str) -> str:
    """What shares a per-tensor scale with the weight `name`."""
    module = name.removesuffix(".weight")
    for pattern, label in GROUPS:
        if match := re.fullmatch(pattern, module):
            return f"{match[1]} {label}"
    return name


def check_component(source: Path, output: Path, fp8: str | None, block: Block = None) -> None:
    """Every output tensor of a component is what the contract says, bit for bit, and there is no other.

    block: what a scale covers; `fp8`: the modules that must be FP8.
    """
    before, after = tensors(source), tensors(output)
    converted = [n for n in before if fp8 and n.endswith(".weight") and re.fullmatch(fp8, n.removesuffix(".weight"))]
    assert {n for n, t in after.items() if t[0] == "F8_E4M3"} == set(converted)
    assert converted or not fp8
    groups: dict[str, list[Tensor]] = {}
    for name in converted:
        groups.setdefault(group_of(name), []).append(before[name])
    expected = {name: t for name, t in before.items() if name not in converted}
    for name in converted:
        expected |= fp8_weight(name, before[name], amax(*groups[group_of(name)]), block)
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert after[name] == tensor, name


SOURCES = [(name, torch.bfloat16) for name in FP8] + [
    (name, dtype) for name in ("z_image", "wan22") for dtype in (torch.float16, torch.float32)
]


@pytest.mark.parametrize(("name", "dtype"), SOURCES)
def test_every_tensor_against_the_reference(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source, output = saved(name, dtype=dtype), tmp_path / "out"
    convert(source, output)
    for folder in (p for p in source.iterdir() if list(p.glob("*.safetensors"))):
        block = (128, 128) if folder.name.startswith("text_encoder") else None
        check_component(folder, output / folder.name, FP8[name].get(folder.name), block)


def test_the_default_manifest_against_the_reference(tmp_path: Path) -> None:
    """It runs the double-stream feed-forward in FP8 too, which FLUX.1's own manifest ignores."""
    source, output = saved("flux"), tmp_path / "out"
    convert(source, output, manifest="default", components=["transformer"])
    fp8 = FLUX_DIT + r"|transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)"
    check_component(source / "transformer", output / "transformer", fp8)


def test_wan_as_published_in_fp32(tmp_path: Path) -> None:
    source = saved("wan22", fp32_dits=True)
    convert(source, tmp_path / "out")
    for component, fp8 in FP8["wan22"].items():
        check_component(source / component, tmp_path / "out" / component, fp8)


def test_shards_and_groups_across_them(tmp_path: Path) -> None:
    source = saved("z_image", max_shard_size="300KB")
    result = convert(source, tmp_path / "out")
    spread = [g for s in result.plan.shards for g in s.schedule.measured]
    assert spread
    for component, fp8 in FP8["z_image"].items():
        block = (128, 128) if component == "text_encoder" else None
        check_component(source / component, tmp_path / "out" / component, fp8, block)
        index = next((tmp_path / "out" / component).glob("*.index.json"), None)
        shards = sorted((tmp_path / "out" / component).glob("*.safetensors"))
        if len(shards) == 1:
            assert index is None
            continue
        assert index is not None
        read = json.loads(index.read_text())
        assert read["weight_map"] == {n: s.name for s in shards for n in read_safetensors(s)}
        total = sum(len(t[2]) for s in shards for t in read_safetensors(s).values())
        assert read["metadata"]["total_size"] == total
        assert [s.name for s in shards] == sorted(p.name for p in (source / component).glob("*.safetensors"))


def test_block_scales_for_the_dit(tmp_path: Path) -> None:
    source = saved("z_image")
    convert(source, tmp_path / "out", weight_block_size=(128, 128))
    check_component(source / "transformer", tmp_path / "out" / "transformer", FP8["z_image"]["transformer"], (128, 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_of_rows(dtype: torch.dtype, tmp_path: Path) -> None:
    """In both modes, over shards; members of fusion groups have their own scales, so nothing is read twice."""
    source = saved("z_image", dtype=dtype, max_shard_size="300KB")
    result = convert(source, tmp_path / "out", manifest=with_scales_of_rows("z-image"))
    assert result.plan.bytes_read_twice == 0
    encoder = FP8["z_image"]["text_encoder"].replace("[qo]", "[qkvo]")  # its k and v have rows, and need no blocks
    for component, fp8 in {**FP8["z_image"], "text_encoder": encoder}.items():
        check_component(source / component, tmp_path / "out" / component, fp8, "channel")
    record = json.loads((tmp_path / "out" / "fp8_convert.json").read_text())
    assert not any(entry["shared_scales"] for entry in record["components"].values())
    assert verify(tmp_path / "out", source=source, manifest=with_scales_of_rows("z-image")).ok


def test_convolutions_have_no_scales_of_rows(tmp_path: Path) -> None:
    source = saved("qwen_image")
    convert(source, tmp_path / "out", manifest=with_scales_of_rows("qwen-image"))
    check_component(source / "vae", tmp_path / "out" / "vae", QWEN_VAE)


def test_blocks_that_are_asked_for_come_before_the_manifests_rows(tmp_path: Path) -> None:
    source = saved("z_image")
    convert(source, tmp_path / "out", manifest=with_scales_of_rows("z-image"), weight_block_size=(128, 128))
    check_component(source / "transformer", tmp_path / "out" / "transformer", FP8["z_image"]["transformer"], (128, 128))


def test_compact_stores_what_w8a8_skips(tmp_path: Path) -> None:
    source = saved("qwen_image")
    convert(source, tmp_path / "out", compact=True)
    before, after = tensors(source / "transformer"), tensors(tmp_path / "out" / "transformer")
    stored = r"transformer_blocks\.\d+\.(img_mod\.1|txt_mod\.1|img_mlp\.net\.(0\.proj|2))\.weight"
    names = [n for n in before if re.fullmatch(stored, n)]
    assert len(names) == 8
    for name in names:
        for key, tensor in fp8_weight(name, before[name], np.float32(0), (128, 128)).items():
            assert after[key] == tensor, key


def test_static_activations(tmp_path: Path) -> None:
    source = saved("z_image") / "transformer"
    plan = plan_conversion(source)
    modules = [t.module for s in plan.shards for t in s.tensors if t.decision.fp8]
    given = {m: 0.01 * (1 + i) for i, m in enumerate(modules)}
    scales = tmp_path / "scales.safetensors"
    save_file({f"{m}.input_scale": torch.tensor(v) for m, v in given.items()}, scales)
    convert(source, tmp_path / "out", activation_scheme="static", input_scales=scales)
    written = tensors(tmp_path / "out")
    for module in modules:
        shared = max(v for m, v in given.items() if group_of(m + ".weight") == group_of(module + ".weight"))
        assert written[module + ".input_scale"] == ("F32", (), np.float32(shared).tobytes())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "static"
    assert verify(tmp_path / "out", source=source).ok
    save_file({f"{m}.input_scale": torch.tensor(0.1) for m in modules[1:]}, scales)
    with pytest.raises(ConvertError, match=re.escape(f"lack {modules[0]}.input_scale")):
        convert(source, tmp_path / "out2", activation_scheme="static", input_scales=scales)


def test_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    source = saved("qwen_image")
    convert(source, tmp_path / "one", workers=1)
    time.sleep(0.01)
    convert(source, tmp_path / "five", workers=5)
    for file in (p for p in (tmp_path / "one").rglob("*") if p.is_file()):
        assert (tmp_path / "five" / file.relative_to(tmp_path / "one")).read_bytes() == file.read_bytes()


def test_ignored_layers_take_their_group_along(tmp_path: Path) -> None:
    source = saved("z_image")
    said: list[str] = []

    class Said(Silent):
        def say(self, line: str) -> None:
            said.append(line)

    convert(
        source,
        tmp_path / "out",
        ignored_layers=["layers.0.attention.to_q", "layers.1.feed_forward.w13"],
        progress=Said(),
    )
    after = tensors(tmp_path / "out" / "transformer")
    kept = [f"layers.0.attention.to_{m}.weight" for m in "qkv"] + [f"layers.1.feed_forward.w{m}.weight" for m in "13"]
    assert [after[name][0] for name in kept] == ["BF16"] * 5
    assert after["layers.0.attention.to_out.0.weight"][0] == "F8_E4M3"
    assert any("layers.0.attention.to_q" in line and "2 other weights" in line for line in said)
    ignored = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    assert {name.removesuffix(".weight") for name in kept} <= set(ignored["ignored_layers"])


def test_sidecars_modes_and_record(tmp_path: Path) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    (source / "LICENSE").write_text("licence")
    (source / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"never")
    previous = os.umask(0o027)
    try:
        convert(source, tmp_path / "out")
    finally:
        os.umask(previous)
    out = tmp_path / "out"
    assert (out / "LICENSE").read_text() == "licence"
    assert (out / "tokenizer" / "tokenizer.json").read_bytes() == (source / "tokenizer" / "tokenizer.json").read_bytes()
    assert not list(out.rglob("*.bin"))
    assert not (out / ".fp8-convert").exists()
    files = [p for p in out.rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o640}
    record = json.loads((out / "fp8_convert.json").read_text())
    assert set(record["files"]) == {p.relative_to(out).as_posix() for p in files} - {"fp8_convert.json"}
    assert str(tmp_path) not in (out / "fp8_convert.json").read_text()
    assert record["components"]["transformer"]["fp8_modules"]["w8a8"] == len(
        [1 for t in tensors(out / "transformer").values() if t[0] == "F8_E4M3"]
    )


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    convert(saved("z_image"), tmp_path / "out")
    loaded = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    weight = loaded["layers.0.feed_forward.w2.weight"]
    scale = loaded["layers.0.feed_forward.w2.weight_scale"]
    original = load_file(saved("z_image") / "transformer" / "diffusion_pytorch_model.safetensors")
    source = original["layers.0.feed_forward.w2.weight"].double()
    error = (weight.double() * scale.double() - source).norm() / source.norm()
    assert scale.shape == ()
    assert error < 0.03  # three bits of mantissa: 31.5 dB


def test_variant_gets_plain_names(tmp_path: Path) -> None:
    source = saved("z_image", dtype=torch.float16, variant="fp16")
    with pytest.raises(ConvertError, match="--variant fp16"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", variant="fp16")
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert not list((tmp_path / "out").rglob("*fp16*"))


def test_component_folder_alone(tmp_path: Path) -> None:
    source = saved("qwen_image")
    convert(source, tmp_path / "whole")
    convert(source / "transformer", tmp_path / "alone")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "whole" / "transformer" / name).read_bytes()
    assert (tmp_path / "alone" / "config.json").read_bytes() == (
        tmp_path / "whole" / "transformer" / "config.json"
    ).read_bytes()


def test_force_replaces_and_drops_stale_files(tmp_path: Path) -> None:
    convert(saved("qwen_image", max_shard_size="400KB"), tmp_path / "out")
    convert(saved("z_image"), tmp_path / "out", force=True)
    convert(saved("z_image"), tmp_path / "fresh")
    assert sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()) == sorted(
        p.relative_to(tmp_path / "fresh") for p in (tmp_path / "fresh").rglob("*") if p.is_file()
    )
    assert verify(tmp_path / "out", source=saved("z_image")).ok


def test_own_manifest(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'name = "own"\n[components.transformer]\nmode = "w8a8"\nkinds = ["Linear"]\n'
        '[[components.transformer.eligible]]\npattern = "feed_forward"\nwhy = "a test"\n'
    )
    source = saved("z_image")
    convert(source, tmp_path / "out", manifest=str(own))
    fp8 = {n for n, t in tensors(tmp_path / "out" / "transformer").items() if t[0] == "F8_E4M3"}
    assert fp8
    assert all("feed_forward" in name for name in fp8)
    with pytest.raises(ConvertError, match="no manifest named 'own'"):
        verify(tmp_path / "out", source=source)
    assert verify(tmp_path / "out", source=source, manifest=str(own)).ok


def test_unknown_class_is_kept_and_reported(tmp_path: Path) -> None:
    source = copied(saved("wan22"), tmp_path / "source")
    index: dict[str, Any] = json.loads((source / "model_index.json").read_text())
    index["transformer_2"] = ["diffusers", "NoSuchTransformer"]
    (source / "model_index.json").write_text(json.dumps(index))
    result = convert(source, tmp_path / "out")
    assert any("NoSuchTransformer" in note for note in result.plan.notes)
    name = "transformer_2/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_demo_paints_what_the_prompts_say(tmp_path: Path) -> None:
    said: list[str] = []
    run_demo(tmp_path / "demo", said.append)
    stated = next(line for line in said if line.startswith("generated"))
    apart = [float(found) for found in re.findall(r"[0-9]+\.[0-9]", stated)]
    assert len(apart) == 4
    assert min(apart) > 25  # dB: far beyond what another picture would give, some 10
    with Image.open(tmp_path / "demo.png") as image:
        for row in (0, 192):  # BF16 above, FP8 below: the apple's middle is red
            red, green, blue = image.getpixel((48 + 96, row + 110))
            assert red > 150 > max(green, blue)


def test_demo_without_the_trained_model(tmp_path: Path) -> None:
    said: list[str] = []
    run_demo(tmp_path / "demo", said.append, tmp_path / "no such folder")
    run_demo(tmp_path / "demo", said.append, tmp_path / "no such folder")
    assert verify(tmp_path / "demo").ok
    text = "\n".join(said)
    assert "fp8 w8a8 tensor" in text
    assert ": ok (" in text
    assert "every promised module is FP8" in text
    assert "The trained model is not installed, and random weights paint noise" in text
    picture = tmp_path / "demo.png"
    with Image.open(picture) as image:
        image.rotate(90).save(picture, pnginfo=image_info(image))
    edited = picture.read_bytes()
    with pytest.raises(
        ConvertError, match=r"demo\.png, where the demo's picture goes, exists and no demo wrote it; move"
    ):
        run_demo(tmp_path / "demo", said.append)
    assert picture.read_bytes() == edited


def image_info(image: Image.Image) -> PngInfo:
    """The texts of a picture, as an editor keeps them."""
    info = PngInfo()
    for key, value in image.info.items():
        info.add_text(str(key), value)
    return info


@pytest.mark.parametrize("content", [b"not a picture", b""])
def test_demo_leaves_a_users_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "demo.png").write_bytes(content)
    with pytest.raises(ConvertError, match=r"demo\.png, where the demo's picture goes, exists and no demo wrote it"):
        run_demo(tmp_path / "demo", lambda line: None)
    assert (tmp_path / "demo.png").read_bytes() == content
    assert not (tmp_path / "demo").exists()
