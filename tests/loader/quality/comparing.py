"""One comparison of the tiny Z-Image pipeline, made once; and functions that stand for pipelines with odd pictures."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipelines
import torch
from runs import _root, converted

from fp8_convert.loader import Comparison, compare

PROMPTS = ("a red cube", "<script>alert('pear')</script> & \"co\"")
SMALL: dict[str, Any] = {"steps": 1, "height": 32, "width": 32, "extra": {"max_sequence_length": 32}, "device": "cpu"}


@functools.cache
def compared() -> Comparison:
    """The converted pipeline against its source, with a page."""
    page = Path(_root().name) / "report.html"
    return compare(
        converted("z_image"), pipelines.saved("z_image"), prompts=PROMPTS, seeds=[3], lpips=False, output=page, **SMALL
    )


def painter(*frames: float, size: tuple[int, int] = (16, 16), channels: int = 3) -> Any:
    """A function that is called like a pipeline, and gives frames of one colour each, whatever the prompt."""

    def paint(prompt: str, generator: torch.Generator) -> SimpleNamespace:
        return SimpleNamespace(images=torch.stack([torch.full((channels, *size), value) for value in frames]))

    return paint


def held(fp8: Any, original: Any, **options: Any) -> Comparison:
    """Two functions compared, without a control where none is asked for."""
    return compare(fp8, original, **{"prompts": ["a"], "control": "none", "lpips": False, "device": "cpu", **options})
