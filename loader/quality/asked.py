"""What a user asks to be run: prompts in a file or at hand, and seeds by their number or one by one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ...converter.telling.errors import SettingsError
from .prompts import Prompt, read_prompts
from .running import Case, Sampling

Prompts = str | os.PathLike[str] | Sequence[str | Prompt]


def asked_prompts(prompts: Prompts) -> tuple[Prompt, ...]:
    """The prompts of a file, or those of a list. Raises ConvertError, and SettingsError where there is none."""
    if isinstance(prompts, str | os.PathLike):
        return read_prompts(prompts)
    found = tuple(Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts)
    if not found or not all(isinstance(prompt, Prompt) for prompt in found):
        raise SettingsError("prompts holds no prompt; give a file of prompts, or a list of texts.")
    return found


def asked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The seeds: so many from 0 on, or those of a list. Raises SettingsError for less than one."""
    if not isinstance(seeds, int):
        return tuple(seeds)
    if isinstance(seeds, bool) or seeds < 1:
        raise SettingsError(f"seeds is {seeds!r}; give how many, at least 1, or a list of seeds.")
    return tuple(range(seeds))


def described(sampling: Sampling, runs: Sequence[Case]) -> dict[str, Any]:
    """The runs as a result states them."""
    stated = {name: getattr(sampling, name) for name in ("steps", "height", "width", "frames", "guidance")}
    return {"prompts": len({case.prompt for case in runs}), "seeds": len(sampling.seeds), **stated}
