"""`compare`: its numbers against pipelines run by hand, faults that are planted, and input that is hostile."""

from __future__ import annotations

import errno
import functools
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from comparing import PROMPTS, SMALL, compared, held, painter
from damage import LAYER, SHARD, rewrite
from diffusers import ZImageTransformer2DModel
from runs import bf16, converted, loaded

from fp8_convert.converter import convert
from fp8_convert.converter.telling.errors import ConvertError, Fp8Error, SettingsError
from fp8_convert.loader import compare
from fp8_convert.loader.quality.prompts import Prompt

VAE = "vae/diffusion_pytorch_model.safetensors"


def by_hand(pipe: Any, prompt: str) -> np.ndarray:
    return pipe(
        prompt=prompt, num_inference_steps=1, height=32, width=32, max_sequence_length=32,
        generator=torch.Generator().manual_seed(3), output_type="np",
    ).images[0]  # fmt: skip


def test_distances_are_those_of_the_pipelines_run_by_hand() -> None:
    found = compared()
    assert [(case.case.prompt, case.case.seed, case.broken) for case in found.cases] == [
        (Prompt(prompt), 3, ()) for prompt in PROMPTS
    ]
    apart = by_hand(loaded("z_image"), PROMPTS[0]).astype(np.float64) - by_hand(bf16("z_image"), PROMPTS[0])
    psnr = [d.psnr for case in found.cases for d in case.fp8 if d]
    assert psnr[0] == pytest.approx(10 * math.log10(1 / np.square(apart).mean()), abs=1e-6)
    assert found.summary is not None
    assert (found.summary.psnr, found.summary.worst_psnr) == (pytest.approx(np.mean(psnr)), min(psnr))
    assert 30 < found.summary.worst_psnr < 60
    assert found.ok


def test_the_control_is_nearer_than_fp8_and_no_copy() -> None:
    found = compared()
    control, fp8 = found.control_summary, found.summary
    assert control is not None
    assert fp8 is not None
    assert control.identical == 0
    assert control.psnr > fp8.psnr
    assert "A harmless change moves them" in found.verdict
    assert "attention by PyTorch's plain kernel" in found.verdict


def test_the_report_has_layers_times_and_what_limits_it() -> None:
    text = str(compared())
    assert "z_image against z_image-bfloat16: 2 prompts, 1 seed, 1 step" in text
    assert "storage block128x128  31." in text
    assert "28 W8A8 linears ran dequantised (the CPU has no FP8 matrix units)" in text
    assert compared().verdict in text
    assert not any(set(line) & {"\x1b", "\n"} for line in text.split("\n"))
    for run in (compared().fp8.run, compared().original.run):
        assert len(run.seconds) == 2
        assert run.seconds_per_case == run.seconds[1]


def test_json_has_everything_and_null_for_what_is_infinite() -> None:
    data = json.loads(json.dumps(compared().to_json(), allow_nan=False))
    assert data["ok"] is True
    assert [case["prompt"] for case in data["cases"]] == [*PROMPTS]
    assert data["cases"][0]["frames"][0]["psnr"] == pytest.approx(compared().cases[0].fp8[0].psnr, abs=1e-3)
    assert {layer["name"] for layer in data["layers"]} >= {LAYER}
    assert data["fp8"]["recipe"]["manifest"] == "z-image"
    assert data["machine"]["torch"] == torch.__version__
    same = held(painter(0.5), painter(0.5)).to_json()
    assert same["cases"][0]["frames"] == [{"identical": True, "psnr": None, "ssim": 1.0, "lpips": None}]
    json.dumps(same, allow_nan=False)


def test_both_pipelines_are_never_there_together(monkeypatch: pytest.MonkeyPatch) -> None:
    alive, counts = weakref.WeakSet[Any](), []
    build = ZImageTransformer2DModel.__init__

    def counted(self: Any, *arguments: Any, **options: Any) -> None:
        alive.add(self)
        counts.append(len(alive))
        build(self, *arguments, **options)

    functools.update_wrapper(counted, build)
    monkeypatch.setattr(ZImageTransformer2DModel, "__init__", counted)
    options = {**SMALL, "control": "dtype", "lpips": False}
    compare(converted("z_image"), pipelines.saved("z_image"), prompts=["a"], **options)
    assert len(counts) >= 3  # FP8, the original, and the original in float32
    assert set(counts) == {1}


def test_without_fp8_the_original_is_converted_while_it_loads() -> None:
    found = compare(
        None, pipelines.saved("z_image"), prompts=PROMPTS[:1], seeds=[3], control="none", lpips=False,
        quantization_config={"method": "fp8"}, **SMALL,
    )  # fmt: skip
    assert found.cases[0].fp8 == compared().cases[0].fp8
    assert found.layers is None
    assert "the weights were not compared: they were converted while loading" in "".join(found.notes)
    assert found.fp8.recipe == {"quantization_config": {"method": "fp8"}}


# Faults


