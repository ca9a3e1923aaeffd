"""ComfyUI's own loading of files for it: detection, names, FP8 layers, and no parameter that is left as it was.

ComfyUI is no package, so this is not among the readers that `run.py` sets up: COMFYUI names a checkout (0.29.0, commit
4f874c5e, was run), FP8_CONVERT_PYTHON the project's interpreter, and `packages.txt` what the environment has. What only
images and sound need is replaced by `stubs.py`: the loading of models never calls it. On a CPU ComfyUI computes FP8
layers in full precision, whatever a file says; what the file says is looked at.

    cd tests/readers && COMFYUI=… FP8_CONVERT_PYTHON=… python -m pytest -c pytest.ini --confcutdir=. comfyui
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

COMFYUI = os.environ.get("COMFYUI")
if not COMFYUI:
    pytest.skip("COMFYUI names no checkout of ComfyUI", allow_module_level=True)
sys.path[:0] = [COMFYUI, str(Path(__file__).parent)]
sys.argv[1:] = ["--cpu"]
import stubs  # noqa: E402

stubs.install()
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402

Made = Callable[[str], Path]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("files")

    def make(name: str) -> Path:
        out = root / name
        if not out.exists():
            script = Path(__file__).with_name("sources.py")
            done = subprocess.run(
                [os.environ["FP8_CONVERT_PYTHON"], str(script), name, str(out)], text=True, capture_output=True
            )
            if done.returncode:
                pytest.fail(done.stderr, pytrace=False)
        return out

    return make


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer that is saved, FP8 ones dequantised in float32."""
    found: dict[str, torch.Tensor] = {}
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if isinstance(value, QuantizedTensor):
            found[name] = value._qdata.float() * value._params.scale
        else:
            found[name] = value.detach()
    return found


def stated(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The file's tensors, FP8 ones dequantised in float32, and its layers."""
    tensors = load_file(path)
    _, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    layers = json.loads(metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
    for layer in layers:
        scale = tensors.pop(f"{layer}.weight_scale")
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].float() * scale
    return tensors, layers


@pytest.mark.parametrize(("name", "model"), [("wan", "WAN21_T2V"), ("z_image", "ZImage"), ("qwen_image", "QwenImage")])
def test_diffusion_models(files: Made, name: str, model: str, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = (files(name) / "diffusion_models").iterdir()
    caplog.set_level(logging.DEBUG)

    patcher = comfy.sd.load_diffusion_model(str(path))

    assert type(patcher.model.model_config).__name__ == model
    loaded = patcher.model.diffusion_model
    tensors, layers = stated(path)
    found = parameters(loaded)
    assert not [r.message for r in caplog.records if "missing" in r.message or "left over" in r.message]
    assert not tensors.keys() - found.keys()  # nothing is not read
    assert not {name for name, _ in loaded.named_parameters()} - tensors.keys()  # nothing is left as it was
    for key, value in tensors.items():
        assert torch.equal(found[key].to(value.dtype), value), key
    quantised = {n.removesuffix(".weight") for n, p in loaded.named_parameters() if isinstance(p, QuantizedTensor)}
    assert quantised == set(layers)
    for layer in layers:
        assert loaded.get_submodule(layer)._full_precision_mm_config is False  # on a CPU it is computed so all the same


def test_vae(files: Made) -> None:
    (path,) = (files("wan_vae") / "vae").iterdir()
    weights, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)

    vae = comfy.sd.VAE(sd=weights, metadata=metadata)

    found, tensors = parameters(vae.first_stage_model), load_file(path)
    assert tensors.keys() == found.keys()
    assert all(torch.equal(found[key].to(value.dtype), value) for key, value in tensors.items())
