"""What FP8 misses of weights of known distributions, by scheme: the table of docs/weight-error.md.

    python benchmarks/weight_error.py

Each weight has 3072 x 3072 elements in BF16.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fp8_convert.converter.format.record import RecordedError
from fp8_convert.converter.stream.quantize import amax, quantize_blocks, quantize_rows, quantize_tensor, tensor_scale
from fp8_convert.converter.stream.weight_error import Missed, weight_error
from fp8_convert.converter.telling.quantities import share

SIZE = 3072


def weights() -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    normal = torch.randn(SIZE, SIZE)
    yield "Gaussian", normal
    yield "uniform", torch.rand(SIZE, SIZE) - 0.5
    yield "Laplace", normal.sign() * -torch.rand(SIZE, SIZE).log()
    for sigmas in (100, 1000, 10_000, 100_000):
        outlier = normal.clone()
        outlier[5, 7] = sigmas
        yield f"Gaussian, one outlier of {sigmas:,} sigma", outlier
    column = normal.clone()
    column[:, 7] *= 1000
    yield "Gaussian, a column of 1,000 sigma", column
    rows = normal.clone()
    rows[:30] *= 1e-4
    yield "Gaussian, 1 % of the rows at 1/10,000", rows


def errors(x: torch.Tensor) -> Iterator[tuple[str, RecordedError]]:
    missed = Missed.of(x, 0, SIZE)
    quantize_tensor(x, tensor_scale(amax(x)), missed=missed)
    yield "tensor", weight_error([missed.in_rows()], x.numel())
    missed = Missed.of(x, 0, SIZE)
    _, scales, _ = quantize_rows(x, missed=missed)
    yield "channel", weight_error([missed.in_rows(scales)], x.numel())
    missed = Missed.of(x, 0, SIZE, 128)
    _, scales, _ = quantize_blocks(x, (128, 128), missed=missed)
    yield "block128x128", weight_error([missed.in_rows(np.repeat(scales, 128, 0))], x.numel())


def main() -> None:
    print("| weights | scheme | SQNR by row | SQNR | worst row | subnormal | vanished |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, x in weights():
        for scheme, e in errors(x.bfloat16()):
            counts = " | ".join(share(count, e.weights) for count in (e.subnormal, e.vanished))
            ratios = f"{e.row_sqnr_db:.2f} dB | {e.sqnr_db:.2f} dB | {100 * e.row_error:.2f}%"
            print(f"| {name} | {scheme} | {ratios} | {counts} |")
            name = ""


if __name__ == "__main__":
    main()