def test_a_doubled_scale_changes_the_pictures_and_is_named(tmp_path: Path) -> None:
    folder = pipelines.copied(converted("z_image"), tmp_path / "faulty")
    rewrite(folder / SHARD, f"{LAYER}.weight_scale", lambda scale: scale * 2)
    found = compare(
        folder, pipelines.saved("z_image"), prompts=PROMPTS[:1], seeds=[3], control="none", lpips=False, **SMALL
    )
    assert not found.ok
    assert [problem.split(" is not")[0] for problem in found.problems] == [f"transformer.{LAYER}"]
    assert found.worst_layers[0].label == f"transformer.{LAYER}"
    assert f"PROBLEM: transformer.{LAYER} is not the original's weight" in str(found)
    # Not by how much: in a random model the steps after it may bring the pictures nearer again.
    assert found.summary.psnr != compared().cases[0].summary.psnr  # type: ignore[union-attr]


def test_a_trained_model_and_a_fault_that_no_picture_shows(tmp_path: Path) -> None:
    """A norm follows Z-Image's feed-forward and takes a factor away: the pictures are the same, bit for bit."""
    source, layer = Path(__file__).parents[3] / "emoji" / "model", "layers.5.feed_forward.w2"
    convert(source, tmp_path / "right", device="cpu")
    faulty = pipelines.copied(tmp_path / "right", tmp_path / "faulty")
    rewrite(faulty / SHARD, f"{layer}.weight_scale", lambda scale: scale * 2)
    options = {**SMALL, "prompts": ["red apple"], "control": "none", "lpips": False}
    right, wrong = (compare(folder, source, **options) for folder in (tmp_path / "right", faulty))
    assert right.ok
    assert right.cases[0].summary == wrong.cases[0].summary
    assert [problem.split(" is not")[0] for problem in wrong.problems] == [f"transformer.{layer}"]


def test_pictures_of_nan_are_named_and_no_number(tmp_path: Path) -> None:
    folder = pipelines.copied(converted("z_image"), tmp_path / "faulty")
    rewrite(folder / VAE, "decoder.conv_out.bias", lambda bias: bias * math.nan)
    page = tmp_path / "report.html"
    found = compare(
        folder, pipelines.saved("z_image"), prompts=PROMPTS[:1], control="none", lpips=False, output=page, **SMALL
    )
    assert found.problems[0] == "FP8 gives NaN or Inf in 1 of 1 case, first for 'a red cube', seed 0."
    assert found.problems[1].startswith("vae.decoder.conv_out.bias is kept, and is not the original's")
    assert found.summary is None
    assert found.verdict == "No picture could be compared."
    assert found.to_json()["cases"][0]["frames"] == [None]
    assert "NaN or Inf (magenta) in FP8" in page.read_text()


def test_an_original_that_gives_nan_is_named() -> None:
    found = held(painter(0.5, math.nan), painter(0.5, math.inf), prompts=["a", "b"])
    assert found.problems == ("The original itself gives NaN or Inf in 2 of 2 cases, first for 'a', seed 0.",)
    assert [d is None for d in found.cases[0].fp8] == [False, True]


def test_frames_are_compared_one_by_one_and_the_worst_is_what_fails() -> None:
    fp8, original = painter(0.5, 0.6, 0.51), painter(0.5, 0.5, 0.5)
    found = held(fp8, original, fail_below=20.1)
    assert [d.psnr for d in found.cases[0].fp8 if d] == pytest.approx([math.inf, 20, 40], abs=1e-3)
    assert found.summary is not None
    assert (found.summary.frames, found.summary.identical) == (3, 1)
    assert found.summary.psnr == pytest.approx(30, abs=1e-3)
    assert found.cases[0].worst_frame == 1
    assert found.problems == ("PSNR falls below 20.1 dB in 1 of 1 case, to 20.0 dB for 'a', seed 0.",)
    assert held(fp8, original, fail_below=19.9).ok
    assert held(original, original, fail_below=100).ok


def test_a_control_that_changes_nothing_or_fails_is_told() -> None:
    found = held(painter(0.6), painter(0.5), control="attention")
    assert "gives identical pictures; choose another control" in found.verdict
    failed = held(painter(0.6), painter(0.5), control="batch")
    assert failed.summary is not None
    assert failed.ok
    assert "there is no control" in failed.notes[0]
    assert "makes no two pictures of a prompt at once" in failed.notes[0]
    assert "Without a control that says little" in failed.verdict


@pytest.mark.parametrize(("apart", "words"), [(0.1, "as far or farther"), (0.05, "about as far"), (0.02, "less")])
def test_the_verdict_holds_fp8_against_the_control(apart: float, words: str) -> None:
    calls = iter([0.5, 0.5 + apart])

    def changing(prompt: str, num_images_per_prompt: int = 1, generator: Any = None) -> Any:
        return painter(*[next(calls)] * num_images_per_prompt)(prompt, generator)

    found = held(painter(0.56), changing, control="batch")
    assert f"A harmless change moves them {words}: the original making two pictures" in found.verdict


