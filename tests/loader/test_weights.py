"""What modules must survive: casts, moves, copies, pickles, state dicts, foreign eyes on their weights."""

import copy
import pickle

import pytest
import torch
from layers import fp8_twin
from torch import nn

from fp8_convert.loader.weights import Fp8Weight

CASES = {
    "w8a8": (lambda: nn.Linear(128, 64), "w8a8", None, (2, 128)),
    "w8a8-block": (lambda: nn.Linear(256, 128), "w8a8", 128, (2, 256)),
    "w8a8-channel": (lambda: nn.Linear(128, 64), "w8a8", "channel", (2, 128)),
    "storage": (lambda: nn.Linear(128, 64), "storage", None, (2, 128)),
    "storage-block": (lambda: nn.Linear(200, 136), "storage", 128, (2, 200)),
    "storage-channel": (lambda: nn.Linear(200, 136), "storage", "channel", (2, 200)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3), "storage", None, (1, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3), "storage", None, (1, 4, 5, 5, 5)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Fp8Weight, torch.Tensor]:
    make, mode, block, shape = CASES[request.param]
    torch.manual_seed(0)
    options = {"backend": "scaled_mm"} if mode == "w8a8" else {}
    layer = fp8_twin(make().to(torch.bfloat16), mode, block, **options)
    return layer, torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def at_rest(layer: Fp8Weight) -> tuple[bytes, bytes]:
    return layer.codes.view(torch.uint8).numpy().tobytes(), layer.scale.numpy().tobytes()


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.float32).to(torch.bfloat16),
        lambda m: m.half().bfloat16(),
        lambda m: m.double().to(dtype=torch.bfloat16),
        lambda m: m.type(torch.bfloat16),
        lambda m: nn.Sequential(m).to("cpu", torch.float16)[0].to(torch.bfloat16),
    ],
    ids=["to", "half", "double", "type", "parent"],
)
def test_casts_leave_codes_and_scales(case: tuple[Fp8Weight, torch.Tensor], cast: object) -> None:
    layer, x = case
    before, output = at_rest(layer), layer(x)
    cast(layer)
    assert at_rest(layer) == before
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.int8, torch.float32)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer(x), output)


def test_compute_dtype_follows_casts(case: tuple[Fp8Weight, torch.Tensor]) -> None:
    layer, x = case
    assert layer.compute_dtype == torch.bfloat16
    layer.to(torch.float16)
    assert layer.compute_dtype == torch.float16
    assert layer(x.half()).dtype == torch.float16


def test_meta_and_back_keeps_dtypes(case: tuple[Fp8Weight, torch.Tensor]) -> None:
    layer, _ = case
    layer.to("meta").to_empty(device="cpu")
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.int8, torch.float32)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_separate(case: tuple[Fp8Weight, torch.Tensor], copier: object) -> None:
    layer, x = case
    twin = copier(layer)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    twin.codes.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_state_dict_round_trip(case: tuple[Fp8Weight, torch.Tensor]) -> None:
    layer, x = case
    other = copy.deepcopy(layer)
    other.codes.zero_()
    other.scale.zero_()
    for state in (layer.state_dict(), {**layer.state_dict(), "weight": layer.codes}):
        for assign in (False, True):
            fresh = copy.deepcopy(other)
            fresh.load_state_dict(state, assign=assign)
            assert fresh.weight.dtype == torch.int8
            assert torch.equal(fresh(x), layer(x))


def test_loading_anything_but_codes_is_refused(case: tuple[Fp8Weight, torch.Tensor]) -> None:
    layer, _ = case
    plain = {**layer.state_dict(), "weight": layer.codes.to(torch.bfloat16)}
    with pytest.raises(RuntimeError, match="this layer holds FP8 codes"):
        layer.load_state_dict(plain)
    scale = "weight_scale_inv" if layer.block else "weight_scale"
    with pytest.raises(RuntimeError, match="scales are float32"):
        layer.load_state_dict({**layer.state_dict(), scale: layer.scale.to(torch.bfloat16)})


def test_foreign_code_sees_no_float_weight(case: tuple[Fp8Weight, torch.Tensor]) -> None:
    from diffusers.models.modeling_utils import get_parameter_dtype

    layer, _ = case
    assert not layer.weight.is_floating_point()
    assert not any(p.requires_grad for p in layer.parameters())
    assert get_parameter_dtype(layer) == torch.bfloat16
    assert sum(p.nbytes for p in layer.parameters() if p.ndim > 1) == layer.codes.numel()
