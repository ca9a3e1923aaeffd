"""W8A8 linears: the product against a float64 reference of the quantised operation, inputs of every kind."""

import logging

import pytest
import torch
from layers import BLOCKS, Block, dequantized_twin, fp8_twin
from torch import Tensor, nn

from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.loader import backend, linear
from fp8_convert.loader.install import install
from fp8_convert.loader.weights import Fp8Weight

# Of the norm: the rounding of the result's dtype and, on CUDA, the accumulators of the FP8 matrix units, which keep 14
# bits. Quantisation noise itself is 4e-2.
TOLERANCE = {
    "cpu": {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5},
    "cuda": {torch.bfloat16: 8e-3, torch.float16: 3e-3, torch.float32: 3e-3},
}
DTYPES = list(TOLERANCE["cpu"])


def plain(n: int, k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias).to(device, dtype).requires_grad_(False)


def activation_codes(x: Tensor, block: int | None, input_scale: Tensor | None) -> Tensor:
    """The activations that the product sees, float64: quantised and multiplied by their scales again."""
    wide = x.reshape(-1, x.shape[-1]).float()
    if input_scale is not None:
        codes = (wide * (1 / input_scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.double() * input_scale.double()
    groups = wide.split(block or wide.shape[1], dim=1)
    seen = []
    for group in groups:
        scale = (group.abs().amax(1, keepdim=True) / 448).clamp(min=2.0**-126)
        seen.append((group * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double())
    return torch.cat(seen, 1)


def reference(layer: Fp8Weight, x: Tensor) -> Tensor:
    """float64 of what the layer computes: quantised activations times dequantised weight, plus bias."""
    scale = layer.scale.double()
    if layer.block:
        n, k = layer.codes.shape
        scale = scale.repeat_interleave(layer.block[0], 0).repeat_interleave(layer.block[1], 1)[:n, :k]
    seen = activation_codes(x, layer.block and layer.block[1], layer._buffers.get("input_scale"))
    out = seen @ (layer.codes.double() * scale).t()
    if layer.bias is not None:
        out = out + layer.bias.double()
    return out.view(*x.shape[:-1], -1)


def assert_close(out: Tensor, expected: Tensor) -> None:
    assert float((out.double() - expected).norm() / expected.norm()) < TOLERANCE[out.device.type][out.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("shape", [(2, 5, 512), (1, 512), (512,), (3, 1, 7, 512)], ids=str)
def test_scaled_product_agrees_with_float64(
    device: torch.device, dtype: torch.dtype, bias: bool, block: Block, shape: tuple[int, ...]
) -> None:
    layer = fp8_twin(plain(256, 512, device, dtype, bias), "w8a8", block, backend="scaled_mm")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert layer.product_on(device).product == ("groups" if block == 128 else "rows")
    assert_close(out, reference(layer, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_very_different_size_keep_their_precision(device: torch.device, dtype: torch.dtype) -> None:
    """A scale for each row is what such weights need: one for all would leave the small ones without a code."""
    source = plain(256, 512, device, dtype, bias=False)
    source.weight.data *= torch.logspace(-4, 0, 256, device=device)[:, None].to(dtype)
    layer = fp8_twin(source, "w8a8", "channel", backend="scaled_mm")
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(10)).to(device, dtype)
    exact = x.double() @ source.weight.double().t()
    expected = reference(layer, x).t()
    for row, out in enumerate(layer(x).t()):
        error = (out.double() - expected[row]).norm() / expected[row].norm()
        assert error < 2 * TOLERANCE[device.type][dtype]  # of sixteen numbers alone, so twice that of many
        assert (out.double() - exact[:, row]).norm() / exact[:, row].norm() < 0.1


def test_edge_blocks(device: torch.device) -> None:
    layer = fp8_twin(plain(208, 336, device), "w8a8", 128, backend="scaled_mm")
    x = torch.randn(9, 336, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)
    expected = reference(layer, x)
    if layer.product_on(device).product == "dequantize":
        expected = dequantized_twin(plain(208, 336, device), layer)(x).double()
    assert_close(layer(x), expected)


def test_static_scheme_uses_the_input_scale(device: torch.device) -> None:
    layer = fp8_twin(plain(256, 384, device), "w8a8", activation_scheme="static", backend="scaled_mm")
    layer.input_scale.fill_(0.005)  # saturates beyond 2.24, so per-token scales would show
    x = torch.randn(6, 384, generator=torch.Generator().manual_seed(3)).to(device, torch.bfloat16)
    assert layer.product_on(device).product == "tensor"
    assert_close(layer(x), reference(layer, x))


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_tokens_do_not_touch_each_other(device: torch.device, block: Block) -> None:
    layer = fp8_twin(plain(256, 512, device), "w8a8", block, backend="scaled_mm")
    x = torch.randn(6, 512, generator=torch.Generator().manual_seed(4)).to(device, torch.bfloat16)
    x[1] = 0
    x[3, 5] = 6.6e4
    out = layer(x)
    assert out.isfinite().all()
    assert torch.equal(out[1], layer.bias)
    expected = reference(layer, x)
    for token in (0, 2, 3, 4, 5):
        assert_close(out[token], expected[token])


@pytest.mark.parametrize("choice", ["scaled_mm", "dequantize"])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_empty_and_noncontiguous_inputs(device: torch.device, choice: str, block: Block) -> None:
    source = plain(256, 384, device)
    layer = fp8_twin(source, "w8a8", block, backend=choice)
    assert layer(torch.empty(2, 0, 384, dtype=torch.bfloat16, device=device)).shape == (2, 0, 256)
    wide = torch.randn(4, 6, 768, generator=torch.Generator().manual_seed(5)).to(device, torch.bfloat16)
    for view in (wide[..., 100:484], wide.transpose(0, 1)[..., :384], wide[:, ::2, :384]):
        if layer.product_on(device).product == "dequantize":
            assert_close(layer(view), dequantized_twin(source, layer)(view).double())
        else:
            assert torch.equal(layer(view), layer(view.contiguous()))


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_dequantising_equals_a_plain_layer_with_those_weights(device: torch.device, block: Block) -> None:
    source = plain(208, 336, device)
    layer = fp8_twin(source, "w8a8", block, backend="dequantize")
    x = torch.randn(300, 336, generator=torch.Generator().manual_seed(6)).to(device, torch.bfloat16)
    assert torch.equal(layer(x), dequantized_twin(source, layer)(x))  # fewer tokens multiply the codes


def test_gradients_pass_through(device: torch.device) -> None:
    source = plain(256, 384, device)
    layer = fp8_twin(source, "w8a8", backend="scaled_mm")
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(7)).to(device, torch.bfloat16)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(mine).float().sum().backward()
    dequantized_twin(source, layer)(theirs).float().sum().backward()
    assert torch.equal(mine.grad, theirs.grad)


def test_float64_is_computed_in_float64(device: torch.device) -> None:
    source = plain(256, 384, device, torch.float64)
    layer = fp8_twin(source, "w8a8", backend="scaled_mm")
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(7)).to(device, torch.float64)
    assert torch.equal(layer(x), dequantized_twin(source, layer)(x))


def test_autocast_decides_the_dtype(device: torch.device) -> None:
    layer = fp8_twin(plain(256, 384, device), "w8a8", backend="scaled_mm")
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(torch.ones(2, 384, device=device)).dtype == torch.bfloat16


def test_the_cpu_dequantises_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    backend._say_once.cache_clear()
    layers = [fp8_twin(plain(32, 32, torch.device("cpu")), "w8a8") for _ in range(2)]
    with caplog.at_level(logging.WARNING, "fp8_convert.loader"):
        for layer in layers:
            layer(torch.ones(1, 32, dtype=torch.bfloat16))
    assert [r.message for r in caplog.records] == [
        "FP8 linears dequantise their weight in each forward: the CPU has no FP8 matrix units"
    ]
    assert layers[0].product_on(torch.device("cpu")).product == "dequantize"


@pytest.mark.gpu
def test_cuda_runs_the_scaled_matmul_by_itself() -> None:
    device = torch.device("cuda", 0)
    layer = fp8_twin(plain(256, 384, device), "w8a8")
    assert layer.product_on(device).product == "rows"
    odd = fp8_twin(plain(250, 384, device), "w8a8")
    assert odd.product_on(device) == ("dequantize", "a weight of 250x384 is not a multiple of 16x16")
    x = torch.ones(3, 384, device=device, dtype=torch.bfloat16)
    assert_close(odd(x), dequantized_twin(plain(250, 384, device), odd)(x).double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 257])
@pytest.mark.parametrize(("n", "k"), [(256, 512), (3072, 3072), (16, 4096)])
def test_cuda_runs_scales_of_rows_by_itself(dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    device = torch.device("cuda", 0)
    assert fp8_twin(plain(n, k, device, dtype), "w8a8", "channel").product_on(device).product == "rows"
    layer = fp8_twin(plain(n, k, device, dtype), "w8a8", "channel", backend="scaled_mm")
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(8)).to(device, dtype)
    assert_close(layer(x), reference(layer, x))
    odd = fp8_twin(plain(250, 384, device, dtype), "w8a8", "channel")
    assert odd.product_on(device).product == "dequantize"
    assert_close(odd(x[:, :384]), dequantized_twin(plain(250, 384, device, dtype), odd)(x[:, :384]).double())


@pytest.mark.gpu
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize(("n", "k"), [(256, 512), (512, 1024), (3072, 12288)])
def test_long_sums_of_few_tokens_take_a_bias(n: int, k: int, block: Block) -> None:
    """Where cuBLAS divides a sum among blocks it refuses a bias: a short prompt's MLP must not end the picture."""
    device = torch.device("cuda", 0)
    layer = fp8_twin(plain(n, k, device), "w8a8", block, backend="scaled_mm")
    for rows in (1, 2, 8, 16, 17, 31, 32, 33, 34, 48, 64, 100, 127, 128, 129):
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(device, torch.bfloat16)
        assert_close(layer(x), reference(layer, x))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("mode", ["w8a8", "storage"])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("tokens", [1, 7, 256, 4352, 32760])
@pytest.mark.parametrize("k", [3840, 1360, 1250])
def test_as_many_tokens_as_models_have(device: torch.device, mode: str, block: Block, tokens: int, k: int) -> None:
    """A token of zeros, one with an outlier, one with a NaN; K a multiple of 128, of 16, of neither."""
    layer = fp8_twin(plain(528, k, device), mode, block)
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
    x[0, 11] = 3000
    if tokens > 1:
        x[-1], x[-2, k - 1] = 0, float("nan")
    out = layer(x)
    quantized = mode == "w8a8" and tokens > 32 and layer.product_on(device).product != "dequantize"
    good = [i for i in range(tokens) if i != tokens - 2]
    if quantized:
        expected = reference(layer, x[good])
    else:
        expected = x[good].double() @ dequantized_twin(plain(528, k, device), layer).weight.double().t()
        expected += layer.bias.double()
    assert_close(out[good], expected)
    if tokens > 1:
        assert torch.equal(out[-1], layer.bias)
        assert bool(out[-2].isnan().all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="Hopper")
@pytest.mark.parametrize("rows", [1, 3, 257])
@pytest.mark.parametrize("k", [512, 1024, 3072])
def test_block_products_on_hopper(rows: int, k: int) -> None:
    device = torch.device("cuda", 0)
    assert fp8_twin(plain(384, k, device), "w8a8", 128).product_on(device).product == "groups"
    layer = fp8_twin(plain(384, k, device), "w8a8", 128, backend="scaled_mm")
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(8)).to(device, torch.bfloat16)
    assert_close(layer(x), reference(layer, x))


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("choice", ["scaled_mm", "dequantize"])
def test_compiles_without_graph_breaks(device: torch.device, block: Block, choice: str) -> None:
    layer = fp8_twin(plain(256, 384, device), "w8a8", block, backend=choice)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(9)).to(device, torch.bfloat16)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(compiled, layer(x))


