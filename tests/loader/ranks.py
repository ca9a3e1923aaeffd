"""Two ranks on this machine: processes of one group, gloo on the CPU and NCCL on two GPUs, that run what tests ask."""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


class Ranks:
    """The processes; `run` calls a function of a test's module in each of them and returns what each returned."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self._home = tempfile.TemporaryDirectory(prefix="fp8-convert-ranks-")
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(WORLD):
            mine, its = context.Pipe()
            store = str(Path(self._home.name, "store"))
            process = context.Process(target=_serve, args=(rank, device_type, store, its), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Raises AssertionError with the traceback of a rank that raised."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() if pipe.poll(120) else (None, "no answer") for pipe in self._pipes]
        failed = [f"rank {rank}: {problem}" for rank, (_, problem) in enumerate(answers) if problem]
        assert not failed, "\n".join(failed)
        return [answer for answer, _ in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._home.cleanup()


def _serve(rank: int, device_type: str, store: str, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    else:
        stand_in_for_an_accelerator()
    options = {"init_method": f"file://{store}", "rank": rank, "world_size": WORLD}
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", **options)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(*arguments), None))
        except BaseException:  # a failed assertion of pytest's own among them
            pipe.send((None, traceback.format_exc()))


_kernels: list[torch.library.Library] = []


def stand_in_for_an_accelerator() -> None:
    """diffusers divides ranks by the number of accelerators, and its ring needs flash attention's sums: the CPU has
    none of both.
    """
    torch.accelerator.device_count = lambda: 1
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", _flash_attention, "CPU")
    _kernels.append(library)


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The operator's definition, [B, H, S, D] in float32."""
    scores = query.float() @ key.float().mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    out = torch.empty_like(query).copy_(scores.softmax(-1) @ value.float())
    none = torch.empty(0)
    lengths = query.shape[2], key.shape[2]
    return out, scores.logsumexp(-1), none, none, *lengths, torch.zeros(2, dtype=torch.int64), none, none
