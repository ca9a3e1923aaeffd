"""A DiT on several GPUs of one machine: context parallelism, tensor parallelism and spread weights, BF16 beside FP8.

    torchrun --nproc-per-node 2 benchmarks/parallel.py [--json FILE] [--cases NAME...] [--folder /dev/shm/bench]

Random weights of the published sizes are written as a BF16 snapshot and converted by the first rank; every rank then
loads its share of either, as users do. Milliseconds are medians of a forward on all ranks together over two seconds or
more, the longest rank's; "compiled" is `compile_repeated_blocks()`. Differences are relative (norms): to the same
weights on one GPU, and to BF16 on one GPU. Gigabytes are the largest rank's.
"""

import argparse
import gc
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_models import random_model
from recording import Recording
from timing import DEVICE
from torch import Tensor
from transformer import WAN, qwen_inputs, wan_inputs

from fp8_convert.converter import convert
from fp8_convert.loader import load_component

STEP_S = 120  # after which a rank that waits for another gives up
RUNS = 15  # or as many as fill this time: for some tenths of a second the host may be busy with something else
TIMED_S = 2.0
MODES = ("eager", "compiled")


@dataclass(frozen=True)
class Case:
    class_name: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]


CASES = {
    "qwen-4": Case("QwenImageTransformer2DModel", {"num_layers": 4}, qwen_inputs),
    "qwen-60": Case("QwenImageTransformer2DModel", {"num_layers": 60}, qwen_inputs),
    "wan-2": Case("WanTransformer3DModel", {**WAN, "num_layers": 2}, wan_inputs),
}
WAYS = ("one GPU", "ulysses", "ring", "tensor", "spread", "spread, ulysses")


def ways(way: str, count: int) -> dict[str, Any]:
    """`load_component`'s arguments for it."""
    from diffusers import ContextParallelConfig, TensorParallelConfig

    configs = {
        "ulysses": ContextParallelConfig(ulysses_degree=count),
        "ring": ContextParallelConfig(ring_degree=count),
        "tensor": TensorParallelConfig(tp_degree=count),
    }
    config = configs.get(way.rpartition(" ")[2])
    return {"parallel_config": config, "fully_shard": way.startswith("spread")}


