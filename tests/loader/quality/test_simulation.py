"""What a simulated layer gives is what an FP8 layer gives; its weights are those that a conversion writes."""

from __future__ import annotations

import copy

import pytest
import torch
from layers import BLOCKS, Block, fp8_twin
from pipelines import saved
from runs import converted
from torch import nn

from fp8_convert.converter.format.header import TensorInfo
from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.converter.plan.decide import Decision, PlannedTensor
from fp8_convert.converter.plan.settings import Settings
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.loader import load_component
from fp8_convert.loader.quality.original import Layer, open_original
from fp8_convert.loader.quality.simulation import PlannedWeights, simulated
from fp8_convert.loader.weights import Fp8Weight


def layer_of(module: nn.Linear, how: WeightFormat, input_scale: float | None = None) -> Layer:
    info = TensorInfo("layer.weight", "BF16", tuple(module.weight.shape), 0, 2 * module.weight.numel())
    return Layer("dit", module, PlannedTensor(info, Decision("all", "a test", "Linear", how, input_scale=input_scale)))


def format_of(mode: str, block: Block) -> WeightFormat:
    return WeightFormat(mode, (block, block) if isinstance(block, int) else None, block == "channel")


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("mode", ["w8a8", "storage"])
@pytest.mark.parametrize("bias", [True, False])
def test_it_gives_what_the_fp8_layer_gives(block: Block, mode: str, bias: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(512, 256, bias=bias).to(device)
    x = torch.randn(2, 40, 512, device=device) * torch.logspace(-2, 1, 40, device=device)[:, None]
    options = {"backend": "scaled_mm"} if mode == "w8a8" else {}
    twin = fp8_twin(plain, mode, block, **options)
    layer = layer_of(plain, format_of(mode, block))
    with torch.no_grad():
        expected, untouched = twin(x), plain(x)
        with simulated([layer], PlannedWeights([layer])):
            found = plain(x)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=2e-3, atol=2e-3 * float(expected.std()))
    assert float((found - untouched).std() / untouched.std()) > 5e-3, "FP8 does change it"
    assert torch.equal(plain(x), untouched), "and afterwards it is as it was"


def test_static_activations_saturate_at_the_given_scale(device: torch.device) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 32).to(device)
    x = torch.randn(16, 64, device=device)
    twin = fp8_twin(plain, "w8a8", activation_scheme="static", backend="scaled_mm")
    twin.input_scale.fill_(1 / 448)
    layer = layer_of(plain, WeightFormat("w8a8"), input_scale=1 / 448)
    with torch.no_grad(), simulated([layer], PlannedWeights([layer])):
        assert torch.allclose(plain(x), twin(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (32, 40)])
def test_shapes_that_the_products_do_not_take_keep_their_activations(rows: int, columns: int) -> None:
    """`backend.choose` dequantises a weight that is no multiple of 16x16."""
    plain = nn.Linear(columns, rows)
    x = torch.randn(8, columns)
    layer = layer_of(plain, WeightFormat("w8a8"))
    twin = fp8_twin(plain, "w8a8")  # on the CPU it dequantises
    with torch.no_grad(), simulated([layer], PlannedWeights([layer])):
        assert torch.allclose(plain(x), twin(x), atol=1e-5)


def test_without_weights_only_the_rounding_is_another() -> None:
    plain = nn.Linear(64, 64).to(torch.bfloat16)
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    layer = layer_of(plain, WeightFormat("w8a8"))
    with torch.no_grad(), simulated([layer], None):
        found = plain(x)
    exact = copy.deepcopy(plain).double()(x.double())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16)) or torch.allclose(found.double(), exact, rtol=2**-8)


@pytest.mark.parametrize(
    "options", [{}, {"compact": True}, {"weight_block_size": (128, 128)}], ids=["plain", "compact", "blocks"]
)
def test_planned_weights_are_those_that_a_conversion_writes(options: dict[str, object]) -> None:
    cpu = torch.device("cpu")
    original = open_original(
        saved("qwen_image"), Settings.read(options), HubAccess(), device=cpu, dtype="bfloat16", given={}
    )
    layers = original.layers()
    written = load_component(converted("qwen_image", **options), "transformer", device=cpu)
    held = {n: m for n, m in written.named_modules() if isinstance(m, Fp8Weight)}
    assert [layer.name for layer in layers] == sorted(held)
    weights = PlannedWeights(layers)
    for layer in layers:
        assert torch.equal(weights(layer), held[layer.name].dequantized(torch.float32)), layer.name


def test_groups_are_the_manifests() -> None:
    original = open_original(
        saved("z_image"), Settings(), HubAccess(), device=torch.device("cpu"), dtype=None, given={}
    )
    domains: dict[tuple[str, str], list[str]] = {}
    for layer in original.w8a8_layers():
        domains.setdefault(layer.domain, []).append(layer.name.rpartition(".")[2])
    assert {tuple(sorted(names)) for names in domains.values()} == {
        ("to_k", "to_q", "to_v"),
        ("0",),
        ("w1", "w3"),
        ("w2",),
    }
