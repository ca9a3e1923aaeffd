"""FP8 storage: bit-equality with a plain layer holding the dequantised weights, bounded memory, unchanged
codes.
"""

import weakref

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from layers import BLOCKS, dequantized_twin, fp8_twin
from torch import nn

from fp8_convert.loader import kernels

LAYERS = {
    "linear": (lambda: nn.Linear(200, 136), (3, 5, 200)),
    "linear-no-bias": (lambda: nn.Linear(200, 136, bias=False), (1, 200)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2), (2, 6, 9, 9)),
    "conv2d-reflect": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect", bias=False),
        (2, 6, 9, 9),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 6, (3, 1, 1), groups=2), (1, 4, 5, 3, 3)),
    "wan": (lambda: WanCausalConv3d(4, 6, 3, padding=1), (1, 4, 3, 6, 6)),
    "qwen": (lambda: QwenImageCausalConv3d(4, 6, 3, padding=1), (1, 4, 3, 6, 6)),
}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest, device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    make, shape = LAYERS[request.param]
    torch.manual_seed(0)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return make().to(device, torch.bfloat16).requires_grad_(False), x.to(device, torch.bfloat16)


def test_equals_a_plain_layer_with_the_dequantised_weight(case: tuple[nn.Module, torch.Tensor]) -> None:
    source, x = case
    for block in BLOCKS.values() if isinstance(source, nn.Linear) else (None,):
        stored = fp8_twin(source, "storage", block)
        expected = dequantized_twin(source, stored)(x)
        assert torch.equal(stored(x), expected)
        assert not torch.equal(stored(x), source(x)), "the quantisation must show"


def test_is_still_its_own_kind_of_layer(case: tuple[nn.Module, torch.Tensor]) -> None:
    source, _ = case
    stored = fp8_twin(source, "storage")
    assert isinstance(stored, type(source))
    assert type(stored).__name__ == "Storage" + type(source).__name__
    assert type(fp8_twin(source, "storage")) is type(stored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_computes_in_the_inputs_dtype(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    source = nn.Linear(64, 32).to(device, dtype).requires_grad_(False)
    stored = fp8_twin(source, "storage")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    assert torch.equal(stored(x), dequantized_twin(source, stored)(x))


def test_empty_and_noncontiguous_inputs(device: torch.device) -> None:
    stored = fp8_twin(nn.Linear(64, 32).to(device, torch.bfloat16), "storage")
    assert stored(torch.empty(0, 64, dtype=torch.bfloat16, device=device)).shape == (0, 32)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(3)).to(device, torch.bfloat16)
    assert torch.equal(stored(x.t()), stored(x.t().contiguous()))


def test_codes_and_scales_never_change(case: tuple[nn.Module, torch.Tensor]) -> None:
    source, x = case
    stored = fp8_twin(source, "storage")
    codes, scale = stored.codes.clone(), stored.scale.clone()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        stored.to(dtype)
        stored(x.to(dtype))
    assert torch.equal(stored.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(stored.scale, scale)


def test_at_most_one_layers_weight_exists(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the bytes of dequantised weights alive at any moment of a forward through mixed layers."""
    layers = [
        fp8_twin(nn.Conv2d(4, 8, 3, padding=1).to(device, torch.bfloat16), "storage"),
        nn.Flatten(1),
        fp8_twin(nn.Linear(128, 256).to(device, torch.bfloat16), "storage", 128),
        fp8_twin(nn.Linear(256, 64).to(device, torch.bfloat16), "w8a8", backend="dequantize"),
        fp8_twin(nn.Linear(64, 8).to(device, torch.bfloat16), "storage"),
    ]
    alive: dict[int, int] = {}
    peaks: list[int] = []
    dequantize = kernels.dequantize

    def watched(*args: object) -> torch.Tensor:
        weight = dequantize(*args)
        key = len(peaks)
        alive[key] = weight.nbytes
        weakref.finalize(weight, alive.pop, key)
        peaks.append(sum(alive.values()))
        return weight

    monkeypatch.setattr(kernels, "dequantize", watched)
    with torch.no_grad():
        nn.Sequential(*layers)(torch.randn(300, 4, 4, 4).to(device, torch.bfloat16))
    assert peaks == [2 * layers[i].codes.numel() for i in (0, 2, 3, 4)]
    assert not alive
