"""What FP8 does to the pictures of the trained emoji model: the numbers of docs/quality.md.

    python benchmarks/quality.py --output benchmarks/results/quality.json [--device cuda] [--pages FOLDER]

Each row is a recipe, compared with the original on emoji/prompts.txt (32 names, one seed, 16 steps); the control is the
original against itself. On a GPU of compute capability 8.9 or newer W8A8 layers multiply codes; elsewhere say
`--backend scaled_mm`, or their activations are not quantised.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from fp8_convert.converter import convert
from fp8_convert.loader import compare

EMOJI = Path(__file__).parent.parent / "emoji"
MODEL, PROMPTS, CALIBRATION = EMOJI / "model", EMOJI / "prompts.txt", EMOJI / "calibration.txt"
SAMPLING: dict[str, Any] = {
    "steps": 16,
    "height": 64,
    "width": 64,
    "guidance": 0.0,
    "extra": {"max_sequence_length": 32},
}
BUDGET = "40dB"


class Story:
    """Runs the recipes one after the other, and keeps a row of each."""

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.device, self.backend, self.pages, self.folder = (
            arguments.device,
            arguments.backend,
            arguments.pages,
            folder,
        )
        self.rows: list[dict[str, Any]] = []

    def row(self, name: str, control: str = "none", fp8: Any = None, **loading: Any) -> None:
        page = None if self.pages is None else self.pages / f"{name.replace(' ', '-')}.html"
        started = time.monotonic()
        found = compare(
            fp8,
            MODEL,
            prompts=PROMPTS,
            control=control,
            output=page,
            force=True,
            device=self.device,
            quiet=True,
            **SAMPLING,
            **({"backend": self.backend} | loading),
        )
        self.rows.append({"recipe": name, **found.to_json()})
        print(f"{name}: {time.monotonic() - started:.0f} s, problems {list(found.problems)}", flush=True)

    def converted(self, name: str, **options: Any) -> Path:
        folder = self.folder / name
        convert(MODEL, folder, **options)
        return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--pages", type=Path, help="folder for the comparisons' HTML pages")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        story = Story(arguments, Path(folder))
        story.row("default", control="attention", quantization="fp8")
        story.row("default, float32 control", control="dtype", quantization="fp8")
        story.row("compact", quantization="fp8", compact=True)
        story.row("blocks of 128", quantization_config={"method": "fp8", "weight_block_size": [128, 128]})
        story.row("w2 kept", quantization_config={"method": "fp8", "ignored_layers": ["feed_forward.w2"]})
        story.row("feed_forward kept", quantization_config={"method": "fp8", "ignored_layers": ["feed_forward"]})
        story.row("weights alone", quantization="fp8", backend="dequantize")
        story.row("first and last 2 steps high", quantization="fp8", high_precision_steps=(2, 2))
