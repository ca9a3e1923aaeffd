"""Files for ComfyUI in the kernels library that ComfyUI computes with: made into its tensors as comfy/ops.py does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("comfy_kitchen", reason="it is in an environment of its own: make test-readers")
from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout

LAYOUT = "TensorCoreFP8Layout"


def layers(folder: Path) -> Iterator[tuple[str, dict[str, object], torch.Tensor, torch.Tensor]]:
    """Name, statement, codes and scale of every FP8 layer."""
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            stated = json.loads((file.metadata() or {}).get("_quantization_metadata", '{"layers": {}}'))
            for name, entry in stated["layers"].items():
                yield name, entry, file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.weight_scale")


@pytest.mark.parametrize("source", ["z_image", "qwen_image", "wan22"])
def test_every_layer_is_dequantised_and_multiplied_right(made: Callable[..., Path], source: str) -> None:
    found = [*layers(made(source, target="comfyui"))]
    assert len(found) > 20
    torch.manual_seed(0)
    for name, entry, codes, scale in found:
        params = TensorCoreFP8Layout.Params(scale=scale, orig_dtype=torch.bfloat16, orig_shape=tuple(codes.shape))
        weight = QuantizedTensor(codes, LAYOUT, params)
        assert torch.equal(weight.dequantize(), codes.to(torch.bfloat16) * scale.to(torch.bfloat16)), name
        x = torch.randn(8, codes.shape[1], dtype=torch.bfloat16)
        exact = torch.nn.functional.linear(x.float(), codes.float() * scale)
        given = x if entry.get("full_precision_matrix_mult") else QuantizedTensor.from_float(x, LAYOUT, scale=None)
        error = (torch.nn.functional.linear(given, weight).float() - exact).norm() / exact.norm()
        assert error < (0.01 if given is x else 0.06), f"{name}: {error}"
