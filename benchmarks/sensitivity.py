"""Does the ranking foretell what keeping layers helps, do the estimates hold, and what do static activations cost?

    python benchmarks/sensitivity.py [MODEL]

On the emoji model of the repository unless another is named, six prompts, on the CPU. Prints the tables of
docs/sensitivity.md and docs/calibrate.md: signal-to-noise ratios of the DiT's output in dB.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8_convert.loader import Sensitivity, calibrate, sensitivity
from fp8_convert.loader.quality.layer_errors import decibels

DIT = "transformer"
PROMPTS = ["red apple", "dog face", "rocket", "clown face", "umbrella", "fire engine"]
OTHERS = ["slice of pizza", "tiger face", "steam locomotive", "crescent moon", "soccer ball", "green salad"]
RUN: dict[str, Any] = {"steps": 16, "height": 64, "width": 64, "guidance": 0.0, "device": "cpu", "quiet": True}


def measured(model: str, prompts: Sequence[str], **options: Any) -> float:
    """The DiT's output with every layer that these options leave in FP8."""
    return decibels(sensitivity(model, prompts=prompts, by="block", **RUN, **options).plain[DIT])


def row(*cells: object) -> None:
    print("|", " | ".join(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells), "|", flush=True)


def rankings(model: str, found: Sensitivity) -> None:
    plain = found.plain[DIT]
    row("kept of the ranking", "their share", "predicted", "measured")
    for count in (5, 10, 20):
        for name, units in (("worst", found.ranked[:count]), ("last", found.ranked[-count:])):
            share = sum(unit.share for unit in units)
            layers = [layer for unit in units for layer in unit.layers]
            kept = measured(model, PROMPTS, ignored_layers=layers)
            row(f"the {name} {count}", f"{share:.1%}", decibels(plain * (1 - share)), kept)


def budgets(model: str, folder: Path) -> None:
    row("budget", "by", "kept", "bytes", "estimated", "measured", "in storage", "other prompts", "pictures, mean PSNR")
    for by, budget in (
        ("layer", "32dB"),
        ("layer", "500KB"),
        ("layer", "1500KB"),
        ("block", "32dB"),
        ("pattern", "32dB"),
    ):
        file = folder / f"{by}-{budget}.toml"
        found = sensitivity(model, prompts=PROMPTS, by=by, budget=budget, output=file, check=True, **RUN).proposal
        assert found is not None
        plain, better = (sum(values) / len(values) for values in zip(*found.pictures, strict=True))
        errors = (decibels(errors[DIT]) for errors in (found.estimated, found.measured, found.stored))
        others = measured(model, OTHERS, manifest=str(file))
        row(budget, by, len(found.kept), found.cost, *errors, others, f"{plain:.1f} -> {better:.1f}")


def scales(model: str, folder: Path) -> None:
    row("activations", "the calibrated prompts", "other prompts")
    row("dynamic", measured(model, PROMPTS), measured(model, OTHERS))
    for method in ("max", "percentile", "mse"):
        file = folder / f"{method}.safetensors"
        calibrate(model, prompts=PROMPTS, method=method, output=file, **RUN)
        static = {"activation_scheme": "static", "input_scales": file}
        row(f"static, {method}", measured(model, PROMPTS, **static), measured(model, OTHERS, **static))
    blocks = {"weight_block_size": (128, 128)}
    row("dynamic, blocks", measured(model, PROMPTS, **blocks), measured(model, OTHERS, **blocks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(Path(__file__).parent.parent / "emoji" / "model"))
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as name:
        found = sensitivity(model, prompts=PROMPTS, **RUN)
        whole, added = decibels(found.plain[DIT]), decibels(found.added[DIT])
        print(f"every layer in FP8: {whole:.1f} dB, by adding up {added:.1f} dB\n")
        rankings(model, found)
        print()
        budgets(model, Path(name))
        print()
        scales(model, Path(name))


if __name__ == "__main__":
    main()
