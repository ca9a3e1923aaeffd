"""One linear, W8A8 and FP8 storage against BF16, torchao and SDNQ, on one CUDA device: milliseconds, medians.

    python benchmarks/linear.py [--json FILE] [--parts linear host group] [--shapes NAME...] [--compiled] [--only ours]

The ceiling of a shape is BF16's time over the least that FP8 can take: the fastest FP8 product and one pass over the
activations (a read in BF16, a write in FP8) at 3 TB/s. `share` is how much of it W8A8 reaches. `host` is what the
host needs to issue one call; `group` are q, k and v of an attention, which share their input.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from gpu_models import fill
from recording import Recording
from timing import DEVICE, host_microseconds, limited, median
from torch import Tensor, nn

from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.loader import kernels
from fp8_convert.loader.install import install
from fp8_convert.loader.shared_input import settle, share_inputs

SHAPES = {  # tokens, K, N
    "Qwen attn": (4352, 3072, 3072),
    "Qwen MLP up": (4352, 3072, 12288),
    "Qwen MLP down": (4352, 12288, 3072),
    "Qwen text": (256, 3072, 12288),
    "Z-Image": (4352, 3840, 10240),
    "Wan attn": (32760, 5120, 5120),
    "Wan MLP up": (32760, 5120, 13824),
    "Wan MLP down": (32760, 13824, 5120),
    **{f"Qwen modulation, {m}": (m, 3072, 18432) for m in (1, 16, 64)},
    **{f"Qwen2.5-VL MLP, {m}": (m, 3584, 18944) for m in (1, 16, 64)},
}
FORMS = {
    "w8a8": WeightFormat("w8a8"),
    "w8a8 channel": WeightFormat("w8a8", channel=True),
    "w8a8 block": WeightFormat("w8a8", (128, 128)),
    "storage": WeightFormat("storage", (128, 128)),
}
LIMIT = 60  # seconds for a peer, which may compile
BYTES_PER_MS = 3e9


def plain_linear(k: int, n: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.normal_(0, 0.02)
    return layer


def fp8_linear(weight: Tensor, how: WeightFormat, amax: Tensor | None = None, **options: Any) -> Any:
    n, k = weight.shape
    layer = install(plain_linear(k, n), how, device=DEVICE, **options)
    fill(layer, weight, amax)
    return layer


def gemm_times(m: int, k: int, n: int) -> dict[str, float]:
    """Milliseconds of the product alone: BF16, FP8 with a scale for each token, and with one for all.

    FP8 ones have at least 16 tokens, below which not every release of torch has them.
    """
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
    one, ones = torch.ones((), device=DEVICE), torch.ones(1, n, device=DEVICE)
    codes, scale = kernels.quantize_rows(nn.functional.pad(x, (0, 0, 0, max(0, 16 - m))), one)
    other = weight.to(torch.float8_e4m3fn).t()
    times = {"bf16": median(lambda: nn.functional.linear(x, weight))}
    for name, scales in {"gemm rows": (scale, ones), "gemm tensor": (one, one)}.items():
        times[name] = median(
            lambda scales=scales: torch._scaled_mm(codes, other, *scales, out_dtype=x.dtype, use_fast_accum=True)
        )
    return times


def ceiling(m: int, k: int, times: dict[str, float]) -> float:
    """BF16's time over the least possible."""
    return times["bf16"] / (min(times["gemm rows"], times["gemm tensor"]) + 3 * m * k / BYTES_PER_MS)


