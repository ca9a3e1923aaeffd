"""Prompts and seeds through the real pipelines, and through functions that stand for odd ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pipelines
import pytest
import torch
from PIL import Image
from runs import bf16

from fp8_convert.converter.telling.errors import ConvertError, SettingsError
from fp8_convert.loader.quality.prompts import Prompt
from fp8_convert.loader.quality.running import Case, Sampling, call_arguments, cases, generate

SMALL = Sampling(steps=2, height=64, width=64, extra={"max_sequence_length": 32})
CUBE = Case(Prompt("a red cube"), seed=3)


def test_every_prompt_with_every_seed() -> None:
    a, b = Prompt("a"), Prompt("b")
    assert cases([a, b], Sampling(seeds=(1, 2))) == [Case(a, 1), Case(a, 2), Case(b, 1), Case(b, 2)]


@pytest.mark.parametrize("name", ["z_image", "qwen_image"])
def test_a_picture_is_that_of_the_plain_call(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = pipelines.BUILDERS[name](torch.bfloat16)
    found = generate(pipe, CUBE, SMALL)
    again = generate(pipe, CUBE, SMALL)
    assert "it/s" not in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    direct = pipe(
        prompt="a red cube", num_inference_steps=2, height=64, width=64, max_sequence_length=32,
        generator=torch.Generator().manual_seed(3), output_type="np",
    ).images  # fmt: skip
    assert found.frames.shape == (1, 64, 64, 3)
    assert found.frames.dtype == torch.float32
    assert torch.equal(found.frames, again.frames)
    assert np.array_equal(found.frames.numpy(), direct)
    assert found.seconds > 0
    assert not torch.equal(found.frames, generate(pipe, Case(CUBE.prompt, 4), SMALL).frames)


def test_the_bar_is_as_it_was_afterwards() -> None:
    pipe = pipelines.z_image()
    pipe.set_progress_bar_config(desc="mine")
    generate(pipe, CUBE, SMALL)
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_a_video_has_its_frames() -> None:
    sampling = Sampling(steps=2, height=64, width=64, frames=5, guidance=4.0, extra={"max_sequence_length": 32})
    found = generate(pipelines.wan22(), Case(Prompt("a", "bad"), 0), sampling)
    assert found.frames.shape == (5, 64, 64, 3)


@pytest.mark.parametrize(
    ("name", "shape"), [("qwen_image_edit", (1, 64, 64, 3)), ("qwen_image_layered", (2, 64, 64, 4))]
)
def test_a_pipeline_that_takes_an_image(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    pipe = bf16(name)
    embeddings = {  # of a text and an image they need a processor, which needs torchvision
        "prompt_embeds": torch.randn(1, 12, pipelines.HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "prompt_embeds_mask": torch.ones(1, 12, dtype=torch.int64),
    }
    own = {"prompt": "a", "layers": 2} if name == "qwen_image_layered" else {"height": 64, "width": 64}
    sampling = Sampling(steps=2, guidance=1.0, extra=embeddings | own)
    # These pipelines scale any image to a megapixel, which takes minutes here.
    size = (64, 64) if name == "qwen_image_layered" else (64, 64, None)
    with mock.patch.object(sys.modules[type(pipe).__module__], "calculate_dimensions", return_value=size):
        found = generate(pipe, Case(Prompt("a", image=tmp_path / "red.png"), 0), sampling)
    assert found.frames.shape == shape
    assert found.frames.isfinite().all()
    with pytest.raises(SettingsError, match="takes an image, and 'a', seed 0 has none"):
        generate(pipe, Case(Prompt("a"), 0), sampling)
    (tmp_path / "red.png").write_bytes(b"nothing of the kind")
    with pytest.raises(ConvertError, match=r"red\.png cannot be read"):
        generate(pipe, Case(Prompt("a", image=tmp_path / "red.png"), 0), sampling)


@pytest.mark.parametrize(
    ("prompt", "sampling", "said"),
    [
        (Prompt("a"), Sampling(frames=5), "takes no num_frames; drop frames"),
        (Prompt("a"), Sampling(extra={"layers": 2}), "takes no layers; drop that extra argument"),
        (Prompt("a", image=Path("cat.png")), Sampling(), "takes no image; drop the images"),
        (Prompt("a"), Sampling(steps=2, height=50), "refuses 'a', seed 0: Height must be divisible by"),
    ],
)
def test_what_a_pipeline_does_not_take_is_named(prompt: Prompt, sampling: Sampling, said: str) -> None:
    with pytest.raises(SettingsError, match=f"ZImagePipeline {said}"):
        generate(pipelines.z_image(), Case(prompt, 0), sampling)


def test_the_argument_that_guides_and_its_negative_prompt() -> None:
    qwen = call_arguments(pipelines.qwen_image(), CUBE, Sampling(guidance=4.0))
    assert (qwen["true_cfg_scale"], qwen["negative_prompt"]) == (4.0, " ")
    assert "guidance_scale" not in qwen
    asked = call_arguments(pipelines.qwen_image(), Case(Prompt("a", "blurred"), 0), Sampling(guidance=4.0))
    assert asked["negative_prompt"] == "blurred"
    z_image = call_arguments(pipelines.z_image(), CUBE, Sampling(guidance=4.0))
    assert z_image["guidance_scale"] == 4.0
    assert "negative_prompt" not in z_image
    flux = call_arguments(pipelines.flux(), CUBE, Sampling(guidance=4.0))
    assert flux["guidance_scale"] == 4.0
    assert "true_cfg_scale" not in flux


def test_a_default_of_the_pipeline_is_not_passed() -> None:
    assert set(call_arguments(pipelines.z_image(), CUBE, Sampling())) == {"prompt", "generator", "output_type"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"height": -1}, {"width": 1.5}, {"frames": True}, {"seeds": ()}, {"seeds": (-1,)},
        {"seeds": (2**63,)}, {"seeds": (1, 1)},
    ],
)  # fmt: skip
def test_a_sampling_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong)).removesuffix("s")):
        Sampling(**wrong)


def test_functions_with_pictures_of_every_kind() -> None:
    white = np.full((4, 6, 3), 255, np.uint8)

    def giving(pictures: Any) -> torch.Tensor:
        return generate(lambda prompt: SimpleNamespace(images=pictures), CUBE, Sampling()).frames

    for pictures in ([Image.fromarray(white)], white, torch.ones(1, 3, 4, 6), [torch.ones(3, 4, 6)]):
        assert torch.equal(giving(pictures), torch.ones(1, 4, 6, 3))
    assert giving(torch.full((3, 4, 6), torch.nan)).isnan().all()
    with pytest.raises(ConvertError, match="gives no images and no frames"):
        giving([])
    with pytest.raises(ConvertError, match="pictures of the sizes"):
        giving([torch.ones(3, 4, 6), torch.ones(3, 6, 4)])
