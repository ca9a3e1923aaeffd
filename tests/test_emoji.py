"""The trained model in `emoji/model` paints what its prompt names, and the training's forward is the classes' own."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

EMOJI = Path(__file__).parent.parent / "emoji"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    loaded = DiffusionPipeline.from_pretrained(EMOJI / "model", dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize(
    ("name", "colour"),
    [("large red circle", (0.88, 0.2, 0.15)), ("large blue circle", (0.1, 0.47, 0.83))],
)
def test_a_name_gives_its_picture(pipeline: Any, name: str, colour: tuple[float, float, float]) -> None:
    picture = pipeline(
        name,
        height=64,
        width=64,
        num_inference_steps=8,
        guidance_scale=0.0,
        max_sequence_length=32,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="np",
    ).images[0]
    assert np.abs(picture[24:40, 24:40].mean(axis=(0, 1)) - colour).max() < 0.2
    assert picture[0, 0].min() > 0.9  # on white


def test_the_batched_forward_is_the_classes_own(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EMOJI), *sys.path])
    import train

    captions = train.Captions(pipeline.tokenizer, ["red apple", "", "steam locomotive"] * 3, torch.device("cpu"))
    assert train.check_the_class(pipeline.text_encoder, pipeline.transformer, captions) < 1e-5
