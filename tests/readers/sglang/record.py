"""Write down SGLang's rules for the DiTs of the shipped families, from its own code: `record.py SNAPSHOTS OUT.json`.

SNAPSHOTS is a folder of unconverted tiny pipelines, one folder a family. For each DiT, the record has

- layers: every linear by the name that `ignored_layers` is compared with: can it be FP8, and which of the checkpoint's
  modules are its rows, in order;
- scales: for one scale per tensor and for blocks, the checkpoint's modules whose scale has a parameter;
- alone: for each of the checkpoint's modules and each of SGLang's names, what a list of that one name skips.

Nothing here knows a name: modules are built by SGLang, names go through its map, skips are asked of its Fp8Config.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from dit_loader import build, destination
from safetensors import safe_open
from sglang.multimodal_gen.runtime.layers.linear import LinearBase
from sglang.multimodal_gen.runtime.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod

PACKAGES = ("sglang", "torch", "transformers", "diffusers")
BLOCK = [2, 2]  # divides the tiny dimensions; SGLang takes any


def main(snapshots: Path, out: Path) -> None:
    families = {folder.name: _dit(folder / "transformer") for folder in sorted(snapshots.iterdir()) if folder.is_dir()}
    head = {
        "reader": "SGLang",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "made_by": "tests/readers/sglang/record.py, from the reader's own classes",
    }
    out.write_text(json.dumps({**head, "families": families}, indent=1) + "\n")


def _dit(component: Path) -> dict[str, Any]:
    per_tensor = build(component, Fp8Config(is_checkpoint_fp8_serialized=True))
    blocks = build(component, Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=BLOCK))
    modules = _checkpoint_modules(component)
    linears = {name: child for name, child in per_tensor.named_modules() if isinstance(child, LinearBase)}
    rows: dict[str, list[tuple[int, str]]] = {}
    for module in modules:
        target, part = destination(per_tensor, f"{module}.weight")
        rows.setdefault(target.removesuffix(".weight"), []).append((part, module))
    layers = {
        linear.prefix or f"({name})": {
            "fp8": isinstance(linear.quant_method, Fp8LinearMethod),
            "rows": [module for _, module in sorted(rows.get(name, []))],
        }
        for name, linear in linears.items()
    }
    fp8_rows = [module for layer in layers.values() if layer["fp8"] for module in layer["rows"]]
    names = sorted({*fp8_rows, *(name for name, layer in layers.items() if layer["fp8"])})
    return {
        "class": type(per_tensor).__name__,
        "layers": layers,
        "scales": {
            "weight_scale": [m for m in sorted(fp8_rows) if _has(per_tensor, f"{m}.weight_scale")],
            "weight_scale_inv": [m for m in sorted(fp8_rows) if _has(blocks, f"{m}.weight_scale_inv")],
        },
        "alone": {name: _skipped(component, name, layers) for name in names},
    }


def _checkpoint_modules(component: Path) -> list[str]:
    """Modules with a matrix, as the files spell them."""
    found = []
    for file in sorted(component.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                if name.endswith(".weight") and len(shard.get_slice(name).get_shape()) == 2:
                    found.append(name.removesuffix(".weight"))
    return found


def _has(model: torch.nn.Module, name: str) -> bool:
    return destination(model, name)[0] in model.state_dict()


def _skipped(component: Path, name: str, layers: dict[str, Any]) -> list[str]:
    """The layers that a list of this one name leaves unquantised."""
    config = Fp8Config.from_config({"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": [name]})
    try:
        model = build(component, config)
    except ValueError as error:
        return [f"refused: {error}"]
    linears = [child for child in model.modules() if isinstance(child, LinearBase)]
    kept = {linear.prefix for linear in linears if not isinstance(linear.quant_method, Fp8LinearMethod)}
    return sorted(kept & {layer for layer, how in layers.items() if how["fp8"]})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