def test_one_seam_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer multiplies only through `scaled_product`, and only where `choose` says so."""
    calls: list[str] = []
    original = linear.scaled_product

    def counting(product: str, *args: object) -> Tensor:
        calls.append(product)
        return original(product, *args)

    monkeypatch.setattr(linear, "scaled_product", counting)
    for choice in ("scaled_mm", "dequantize", "auto"):
        fp8_twin(plain(32, 32, torch.device("cpu")), "w8a8", backend=choice)(torch.ones(1, 32, dtype=torch.bfloat16))
    assert calls == ["rows"]


def test_a_torch_that_cannot_run_the_product_on_the_cpu_dequantises(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11, whose scaled matmul knows no scales of rows there."""

    def refusing(*_: object, **__: object) -> Tensor:
        raise RuntimeError("only supports per-tensor scaling")

    monkeypatch.setattr(torch, "_scaled_mm", refusing)
    for remembers in (backend.choose, backend._missing):
        remembers.cache_clear()
    try:
        chosen = backend.choose("scaled_mm", "rows", "cpu", None, 256, 256)
    finally:
        for remembers in (backend.choose, backend._missing):
            remembers.cache_clear()
    assert chosen.product == "dequantize"
    assert chosen.reason == f"torch {torch.__version__} cannot run it there (only supports per-tensor scaling)"


