"""Runs a pipeline on prompts and seeds: the same noise and the same arguments for whatever is compared.

The noise comes from a CPU generator of the case's seed, so it is the same on every device. Pictures come as floating
point, as the VAE gave them: 8 bits would hide differences below 1/255, and turn NaN into black.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...converter.telling.errors import ConvertError, SettingsError, one_clause
from .prompts import Prompt


@dataclass(frozen=True)
class Sampling:
    """How pictures are made; None is the pipeline's own default.

    seeds: every prompt is run with each. height, width: pixels. frames: of a video. guidance: the scale of
    classifier-free guidance, as the pipeline's `guidance_scale`, or `true_cfg_scale` where that is what guides it.
    extra: other arguments of the pipeline's call by name, such as {"max_sequence_length": 64}; they win over all else.
    Raises SettingsError for what cannot be.
    """

    steps: int | None = None
    seeds: tuple[int, ...] = (0,)
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guidance: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width", "frames"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SettingsError(f"{name} is {value!r:.80}; give a whole number of at least 1.")
        if not self.seeds:
            raise SettingsError("seeds is empty; give at least one, such as seeds=(0,).")
        for seed in self.seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
                raise SettingsError(f"The seed {seed!r:.80} is no whole number from 0 to 2**63 - 1; correct it.")
        if len(set(self.seeds)) != len(self.seeds):
            raise SettingsError(f"seeds has {next(s for s in self.seeds if self.seeds.count(s) > 1)} twice; drop one.")


@dataclass(frozen=True)
class Case:
    """One run of a pipeline."""

    prompt: Prompt
    seed: int

    @property
    def label(self) -> str:
        return f"{self.prompt.text!r}, seed {self.seed}"


@dataclass(frozen=True)
class Generated:
    """What a run gave. frames: float32 [F, H, W, C] on the CPU, 0 to 1 (a picture has F = 1, a picture in layers
    one frame a layer; C is 4 with alpha), NaN where the pipeline gave NaN. seconds: of the call."""

    frames: Tensor
    seconds: float


def cases(prompts: Sequence[Prompt], sampling: Sampling) -> list[Case]:
    """Every prompt with every seed, the seeds of a prompt one after the other."""
    return [Case(prompt, seed) for prompt in prompts for seed in sampling.seeds]


def generate(pipe: Any, case: Case, sampling: Sampling) -> Generated:
    """Run a pipeline (or a function that is called like one) on a case.

    Raises SettingsError for what was asked for and the pipeline does not take, and for what it refuses; ConvertError
    where it gives no pictures.
    """
    arguments = call_arguments(pipe, case, sampling)
    with _without_bars(pipe):
        _wait()
        started = time.perf_counter()
        try:
            output = pipe(**arguments)
        except (TypeError, ValueError) as error:  # what pipelines raise for arguments that do not fit them
            raise SettingsError(f"{_name(pipe)} refuses {case.label:.120}: {one_clause(error)}.") from error
        frames = _frames(output, _name(pipe))
        seconds = time.perf_counter() - started
    return Generated(frames, seconds)


def call_arguments(pipe: Any, case: Case, sampling: Sampling) -> dict[str, Any]:
    """The arguments of the pipeline's call for a case. Raises SettingsError for one that it does not take."""
    parameters = inspect.signature(pipe).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = _given(case, sampling, guiding=_guiding(parameters))
    for name, (value, advice) in given.items():
        if value is not None and not anything and name not in parameters:
            raise SettingsError(f"{_name(pipe)} takes no {name}; {advice}.")
    asked = {name: value for name, (value, _) in given.items() if value is not None} | dict(sampling.extra)
    if "prompt_embeds" in sampling.extra and "prompt" not in sampling.extra:
        del asked["prompt"]  # they stand in its place, and pipelines refuse both
    if case.prompt.image is not None and "image" not in sampling.extra:
        asked["image"] = _image(pipe, case.prompt.image)
    elif "image" in parameters and "image" not in asked:
        raise SettingsError(f"{_name(pipe)} takes an image, and {case.label:.120} has none; add one to the prompts.")
    if "true_cfg_scale" in asked and "negative_prompt_embeds" not in asked:
        asked.setdefault("negative_prompt", " ")  # without one these pipelines do not guide at all
    own = {"generator": torch.Generator("cpu").manual_seed(case.seed), "output_type": "pt"}
    return {name: value for name, value in own.items() if anything or name in parameters} | asked


def _given(case: Case, sampling: Sampling, *, guiding: str) -> dict[str, tuple[Any, str]]:
    """{argument: (value, what to do if the pipeline takes no such argument)}; None is not passed."""
    return {
        "prompt": (case.prompt.text, "only pipelines that take one are run"),
        "negative_prompt": (case.prompt.negative, "drop the negative prompts"),
        "image": (case.prompt.image, "drop the images of the prompts"),
        "num_inference_steps": (sampling.steps, "drop steps"),
        "height": (sampling.height, "drop height"),
        "width": (sampling.width, "drop width"),
        "num_frames": (sampling.frames, "drop frames"),
        guiding: (sampling.guidance, "drop guidance"),
        **{name: (value, "drop that extra argument") for name, value in sampling.extra.items()},
    }


def _guiding(parameters: Mapping[str, inspect.Parameter]) -> str:
    """The argument that guides: `guidance_scale` of Qwen-Image's pipelines is for distilled models, and unset."""
    guidance = parameters.get("guidance_scale")
    unset = guidance is None or guidance.default is None
    return "true_cfg_scale" if unset and "true_cfg_scale" in parameters else "guidance_scale"


def _image(pipe: Any, path: Path) -> Any:
    from PIL import Image

    channels = getattr(getattr(getattr(pipe, "vae", None), "config", None), "input_channels", 3)
    try:
        with Image.open(path) as image:
            return image.convert("RGBA" if channels == 4 else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConvertError(f"The image {path} cannot be read ({one_clause(error)}); replace it.") from error


def _frames(output: Any, name: str) -> Tensor:
    """The pictures of an output, float32 [F, H, W, C]: tensors have channels first, arrays and images last."""
    found = getattr(output, "images", None)
    if found is None:
        found = getattr(output, "frames", None)
    pictures = _pictures(found)
    if not pictures:
        raise ConvertError(f"{name} gives no images and no frames, so that there is nothing to look at.")
    if len(sizes := {picture.shape[1:] for picture in pictures}) > 1:
        raise ConvertError(f"{name} gives pictures of the sizes {', '.join(map(str, sizes))} for one prompt.")
    return torch.cat(pictures).contiguous()


def _pictures(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor) and found.ndim >= 3:
        return [found.detach().float().cpu().reshape(-1, *found.shape[-3:]).permute(0, 2, 3, 1)]
    if isinstance(found, np.ndarray) and found.ndim >= 3:
        pixels = torch.from_numpy(found.copy())
        scaled = pixels.float() / (1 if pixels.is_floating_point() else 255)
        return [scaled.reshape(-1, *found.shape[-3:])]
    if isinstance(found, list | tuple):
        return [picture for one in found for picture in _pictures(one)]
    if hasattr(found, "getbands"):  # a PIL image
        array = np.asarray(found)
        return _pictures(array if array.ndim == 3 else array[..., None])
    return []


def _name(pipe: Any) -> str:
    return getattr(pipe, "__name__", type(pipe).__name__)


def _wait() -> None:
    """Let what was queued on a GPU finish, so that it is not counted; the call's own end is waited for by `.cpu()`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _without_bars(pipe: Any) -> Iterator[None]:
    """Without diffusers' bar of steps."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
