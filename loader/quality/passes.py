"""One pipeline after the other through all cases; what they made waits on the disk, so that neither keeps memory."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...converter.telling.errors import ConvertError, one_clause
from ...converter.telling.progress import Progress
from ..report import report
from .running import Case, Generated

Generate = Callable[[Any, Case], Generated]


@dataclass(frozen=True)
class Run:
    """How a pipeline ran. seconds: of each case. peak_bytes: the most memory at once, loading included, None where that
    cannot be told; memory: what it is of. products: linears by the product that they run, and why."""

    load_seconds: float
    seconds: tuple[float, ...]
    peak_bytes: int | None
    memory: str
    products: Mapping[str, int]

    @property
    def seconds_per_case(self) -> float:
        """The mean, without the first case where there are more: it warms up."""
        return mean(self.seconds[1:] or self.seconds)

    def to_json(self) -> dict[str, Any]:
        return {
            "load_seconds": round(self.load_seconds, 3),
            "seconds": [round(s, 4) for s in self.seconds],
            "seconds_per_case": round(self.seconds_per_case, 4),
            "peak_bytes": self.peak_bytes,
            "memory": self.memory,
            "products": dict(self.products),
        }


class Shelf:
    """Frames on the disk, by whose they are and the number of their case."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, whose: str, number: int, frames: Tensor) -> None:
        """Raises ConvertError where they do not fit."""
        try:
            np.save(self._path(whose, number), frames.numpy())
        except OSError as error:
            raise ConvertError(
                f"The pictures cannot be kept in {self._folder.parent} ({error.strerror or one_clause(error)}) until "
                "they are compared; set TMPDIR to a folder with room and run again."
            ) from error

    def get(self, whose: str, number: int) -> Tensor:
        """Frames, float32 [F, H, W, C]."""
        return torch.from_numpy(np.load(self._path(whose, number)))

    def _path(self, whose: str, number: int) -> Path:
        return self._folder / f"{whose}-{number}.npy"


def run_cases(
    load: Callable[[], Any],
    cases: Sequence[Case],
    generate: Generate,
    keep: Callable[[int, Tensor], None],
    device: torch.device,
    progress: Progress,
) -> Run:
    """Load a pipeline, run every case and hand its number and its frames to `keep`. The pipeline is not kept."""
    peak = _GpuPeak(device) if device.type == "cuda" else _ProcessPeak()
    started = time.perf_counter()
    pipe = load()
    loaded = time.perf_counter() - started
    progress.start(len(cases), "pictures")
    seconds = []
    for number, case in enumerate(cases):
        made = generate(pipe, case)
        keep(number, made.frames)
        seconds.append(made.seconds)
        progress.advance(1)
    progress.close()
    return Run(loaded, tuple(seconds), peak.bytes(), peak.of, _products(pipe))


def free() -> None:
    """Give back the memory of pipelines that are gone: some hold themselves in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _products(pipe: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for component in report(pipe).components if hasattr(pipe, "components") else ():
        for product, count in component.backends.items():
            counts[product] = counts.get(product, 0) + count
    return counts


class _GpuPeak:
    """The most memory that PyTorch allocates on a GPU from now on."""

    of = "GPU memory"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated(self._device))


class _ProcessPeak:
    """The most memory of this process from now on, where Linux tells."""

    of = "RSS"

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far

    def bytes(self) -> int | None:
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
        return None
