"""Decoding with the VAEs of Qwen-Image and Wan2.2, convolutions in FP8 storage, against BF16 and layerwise casting.

    python benchmarks/vae.py [--json FILE] [--only ours]

Random weights, eager, medians in milliseconds, one CUDA device. Layers as Qwen-Image's manifest chooses them: Wan's VAE
has the same ones (its own manifest leaves it in BF16). `peak` is GPU memory of a decode, `ratio` is to BF16.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
from gpu_models import decisions, make_fp8, random_model
from recording import Recording
from timing import DEVICE, limited, median, peak_gigabytes

LATENTS = {  # of 1024x1024 pixels; of 17 frames of 832x480
    "Qwen-Image, 1024x1024": ("AutoencoderKLQwenImage", (1, 16, 1, 128, 128)),
    "Wan2.2, 17 frames of 832x480": ("AutoencoderKLWan", (1, 16, 5, 60, 104)),
}
LIMIT = 120  # seconds for one form of a VAE


def stored(model: Any) -> dict[str, Any]:
    return decisions(model, "qwen-image", "vae", "AutoencoderKLQwenImage")


FORMS: dict[str, Callable[[Any], None]] = {
    "bf16": lambda model: None,
    "ours": lambda model: make_fp8(model, stored(model)),
    "layerwise casting": peers.layerwise,
    "SDNQ": lambda model: peers.sdnq(model, set(stored(model)), multiply=False),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all numbers there, after every row")
    parser.add_argument("--only", choices=["ours"], help="BF16 and ours, without the other tools")
    arguments = parser.parse_args()
    recording = Recording(arguments.json)
    for name, (class_name, shape) in LATENTS.items():
        latents = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        bf16 = 0.0
        for what, convert in FORMS.items():
            if arguments.only and what not in ("bf16", "ours"):
                continue
            with recording.failing(case=name, what=what), limited(LIMIT):
                model = random_model("diffusers", class_name, {})
                convert(model)
                resident = torch.cuda.memory_allocated() / 1e9
                ms = median(lambda model=model, latents=latents: model.decode(latents), 1000)
                bf16 = ms if what == "bf16" else bf16
                peak = peak_gigabytes(lambda model=model, latents=latents: model.decode(latents))
                recording.add(case=name, what=what, ms=ms, ratio=ms / bf16, resident_gb=resident, peak_gb=peak)
                del model


if __name__ == "__main__":
    main()
