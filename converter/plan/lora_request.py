"""Which LoRAs a user asks to merge: `[COMPONENT=]FILE[:SCALE]`, or FILE and SCALE as a pair.

FILE ends in `.safetensors`, and so a path may hold any colon or equals sign: a scale stands behind that ending alone,
and a component is a plain name (`./a=b.safetensors` is a path).
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..format.untrusted import check_text

_TEXT = re.compile(r"(?:([A-Za-z_]\w*)=)?(.+\.safetensors)(?::([^:/\\]+))?", re.ASCII | re.DOTALL)
LORA_USE = "use a list such as ['style.safetensors:0.8'], each [COMPONENT=]FILE.safetensors[:SCALE]; no pickle is read"


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA to merge. component: that of the DiT which it is for, None where there is but one."""

    path: Path
    scale: float = 1.0
    component: str | None = None


def read_requests(value: Any) -> tuple[LoraRequest, ...]:
    """The LoRAs that a setting states. Raises ValueError or TypeError for what means nothing."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(_read(item) for item in value)


def _read(item: Any) -> LoraRequest:
    if isinstance(item, LoraRequest):
        return item
    if isinstance(item, list | tuple):
        stated, scale = item
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError
        request = _read(stated)
        if isinstance(stated, str) and request.scale != 1:
            raise ValueError("two scales")
        return LoraRequest(request.path, _scale(scale), request.component)
    text = os.fspath(item)
    if not isinstance(text, str) or (found := _TEXT.fullmatch(text)) is None:
        raise ValueError
    check_text(text, "The path of the LoRA")
    component, path, scale = found.groups()
    if not isinstance(item, str):  # a path is what it says
        component, path, scale = None, text, None
        if not text.endswith(".safetensors"):
            raise ValueError
    return LoraRequest(Path(path), 1.0 if scale is None else _scale(scale), component)


def _scale(value: Any) -> float:
    scale = float(value)
    if not math.isfinite(scale) or scale == 0:
        raise ValueError
    return scale
