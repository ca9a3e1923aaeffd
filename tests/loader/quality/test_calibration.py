"""Ranges against hooks of the test's own, and static conversion from them, end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import copied, saved
from runs import bf16, psnr, quiet, run
from safetensors import safe_open
from safetensors.torch import load_file

from fp8_convert.converter import ConvertError, SettingsError, convert
from fp8_convert.converter.plan.scales import read_input_scales
from fp8_convert.loader import calibrate, load_pipeline
from fp8_convert.loader.quality.prompts import Prompt

CUBE = [Prompt("a red cube"), Prompt("a fish")]
SMALL: dict[str, Any] = {
    "prompts": CUBE, "steps": 2, "height": 64, "width": 64, "device": "cpu", "extra": {"max_sequence_length": 32},
}  # fmt: skip
VIDEO: dict[str, Any] = {**SMALL, "prompts": [Prompt("a red cube", "bad")], "frames": 5, "guidance": 4.0}


def largest_inputs(pipe: Any, components: tuple[str, ...], calls: Any) -> dict[str, float]:
    """max|x| of every linear of the components while `calls` runs."""
    found: dict[str, float] = {}
    for component in components:
        for name, module in getattr(pipe, component).named_modules():
            if isinstance(module, torch.nn.Linear):

                def note(_: Any, inputs: Any, key: str = f"{component}.{name}") -> None:
                    found[key] = max(found.get(key, 0.0), float(inputs[0].abs().max()))

                module.register_forward_pre_hook(note)
    calls()
    return found


def test_the_largest_of_all_prompts_and_steps(tmp_path: Path) -> None:
    found = calibrate(saved("z_image"), output=tmp_path / "scales.safetensors", **SMALL)
    pipe = bf16("z_image")

    def calls() -> None:
        for prompt in CUBE:
            generator = torch.Generator().manual_seed(0)
            pipe(prompt=prompt.text, num_inference_steps=2, height=64, width=64, max_sequence_length=32,
                 generator=generator)  # fmt: skip

    largest = largest_inputs(pipe, ("transformer",), calls)
    layers = {layer.name: layer for layer in found.layers}
    for name, layer in layers.items():
        assert layer.largest == largest[f"transformer.{name}"]
        parent, _, last = name.rpartition(".")
        group = next((g for g in ({"to_q", "to_k", "to_v"}, {"w1", "w3"}) if last in g), {last})
        assert layer.clip == pytest.approx(max(layers[f"{parent}.{member}"].largest for member in group))
    stored = load_file(tmp_path / "scales.safetensors")
    assert {n: float(v) for n, v in stored.items()} == {f"{n}.input_scale": layer.scale for n, layer in layers.items()}
    with safe_open(tmp_path / "scales.safetensors", "pt") as file:
        how = json.loads(file.metadata()["calibration"])
    assert (how["method"], how["prompts"], how["steps"]) == ("max", 2, 2)


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_other_methods_clip(method: str) -> None:
    options = SMALL | {"prompts": CUBE[:1]}
    whole = calibrate(saved("z_image"), **options)
    found = calibrate(saved("z_image"), method=method, percentile=99.0, **options)
    pairs = list(zip(whole.layers, found.layers, strict=True))
    assert all(cut.scale <= full.scale for full, cut in pairs)
    assert any(cut.scale < 0.95 * full.scale for full, cut in pairs)
    assert "saturates beyond" in str(found)


def test_two_dits_apart_and_a_static_pipeline_from_them(tmp_path: Path) -> None:
    scales = tmp_path / "scales.safetensors"
    found = calibrate(saved("wan22"), output=scales, **VIDEO)
    assert {layer.component for layer in found.layers} == {"transformer", "transformer_2"}
    assert [*read_input_scales(scales)] == [f"{layer.component}.{layer.name}" for layer in found.layers]
    both = {c: {r.name: r.scale for r in found.layers if r.component == c} for c in ("transformer", "transformer_2")}
    assert both["transformer"] != both["transformer_2"]
    convert(saved("wan22"), tmp_path / "static", device="cpu", activation_scheme="static", input_scales=scales)
    convert(saved("wan22"), tmp_path / "dynamic", device="cpu")
    static, dynamic = (
        quiet(load_pipeline(tmp_path / name, device="cpu", backend="scaled_mm")) for name in ("static", "dynamic")
    )
    assert float(static.transformer_2.blocks[0].ffn.net[2].input_scale) == pytest.approx(
        both["transformer_2"]["blocks.0.ffn.net.2"]
    )
    video, closest, plain = run(static, "wan22"), run(dynamic, "wan22"), run(bf16("wan22"), "wan22")
    assert psnr(video, closest) > 30
    assert psnr(video, plain) > psnr(closest, plain) - 3
    assert not torch.equal(video, closest)


def test_a_layer_that_never_ran_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    message = (
        r"^16 of 40 layers never ran|^20 of 40 layers never ran and have no range \(transformer_2.blocks.0.attn1.to_"
    )
    with pytest.raises(ConvertError, match=message) as error:
        calibrate(saved("wan22"), output=tmp_path / "scales.safetensors", **VIDEO | {"steps": 1})
    assert "raise --steps, or keep them with --ignored-layers or --component." in str(error.value)
    assert [*tmp_path.iterdir()] == []
    found = calibrate(saved("wan22"), components=["transformer"], **VIDEO | {"steps": 1})
    assert next(iter(found.input_scales)) == "blocks.0.attn1.to_k.input_scale", "alone"


def test_inputs_that_are_not_finite_are_named() -> None:
    pipe = bf16("z_image")
    pipe.transformer.layers[1].attention_norm1.weight.data[3] = float("nan")
    with pytest.raises(
        ConvertError, match=r"^The inputs of \d+ layers hold NaN or Inf, such as those of transformer\."
    ):
        calibrate(saved("z_image"), transformer=pipe.transformer, **SMALL)


def test_what_a_manifest_with_blocks_cannot_have(tmp_path: Path) -> None:
    from fp8_convert.converter import load_manifest

    text = load_manifest("z-image").text.replace('mode = "w8a8"', 'mode = "w8a8"\nweight_block_size = [128, 128]')
    (tmp_path / "own.toml").write_text(text.replace('name = "z-image"', 'name = "own"', 1))
    with pytest.raises(ConvertError, match="block128x128 scales, and static activations go with one scale per tensor"):
        calibrate(saved("z_image"), manifest=str(tmp_path / "own.toml"), **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "entropy"}, "method is 'entropy'; use one of max"),
        ({"seeds": 0}, "seeds is 0; give"),
        ({"prompts": []}, "prompts"),
        ({"output": "scales.bin"}, "must end in .safetensors"),
        ({"ignored_layers": "img_mlp"}, "ignored_layers is 'img_mlp'"),
    ],
)
def test_what_means_nothing_is_said_before_anything_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        calibrate("no/such-folder", **SMALL | options)


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    file = tmp_path / "scales.safetensors"
    file.write_text("mine")
    with pytest.raises(ConvertError, match=r"exists; name another file, or replace it with --force"):
        calibrate(saved("z_image"), output=file, **SMALL)
    assert file.read_text() == "mine"
    calibrate(saved("z_image"), output=file, force=True, **SMALL | {"prompts": CUBE[:1], "steps": 1})
    assert read_input_scales(file)
    with pytest.raises(ConvertError, match="does not exist; create it"):
        calibrate(saved("z_image"), output=tmp_path / "no" / "scales.safetensors", **SMALL)


def test_sources_that_cannot_be_calibrated(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="is a single component, which makes no pictures; give its pipeline"):
        calibrate(saved("z_image") / "transformer", **SMALL)
    convert(saved("z_image"), tmp_path / "fp8", device="cpu")
    with pytest.raises(ConvertError, match="already"):
        calibrate(tmp_path / "fp8", **SMALL)
    broken = copied(saved("z_image"), tmp_path / "broken")
    (broken / "vae" / "config.json").write_text("{}")
    with pytest.raises(Exception, match="vae"):
        calibrate(broken, **SMALL)


@pytest.mark.gpu
def test_static_products_of_a_gpu_are_close_to_dynamic_ones(tmp_path: Path) -> None:
    scales = tmp_path / "scales.safetensors"
    calibrate(saved("wan22"), output=scales, **VIDEO | {"device": "cuda"})
    convert(saved("wan22"), tmp_path / "static", activation_scheme="static", input_scales=scales)
    convert(saved("wan22"), tmp_path / "dynamic")
    static, dynamic = (quiet(load_pipeline(tmp_path / name, device="cuda")) for name in ("static", "dynamic"))
    assert static.transformer.blocks[0].ffn.net[2].product_on(torch.device("cuda", 0)).product == "tensor"
    assert psnr(run(static, "wan22"), run(dynamic, "wan22")) > 30
