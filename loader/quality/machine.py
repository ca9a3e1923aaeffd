"""Where numbers were measured: versions and hardware, and nothing that tells who measured them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers of a run depend on beside its input: {"device": …, "torch": …}."""
    versions = {name: version(name) for name in ("fp8-convert", "torch", "diffusers", "transformers")}
    return {"device": _device(device), **versions, "python": platform.python_version(), "system": platform.system()}


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu()}, {os.cpu_count()} CPUs"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
