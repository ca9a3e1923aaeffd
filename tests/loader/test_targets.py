"""What is written for other readers is this project's to load, too; what is not for stock diffusers it refuses."""

import subprocess
import sys

import pytest
import torch
from runs import converted, replaced
from safetensors import safe_open

from fp8_convert.loader import load_pipeline, report
from fp8_convert.loader.weights import Fp8Weight

CODE = """
import sys
import diffusers
for folder in sys.argv[1:]:
    try:
        diffusers.DiffusionPipeline.from_pretrained(folder)
    except Exception as error:
        print(error)
    else:
        print("loaded", folder)
assert not any(name.startswith("fp8_convert") for name in sys.modules)
"""


def formula(folder: object) -> dict[str, torch.Tensor]:
    """Every FP8 weight of a component with one file, as codes times scale in float32, by module."""
    weights = {}
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:  # type: ignore[attr-defined]
        names = set(file.keys())
        for name in names:
            codes = file.get_tensor(name)
            if codes.dtype != torch.float8_e4m3fn:
                continue
            module = name.removesuffix(".weight")
            if f"{module}.weight_scale" in names:
                weights[module] = codes.float() * file.get_tensor(f"{module}.weight_scale")
            else:
                scale = file.get_tensor(f"{module}.weight_scale_inv")
                grid = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                weights[module] = codes.float() * grid[: codes.shape[0], : codes.shape[1]]
    return weights


@pytest.mark.parametrize("target", ["vllm-omni", "sglang"])
@pytest.mark.parametrize("name", ["qwen_image", "z_image", "wan22"])
def test_a_snapshot_for_a_server_loads_here(name: str, target: str) -> None:
    folder = converted(name, target=target)
    pipe = load_pipeline(folder, **replaced(name))
    assert report(pipe).ok
    for component in ("transformer", "transformer_2"):
        if (dit := getattr(pipe, component, None)) is None:
            continue
        expected = formula(folder / component)
        found = {n: m for n, m in dit.named_modules() if isinstance(m, Fp8Weight)}
        assert found.keys() == expected.keys()
        for module, weight in expected.items():
            assert torch.equal(found[module].dequantized(torch.float32), weight), module


def test_stock_diffusers_refuses_every_snapshot_by_name() -> None:
    folders = [converted(name) for name in ("qwen_image", "z_image", "wan22")]
    run = [sys.executable, "-W", "ignore", "-c", CODE, *map(str, folders)]
    said = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    refusals = [line for line in said if "Unknown quantization type" in line]
    assert len(refusals) == len(folders)
    assert not any(line.startswith("loaded") for line in said)