class Bench:
    """One case: its snapshots, and its output on one GPU, by what it is computed of."""

    def __init__(self, recording: Recording, name: str, folder: Path) -> None:
        self.recording, self.name, self.case = recording, name, CASES[name]
        self.source, self.converted = folder / f"{name}-bf16", folder / f"{name}-fp8"
        self.inputs = self.case.inputs()
        self.inputs.pop("encoder_hidden_states_mask", None)  # diffusers' attention gives NaN of one on several ranks
        self.alone: dict[tuple[str, str], Tensor] = {}

    def write(self) -> None:
        """The snapshots, by the first rank."""
        if dist.get_rank() == 0:
            for folder in (self.source, self.converted):
                shutil.rmtree(folder, ignore_errors=True)
            model = random_model("diffusers", self.case.class_name, self.case.config)
            model.save_pretrained(self.source)
            del model
            convert(self.source, self.converted, quiet=True)
        dist.barrier()

    def run(self, what: str, way: str) -> None:
        """Eager and compiled forwards of "bf16" or "ours", divided in this way."""
        row = {"case": self.name, "what": what, "way": way, "ranks": dist.get_world_size()}
        empty()
        started = time.monotonic()
        model = self.load(what, way)
        seconds = largest(time.monotonic() - started)
        # A ring needs attention's sums, which not every backend tells; what is set holds for later models too.
        rings = "_native_cudnn" if DEVICE.type == "cuda" else "_native_flash"
        model.set_attention_backend(rings if way == "ring" else "native")
        for mode in MODES:
            if mode == "compiled":
                torch._dynamo.reset()
                model.compile_repeated_blocks()
            self.recording.add(**row, mode=mode, load_s=seconds, **self.measure(model, what, way, mode))

    def load(self, what: str, way: str) -> Any:
        how = ways(way, dist.get_world_size())
        if what == "ours":
            return load_component(self.converted, device=DEVICE, **how)
        import diffusers
        from torch.distributed.fsdp import fully_shard

        load = getattr(diffusers, self.case.class_name).from_pretrained
        if way == "tensor":
            return load(self.source, dtype=torch.bfloat16, parallel_config=how["parallel_config"])
        model = load(self.source, dtype=torch.bfloat16).to(DEVICE).requires_grad_(False)
        if how["fully_shard"]:
            blocks = [module for module in model.modules() if type(module).__name__ in model._repeated_blocks]
            for block in (*blocks, model):
                fully_shard(block, reshard_after_forward=True)
            model._repeated_blocks = [type(blocks[0]).__name__]
        if how["parallel_config"] is not None:
            model.enable_parallelism(config=how["parallel_config"])
        return model

    def measure(self, model: Any, what: str, way: str, mode: str) -> dict[str, Any]:
        empty()
        resident = allocated()
        out = self.output(model)
        peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0
        if way == "one GPU":
            self.alone[what, mode] = out
        runs = max(RUNS, round(TIMED_S / largest(self.seconds(model))))
        ms = 1e3 * largest(statistics.median(self.seconds(model) for _ in range(runs)))
        found = {"ms": ms, "runs": runs, "resident_gb": largest(resident), "peak_gb": largest(peak)}
        for key, other in (("to_one", (what, mode)), ("to_bf16", ("bf16", mode))):
            if (wanted := self.alone.get(other)) is not None:
                found[key] = largest(float((out - wanted).float().norm() / wanted.float().norm()))
        return found

    def seconds(self, model: Any) -> float:
        """Of one forward, which all ranks begin together."""
        dist.barrier()
        synchronize()
        started = time.perf_counter()
        self.output(model)
        synchronize()
        return time.perf_counter() - started

    def masked(self) -> None:
        """What diffusers' attention makes of a mask that masks nothing, in BF16 on several ranks: the share of NaN."""
        if self.case.class_name != "QwenImageTransformer2DModel":
            return
        mask = torch.ones(self.inputs["encoder_hidden_states"].shape[:2], dtype=torch.bool, device=DEVICE)
        for backend in ("native", "_native_cudnn"):
            row = {"case": self.name, "what": "bf16", "way": "ulysses, mask", "backend": backend}
            with self.recording.failing(**row):
                model = self.load("bf16", "ulysses")
                model.set_attention_backend(backend)
                out = model(**self.inputs, encoder_hidden_states_mask=mask, return_dict=False)[0]
                self.recording.add(**row, nan=largest(float(out.isnan().float().mean())))

    def output(self, model: Any) -> Tensor:
        return model(**self.inputs, return_dict=False)[0]


def largest(value: float) -> float:
    """Of all ranks; NaN if one has it."""
    every = [torch.zeros((), device=DEVICE) for _ in range(dist.get_world_size())]
    dist.all_gather(every, torch.tensor(value, dtype=torch.float32, device=DEVICE))
    return float(torch.stack(every).max())


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def empty() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated() -> float:
    return torch.cuda.memory_allocated() / 1e9 if DEVICE.type == "cuda" else 0.0


class Silence(Recording):
    """What the other ranks record."""

    def __init__(self) -> None: ...

    def add(self, **row: Any) -> None: ...


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all numbers there, after every row")
    parser.add_argument("--cases", nargs="+", default=["wan-2", "qwen-4"], choices=list(CASES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/bench"), help="for the snapshots")
    arguments = parser.parse_args()
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl", timeout=timedelta(seconds=STEP_S))
    recording = Recording(arguments.json) if dist.get_rank() == 0 else Silence()
    for name in arguments.cases:
        bench = Bench(recording, name, arguments.folder)
        bench.write()
        for way in arguments.ways:
            for what in ("bf16", "ours"):
                with recording.failing(case=name, what=what, way=way):
                    bench.run(what, way)
        bench.masked()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