def bench_linear(recording: Recording, name: str, compiled: bool, with_peers: bool) -> None:
    m, k, n = SHAPES[name]
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    plain = plain_linear(k, n)
    times = {key: value for key, value in gemm_times(m, k, n).items() if key != "bf16"}
    times["bf16"] = median(lambda: plain(x))
    for label, how in FORMS.items():
        layer = fp8_linear(plain.weight, how)
        times[label] = median(lambda layer=layer: layer(x))
        if compiled and label == "w8a8":
            times["w8a8 compiled"] = compiled_time(layer, x)
        del layer
    static = fp8_linear(plain.weight, FORMS["w8a8"], activation_scheme="static")
    static.get_buffer("input_scale").copy_(x.abs().max().float() / 448)
    times["w8a8 static"] = median(lambda: static(x))
    one = torch.ones((), device=DEVICE)
    times["quantise"] = median(lambda: kernels.quantize_rows(x, one))
    for peer, convert in ({"torchao": peers.torchao, "SDNQ": peers.sdnq} if with_peers else {}).items():
        with recording.failing(part="linear", shape=name, peer=peer), limited(LIMIT):
            other = nn.Sequential(plain_linear(k, n))
            convert(other, {"0"})
            times[peer] = median(lambda other=other: other(x))
            if compiled and peer == "torchao":
                times["torchao compiled"] = compiled_time(other, x)
    best = ceiling(m, k, times)
    share = times["bf16"] / times["w8a8"] / best
    recording.add(part="linear", shape=name, m=m, k=k, n=n, ms=times, ceiling=best, share=share)


def compiled_time(layer: nn.Module, x: Tensor) -> float:
    torch._dynamo.reset()
    compiled = torch.compile(layer)
    return median(lambda: compiled(x))


def bench_host(recording: Recording) -> None:
    x = torch.randn(64, 512, device=DEVICE, dtype=torch.bfloat16)
    plain = plain_linear(512, 512)
    layers = {"bf16": plain, **{label: fp8_linear(plain.weight, how) for label, how in FORMS.items()}}
    for shape in ((64, 512), (1, 64, 512)):
        given = x.view(shape)
        us = {
            label: host_microseconds(lambda layer=layer, given=given: layer(given)) for label, layer in layers.items()
        }
        recording.add(part="host", m=64, k=512, n=512, dimensions=len(shape), us=us)


class Projections(nn.Module):
    """q, k and v with the names that the loader knows."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = layers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.to_q(x), self.to_k(x), self.to_v(x)


def bench_group(recording: Recording, m: int, width: int = 3072) -> None:
    """Three BF16 linears, three W8A8 ones, and three as loading leaves them: sharing input, side by side in memory."""
    x = torch.randn(m, width, device=DEVICE, dtype=torch.bfloat16)
    plain = [plain_linear(width, width) for _ in range(3)]
    amax = torch.stack([layer.weight.abs().max() for layer in plain]).max()
    made: dict[str, Callable[[], Any]] = {"bf16": lambda: Projections(plain)}
    made["single"] = lambda: Projections([fp8_linear(layer.weight, FORMS["w8a8"], amax) for layer in plain])
    made["shared"] = lambda: shared(made["single"]())
    ms, us = {}, {}
    for label, make in made.items():
        group = make()
        ms[label] = median(lambda group=group: group(x))
        us[label] = host_microseconds(lambda group=group: group(x)) if m <= 256 else None
    recording.add(part="group", m=m, k=width, n=width, ms=ms, us=us)


def shared(group: nn.Module) -> nn.Module:
    share_inputs(group)
    settle(group)
    return group


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all numbers there, after every case")
    parser.add_argument("--parts", nargs="+", default=["linear", "host", "group"], choices=["linear", "host", "group"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--compiled", action="store_true", help="W8A8 and torchao under torch.compile too")
    parser.add_argument("--only", choices=["ours"], help="without the other tools")
    arguments = parser.parse_args()
    recording = Recording(arguments.json)
    if "host" in arguments.parts:
        bench_host(recording)
    if "group" in arguments.parts:
        for m in (64, 256, 4352):
            with recording.failing(part="group", m=m):
                bench_group(recording, m)
    if "linear" in arguments.parts:
        for name in arguments.shapes:
            with recording.failing(part="linear", shape=name):
                bench_linear(recording, name, arguments.compiled, arguments.only is None)


if __name__ == "__main__":
    main()
