"""What FP8 does to the pictures of the trained emoji model: the numbers of docs/quality.md.

    python benchmarks/quality.py --output result.json [--device cuda] [--sheet pictures.png] [PART...]

The parts are recipes, static, proposal, faults; without one, all. Every recipe is compared with the original on
emoji/prompts.txt (32 names, one seed, 16 steps); the controls are the original against itself. Scales and rankings come
from emoji/calibration.txt (16 other names). On a GPU of compute capability 8.9 or newer W8A8 layers multiply codes;
elsewhere `--backend scaled_mm` makes them, or their activations would not be quantised.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8_convert.converter import convert
from fp8_convert.loader import calibrate, compare, load_pipeline, sensitivity
from fp8_convert.loader.quality.prompts import read_prompts
from fp8_convert.loader.quality.running import Sampling, cases, generate

EMOJI = Path(__file__).parent.parent / "emoji"
MODEL, PROMPTS, CALIBRATION = EMOJI / "model", EMOJI / "prompts.txt", EMOJI / "calibration.txt"
SAMPLING: dict[str, Any] = {
    "steps": 16,
    "height": 64,
    "width": 64,
    "guidance": 0.0,
    "extra": {"max_sequence_length": 32},
}
E4M3 = torch.float8_e4m3fn
SHARD = "transformer/diffusion_pytorch_model.safetensors"
FAULTY = "layers.5.attention.to_out.0"


def doubled(scale: Tensor) -> Tensor:
    return 2 * scale


def noised(codes: Tensor) -> Tensor:
    """Codes with Gaussian noise of a tenth of their standard deviation."""
    weight = codes.float()
    noise = 0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return (weight + noise).clamp(-448, 448).to(E4M3)


class Story:
    """Runs comparisons one after the other, and keeps what is said of each."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.device, self.backend, self.budget = arguments.device, arguments.backend, arguments.budget
        self.folder = folder
        self.found: dict[str, Any] = {"rows": []}

    def recipes(self) -> None:
        config = {"method": "fp8"}
        self.row("default", control="attention", quantization="fp8")
        self.row("default, once more", control="dtype", quantization="fp8")
        self.row("`--compact`", quantization="fp8", compact=True)
        self.row("blocks of 128×128", quantization_config=config | {"weight_block_size": [128, 128]})
        self.row("`feed_forward.w2` kept", quantization_config=config | {"ignored_layers": ["feed_forward.w2"]})
        self.row("`feed_forward` kept", quantization_config=config | {"ignored_layers": ["feed_forward"]})
        self.row("weights alone (activations in BF16)", quantization="fp8", backend="dequantize")
        self.row("`high_precision_steps=(2, 2)`", quantization="fp8", high_precision_steps=(2, 2))

    def static(self) -> None:
        for method in ("max", "percentile", "mse"):
            scales = self.folder / f"{method}.safetensors"
            calibrate(
                MODEL, prompts=CALIBRATION, method=method, output=scales, device=self.device, quiet=True, **SAMPLING
            )
            converted = self.folder / f"static-{method}"
            convert(MODEL, converted, activation_scheme="static", input_scales=scales)
            self.row(f"static activations, {method}", fp8=converted)

    def proposal(self) -> None:
        manifest = self.folder / "proposed.toml"
        asked: dict[str, Any] = {"budget": self.budget, "output": manifest}
        found = sensitivity(MODEL, prompts=CALIBRATION, device=self.device, quiet=True, **asked, **SAMPLING)
        print(found, flush=True)
        self.found |= {"sensitivity": found.to_json(), "proposed": manifest.read_text()}
        self.row("proposed by sensitivity", quantization="fp8", manifest=str(manifest))

    def faults(self) -> None:
        """One layer of a converted snapshot is damaged; both commands are asked which."""
        faults: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
            (f"scale of `{FAULTY}` doubled", f"{FAULTY}.weight_scale", doubled),
            (f"noise in `{FAULTY}`", f"{FAULTY}.weight", noised),
        ]
        convert(MODEL, self.folder / "sound")
        self.found["faults"] = []
        for name, tensor, change in faults:
            faulty = Path(shutil.copytree(self.folder / "sound", self.folder / tensor))
            rewrite(faulty / SHARD, tensor, change)
            self.row(name, fp8=faulty)
            found = sensitivity(
                MODEL, prompts=CALIBRATION, fp8=faulty, by="block", device=self.device, quiet=True, **SAMPLING
            )
            suspects = [str(suspect) for suspect in found.suspects]
            self.found["faults"].append(
                {"fault": name, "compare": self.found["rows"][-1]["problems"], "sensitivity": suspects}
            )
            print(*suspects, sep="\n", flush=True)

    def row(self, name: str, control: str = "none", fp8: Path | None = None, **loading: Any) -> None:
        started = time.monotonic()
        options = {"backend": self.backend} | loading
        found = compare(
            fp8, MODEL, prompts=PROMPTS, control=control, device=self.device, quiet=True, **SAMPLING, **options
        )
        told = found.to_json()
        self.found["machine"] = told["machine"]
        self.found["rows"].append({"recipe": name} | {key: told[key] for key in ("control", "summary", "problems")})
        print(f"{name}: {time.monotonic() - started:.0f} s, {found.verdict}", *found.problems, sep="\n  ", flush=True)


def rewrite(shard: Path, tensor: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace one tensor of a safetensors file."""
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    save_file(tensors | {tensor: change(tensors[tensor]).contiguous()}, shard, metadata)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: distances of FP8 from the original, and of the control where there was one."""
    lines = ["| | PSNR, mean | worst | SSIM, mean | worst |", "|---|---|---|---|---|"]
    for row in rows:
        for whose, summary in row["summary"].items():
            if summary is not None:
                name = row["recipe"] if whose == "fp8" else f"control: {row['control']['change']}"
                cells = [_number(summary[key]) for key in ("psnr", "worst_psnr")]
                cells += [f"{summary[key]:.4f}" for key in ("ssim", "worst_ssim")]
                lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _number(decibels: float | None) -> str:
    return "identical" if decibels is None else f"{decibels:.1f}"


def sheet(device: str | None, backend: str) -> Image.Image:
    """Rows of pictures: BF16, FP8, and their difference sixteen times, of the first eight prompts."""
    original = DiffusionPipeline.from_pretrained(MODEL, dtype=torch.bfloat16).to(device or "cpu")
    sampling = Sampling(**SAMPLING)
    rows = []
    for pipe in (original, load_pipeline(MODEL, quantization="fp8", device=device or "cpu", backend=backend)):
        chosen = cases(read_prompts(PROMPTS)[:8], sampling)
        rows.append(np.concatenate([generate(pipe, case, sampling).frames[0].numpy() for case in chosen], axis=1))
    rows.append((16 * (rows[1] - rows[0]) / 2 + 0.5).clip(0, 1))
    pixels = (255 * np.concatenate(rows)).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((2 * pixels.shape[1], 2 * pixels.shape[0]), Image.Resampling.BICUBIC)


PARTS = {"recipes": Story.recipes, "static": Story.static, "proposal": Story.proposal, "faults": Story.faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--budget", default="32dB", help="of the proposal")
    parser.add_argument("--sheet", type=Path, help="picture to write: BF16, FP8 and their difference")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        story = Story(arguments, Path(folder))
        for part in arguments.parts or PARTS:
            PARTS[part](story)
    print(table(story.found["rows"]))
    arguments.output.write_text(json.dumps(story.found, indent=1) + "\n")
    if arguments.sheet is not None:
        sheet(arguments.device, arguments.backend).save(arguments.sheet)


if __name__ == "__main__":
    main()
