"""Write down vLLM-Omni's rules for the shipped families, from its own code: `record.py SNAPSHOTS OUT.json`.

SNAPSHOTS is a folder of unconverted tiny pipelines, one folder a family. For each component whose linears are
built under the DiT's FP8 config, the record has

- layers: every linear by its quantisation prefix (what `ignored_layers` is compared with): can it be FP8, and which of
  the checkpoint's modules are its rows, in order;
- alone: for each of the checkpoint's modules, and each prefix, what a list of that one name skips.

Nothing here knows a name: rows are found by loading one tensor at a time, skips by asking Fp8Config for each layer.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import omni
import torch
from safetensors import safe_open
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from vllm_omni.diffusion.registry import initialize_model

PACKAGES = ("vllm", "vllm-omni", "torch", "transformers", "diffusers")


def main(snapshots: Path, out: Path) -> None:
    families = {folder.name: _family(folder) for folder in sorted(snapshots.iterdir()) if folder.is_dir()}
    head = {
        "reader": "vLLM-Omni",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "made_by": "tests/readers/vllm_omni/record.py, from the reader's own classes",
    }
    out.write_text(_text({**head, "families": families}) + "\n")


def _text(value: Any, depth: int = 0) -> str:
    """JSON with one line for each layer and each name: what changes in a reader shows in a diff."""
    if not isinstance(value, dict) or depth == 6 or not value:
        return json.dumps(value)
    space = " " * (depth + 1)
    lines = ",\n".join(f"{space}{json.dumps(key)}: {_text(child, depth + 1)}" for key, child in value.items())
    return f"{{\n{lines}\n{' ' * depth}}}"


def _family(snapshot: Path) -> dict[str, Any]:
    fp8 = Fp8Config(is_checkpoint_fp8_serialized=True)
    with omni.loading(snapshot) as config:
        config.quantization_config = fp8
        pipeline = initialize_model(config)
        folders = [source.subfolder for source in pipeline.weights_sources]
        modules = {folder: pipeline.get_submodule(folder) for folder in folders}
        return {
            "pipeline": config.model_class_name,
            "read_by_the_reader_itself": folders,
            "packed_modules_mapping": dict(fp8.packed_modules_mapping),
            "components": {
                folder: _component(pipeline, folder, module, snapshot / folder)
                for folder, module in modules.items()
                if _linears(module)
            },
        }


def _component(pipeline: Any, folder: str, module: torch.nn.Module, files: Path) -> dict[str, Any]:
    linears = _linears(module)
    rows, dropped = _rows(pipeline, folder, module, files)
    layers = {
        linear.prefix or f"({name})": {
            "fp8": isinstance(linear.quant_method, Fp8LinearMethod),
            "rows": rows.get(name, []),
        }
        for name, linear in linears.items()
    }
    names = sorted({source for layer in layers.values() if layer["fp8"] for source in layer["rows"]} | set(layers))
    return {"layers": layers, "dropped": dropped, "alone": {name: _skipped(linears, name) for name in names}}


def _linears(module: torch.nn.Module) -> dict[str, LinearBase]:
    return {name: child for name, child in module.named_modules() if isinstance(child, LinearBase)}


def _rows(pipeline: Any, folder: str, module: torch.nn.Module, files: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Which of the checkpoint's modules fill each linear's weight, in the order of rows; and what fills nothing."""
    found: dict[str, list[tuple[int, str]]] = {}
    dropped = []
    parameters = dict(module.named_parameters())
    for file in sorted(files.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (no dict)
                omni.unset(parameters)
                pipeline.load_weights(iter([(f"{folder}.{name}", shard.get_tensor(name))]))
                filled = {key: p for key, p in parameters.items() if not p.data.float().isnan().all()}
                if not filled:
                    dropped.append(name)
                for key, parameter in filled.items():
                    if key.endswith(".weight") and name.endswith(".weight") and parameter.dim() == 2:
                        first = int((~parameter.data.float().isnan()).any(1).nonzero()[0])
                        found.setdefault(key.removesuffix(".weight"), []).append((first, name.removesuffix(".weight")))
    return {key: [source for _, source in sorted(parts)] for key, parts in found.items()}, dropped


def _skipped(linears: dict[str, LinearBase], name: str) -> list[str]:
    """The layers that a list of this one name keeps in BF16."""
    config = Fp8Config(is_checkpoint_fp8_serialized=True, ignored_layers=[name])
    asked = [linear for linear in linears.values() if isinstance(linear.quant_method, Fp8LinearMethod)]
    return [x.prefix for x in asked if not isinstance(config.get_quant_method(x, x.prefix), Fp8LinearMethod)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
