"""The targets by name."""

from __future__ import annotations

from .comfyui import Comfyui
from .sglang import Sglang
from .target import NATIVE, Target
from .vllm_omni import VllmOmni

TARGETS: dict[str, Target] = {target.name: target for target in (NATIVE, VllmOmni(), Sglang(), Comfyui())}


def described(target: Target) -> str:
    """Who reads a snapshot that is written for the target, in one line."""
    text = f"target {target.name}: for {target.readers}"
    others = [name for name in TARGETS if name != NATIVE.name]
    return f"{text}; other targets: {', '.join(others)}" if target is NATIVE else text
