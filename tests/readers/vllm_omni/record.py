"""vLLM-Omni's rules for the shipped families, from its own code, for tests that run where it is not installed.

For each component whose linears are built under the DiT's FP8 config there are

- layers: every linear, PyTorch's own too, by its quantisation prefix (what `ignored_layers` is compared with; its name
  in brackets where it has none): can it be FP8, and which of the checkpoint's modules are its rows, in order;
- alone: for each of the checkpoint's modules, and each prefix, what a list of that one name skips.

Nothing here knows a name: rows are found by loading one tensor at a time, skips by asking Fp8Config for each layer.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import omni
import torch
from safetensors import safe_open
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod
from vllm_omni.diffusion.registry import initialize_model

_PACKAGES = ("vllm", "vllm-omni", "torch", "transformers", "diffusers")


def recorded(snapshots: Mapping[str, Path]) -> dict[str, Any]:
    """The rules for unconverted tiny pipelines, by the name of their family."""
    return {
        "reader": "vLLM-Omni",
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "made_by": "tests/readers/vllm_omni/record.py, from the reader's own classes",
        "families": {name: _family(folder) for name, folder in snapshots.items()},
    }


def text(value: Any, depth: int = 0) -> str:
    """JSON with one line for each layer and each name: what changes in a reader shows in a diff."""
    if not isinstance(value, dict) or depth == 6 or not value:
        return json.dumps(value)
    space = " " * (depth + 1)
    lines = ",\n".join(f"{space}{json.dumps(key)}: {text(child, depth + 1)}" for key, child in value.items())
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
        getattr(child, "prefix", "") or f"({name})": {"fp8": _in_fp8(child), "rows": rows.get(name, [])}
        for name, child in module.named_modules()
        if isinstance(child, LinearBase | torch.nn.Linear)
    }
    names = sorted({source for layer in layers.values() if layer["fp8"] for source in layer["rows"]} | set(layers))
    config = json.loads((files / "config.json").read_text())
    return {
        "class": config.get("_class_name") or config["architectures"][0],
        "layers": layers,
        "dropped": dropped,
        "alone": {name: _skipped(linears, name) for name in names},
    }


def _in_fp8(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "quant_method", None), Fp8LinearMethod)


def _linears(module: torch.nn.Module) -> dict[str, LinearBase]:
    return {name: child for name, child in module.named_modules() if isinstance(child, LinearBase)}


def _rows(pipeline: Any, folder: str, module: torch.nn.Module, files: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Which of the checkpoint's modules fill each linear's weight, in the order of rows; and what fills nothing."""
    found: dict[str, list[tuple[int, str]]] = {}
    dropped = []
    parameters = dict(module.named_parameters())
    omni.unset(parameters)
    for file in sorted(files.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (no dict)
                pipeline.load_weights(iter([(f"{folder}.{name}", shard.get_tensor(name))]))
                filled = {key: first for key, p in parameters.items() if (first := _first_row(p.data)) is not None}
                if not filled:
                    dropped.append(name)
                for key, first in filled.items():
                    if key.endswith(".weight") and name.endswith(".weight"):
                        found.setdefault(key.removesuffix(".weight"), []).append((first, name.removesuffix(".weight")))
                omni.unset({key: parameters[key] for key in filled})
    return {key: [source for _, source in sorted(parts)] for key, parts in found.items()}, dropped


def _first_row(parameter: torch.Tensor) -> int | None:
    """The first row that has been set; a weight loader sets whole rows."""
    column = parameter.reshape(parameter.shape[0], -1)[:, 0] if parameter.dim() else parameter.reshape(1)
    rows = (~column.float().isnan()).nonzero()
    return int(rows[0]) if len(rows) else None


def _skipped(linears: dict[str, LinearBase], name: str) -> list[str]:
    """The layers that a list of this one name keeps in BF16."""
    config = Fp8Config(is_checkpoint_fp8_serialized=True, ignored_layers=[name])
    asked = [linear for linear in linears.values() if _in_fp8(linear)]
    return [x.prefix for x in asked if not isinstance(config.get_quant_method(x, x.prefix), Fp8LinearMethod)]
