"""Harmless changes to the original: how far do pictures move when nothing is wrong?

Sampling amplifies whatever differs, so that a distance says nothing alone. Each change here computes the same, rounded
elsewhere.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...converter.telling.errors import SettingsError
from .running import Case, Generated, Sampling, generate

Control = Literal["attention", "dtype", "batch", "none"]
CONTROLS: tuple[str, ...] = get_args(Control)

_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")


def check_control(control: str, handed_over: bool) -> None:
    """Raise SettingsError for a control that there is not, or not for pipelines that are handed over."""
    if control not in CONTROLS:
        raise SettingsError(f"control is {control!r:.80}; use {', '.join(CONTROLS)}.")
    if control == "dtype" and handed_over:
        raise SettingsError(
            "The control dtype loads the original once more, and it was handed over; give its folder, or another "
            "control."
        )


def described(control: str, device: torch.device) -> str:
    """What the control changes, to follow "the original"."""
    return {
        "attention": f"with attention by PyTorch's {'memory-efficient' if device.type == 'cuda' else 'plain'} kernel",
        "dtype": "computing in float32",
        "batch": "making two pictures at once, of which the first is taken",
    }[control]


def changed(control: str, pipe: Any, case: Case, sampling: Sampling) -> Generated:
    """Run a case with the change. For dtype the pipeline itself is another."""
    if control == "attention":
        with sdpa_kernel(_backends()):
            return generate(pipe, case, sampling)
    if control == "batch":
        return _first_of_two(pipe, case, sampling)
    return generate(pipe, case, sampling)


def _backends() -> list[SDPBackend]:
    """Other kernels than those that PyTorch chooses by itself; the plain one takes memory for every pair of tokens."""
    efficient = [SDPBackend.EFFICIENT_ATTENTION] if torch.cuda.is_available() else []
    return [*efficient, SDPBackend.MATH]


def _first_of_two(pipe: Any, case: Case, sampling: Sampling) -> Generated:
    count = next((name for name in _PER_PROMPT if name in inspect.signature(pipe).parameters), None)
    if count is None:
        raise SettingsError(f"{type(pipe).__name__} makes no two pictures of a prompt at once; choose another control.")
    noise = [torch.Generator("cpu").manual_seed(seed) for seed in (case.seed, (case.seed + 1) % 2**63)]
    extra = {**sampling.extra, count: 2, "generator": noise}
    both = generate(pipe, case, Sampling(**{**vars(sampling), "extra": extra}))
    return Generated(both.frames[: len(both.frames) // 2], both.seconds)