def test_the_second_picture_of_the_control_has_other_noise() -> None:
    def noise(prompt: str, num_images_per_prompt: int = 1, generator: Any = None) -> Any:
        generators = generator if isinstance(generator, list) else [generator]
        frames = [torch.rand(3, 16, 16, generator=g) for g in generators]
        assert len({tuple(f.flatten().tolist()) for f in frames}) == num_images_per_prompt
        return type("Output", (), {"images": frames})

    found = held(noise, noise, control="batch", seeds=2)
    assert found.control_summary is not None
    assert found.control_summary.identical == found.control_summary.frames == 2


# What cannot be compared


@pytest.mark.parametrize(
    ("fp8", "original", "said"),
    [
        ("converted", "qwen", "one is ZImagePipeline and the other QwenImagePipeline"),
        ("converted", "converted", "is converted already; give what it was converted from"),
        ("source", "source", "is not converted; convert it first"),
        ("none", "source", "The folder ./none does not exist"),
        ("converted", "none", "The folder ./none does not exist"),
        (None, "converted", "is converted already"),
        (painter(0.5), "source", "hand over both, or neither"),
        ("converted", painter(0.5), "hand over both, or neither"),
        (None, painter(0.5), "hand over both, or neither"),
        (3, 4, "give a folder, a Hub id or a pipeline"),
    ],
)
def test_sides_that_cannot_be_compared(fp8: Any, original: Any, said: str) -> None:
    places = {
        "converted": converted("z_image"), "source": pipelines.saved("z_image"),
        "qwen": pipelines.saved("qwen_image"), "none": "./none",
    }  # fmt: skip
    one, other = (places.get(side, side) if isinstance(side, str) else side for side in (fp8, original))
    with pytest.raises(Fp8Error, match=said):
        held(one, other)


def test_pipelines_of_two_classes_that_are_handed_over() -> None:
    with pytest.raises(ConvertError, match="one is ZImagePipeline and the other QwenImagePipeline"):
        held(pipelines.z_image(), pipelines.qwen_image())


@pytest.mark.parametrize("other", [painter(0.5, size=(16, 32)), painter(0.5, 0.5), painter(0.5, channels=4)])
def test_pictures_of_two_sizes(other: Any) -> None:
    with pytest.raises(ConvertError, match=r"FP8 gives frames of 1 x 16 x 16 x 3 .* and the original "):
        held(painter(0.5), other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompts": "none.txt"}, "none.txt cannot be opened"),
        ({"prompts": []}, "prompts holds no prompt"),
        ({"prompts": [3]}, "prompts holds no prompt"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": []}, "seeds is empty"),
        ({"control": "magic"}, "control is 'magic'; use attention, dtype, batch, none"),
        ({"control": "dtype"}, "loads the original once more, and it was handed over"),
        ({"fail_below": math.nan}, "fail_below is nan"),
        ({"shown": -1}, "shown is -1"),
        ({"offload": True}, "the device is the CPU; drop it"),
        ({"device": "cuda:9"}, "cuda:9"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"steps": 2}, "paint takes no num_inference_steps; drop steps"),
        ({"prompts": [Prompt("a"), Prompt("b", "bad")]}, "paint takes no negative_prompt"),
    ],
)
def test_arguments_that_mean_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConvertError, match=said):
        held(painter(0.5), painter(0.5), **options)


def test_an_argument_that_nobody_takes() -> None:
    with pytest.raises(TypeError, match="compare takes no argument 'promts'; did you mean prompts"):
        held(painter(0.5), painter(0.5), promts=["a"])
    with pytest.raises(SettingsError, match="the only one is 'fp8'"):
        held(None, pipelines.saved("z_image"), quantization_config={"method": "int4"})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("3072 requested and 128 written"), "3072 requested and 128 written"),  # numpy's own
    ],
)
def test_a_temporary_folder_that_is_full(monkeypatch: pytest.MonkeyPatch, error: OSError, said: str) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ConvertError, match=rf"cannot be kept in .* \({said}\).*set TMPDIR"):
        held(painter(0.5), painter(0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("control", ["attention", "dtype", "batch"])
def test_on_a_gpu(control: str) -> None:
    options = {**SMALL, "device": "cuda"}
    found = compare(
        converted("z_image"), pipelines.saved("z_image"), prompts=PROMPTS, control=control, lpips=False, **options
    )
    assert found.ok
    assert found.summary is not None
    assert found.summary.worst_psnr > 25
    assert found.fp8.run.peak_bytes is not None
    assert found.original.run.peak_bytes is not None
    assert found.control is not None
    assert found.control.failed is None
    assert any(not product.startswith("dequantize") for product in found.fp8.run.products)
    assert max(abs(layer.sqnr - layer.rounding) for layer in found.layers or ()) < 0.01


@pytest.mark.gpu
def test_offloaded_to_the_cpu() -> None:
    options = {**SMALL, "device": "cuda", "control": "none", "lpips": False, "prompts": PROMPTS[:1]}
    there = compare(converted("z_image"), pipelines.saved("z_image"), **options)
    offloaded = compare(converted("z_image"), pipelines.saved("z_image"), offload=True, **options)
    assert offloaded.cases[0].fp8 == there.cases[0].fp8