OWN_FORWARD = type("Own", (nn.Linear,), {"forward": lambda self, x: x})


@pytest.mark.parametrize(
    ("module", "how", "options", "message"),
    [
        (nn.Embedding(4, 4), WeightFormat("storage"), {}, "cannot hold FP8 weights"),
        (nn.Conv2d(2, 2, 1), WeightFormat("w8a8"), {}, "cannot hold FP8 weights in mode 'w8a8'"),
        (nn.Linear(4, 4), WeightFormat("w8a8", (128, 128)), {"activation_scheme": "static"}, "go with per-tensor"),
        (nn.Linear(4, 4), WeightFormat("w8a8", channel=True), {"activation_scheme": "static"}, "not with channel"),
        (nn.Conv2d(2, 2, 1), WeightFormat("storage", (128, 128)), {}, "block128x128 scales are for linear"),
        (nn.Conv2d(2, 2, 1), WeightFormat("storage", channel=True), {}, "channel scales are for linear weights"),
        (OWN_FORWARD(4, 4), WeightFormat("w8a8"), {}, "a forward of its own"),
    ],
    ids=["embedding", "w8a8-conv", "static-block", "static-channel", "conv-block", "conv-channel", "own-forward"],
)
def test_what_cannot_be_fp8_is_refused(
    module: nn.Module, how: WeightFormat, options: dict[str, str], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        install(module, how, name="block.layer", **options)
