"""Few tokens times an E4M3 weight: float64 references, inputs of every kind, and the operator as torch checks one."""

import re

import pytest
import torch
from layers import BLOCKS, Block, dequantized_twin, fp8_twin
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from fp8_convert.loader import few_tokens
from fp8_convert.loader.weights import Fp8Weight

TOKENS = [1, 2, 7, 16, 17, 33, 64, 100, 128, 256]
# N and K: multiples of nothing, a long sum, an edge in both block directions.
SIZES = [(256, 512), (1000, 1250), (48, 4096), (130, 257), (8, 16)]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}


def layer_of(n: int, k: int, block: Block, device: torch.device, dtype: torch.dtype, bias: bool = True) -> Fp8Weight:
    torch.manual_seed(n + k)
    plain = nn.Linear(k, n, bias=bias).to(device, dtype).requires_grad_(False)
    return fp8_twin(plain, "storage", block)


def multiply(layer: Fp8Weight, x: Tensor) -> Tensor:
    return few_tokens.multiply(x, layer.codes, layer.scale, layer.bias_in(x.dtype), layer.block)


def reference(layer: Fp8Weight, x: Tensor) -> Tensor:
    rows, columns = layer.codes.shape
    weight = dequantized_twin(nn.Linear(columns, rows, dtype=x.dtype).requires_grad_(False), layer).weight
    out = x.double() @ weight.double().t()
    return out if layer.bias is None else out + layer.bias.double()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_float64(device: torch.device, dtype: torch.dtype, block: Block, size: tuple[int, int]) -> None:
    for bias in (True, False):
        layer = layer_of(*size, block, device, dtype, bias)
        for tokens in TOKENS:
            x = torch.randn(tokens, size[1], device=device, dtype=dtype)
            x[0, :3] *= 500  # an outlier
            out, expected = multiply(layer, x), reference(layer, x)
            assert out.shape == expected.shape
            assert out.dtype == dtype
            error = (out.double() - expected).norm() / expected.norm()
            assert float(error.detach()) < TOLERANCE[dtype], (tokens, bias)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_zeros_and_nan_keep_to_their_token(device: torch.device, tokens: int) -> None:
    layer = layer_of(64, 512, None, device, torch.bfloat16)
    x = torch.randn(tokens, 512, device=device, dtype=torch.bfloat16)
    clean = multiply(layer, x)
    x[-1, 7] = float("nan")
    out = multiply(layer, x)
    assert bool(out[-1].isnan().all())
    assert torch.equal(out[:-1], clean[:-1])
    x[-1] = 0
    assert torch.equal(multiply(layer, x)[-1], layer.bias)


def test_codes_that_are_nan_show(device: torch.device) -> None:
    layer = layer_of(64, 512, None, device, torch.bfloat16, bias=False)
    layer.codes.view(torch.uint8)[3, 5] = 0x7F
    for tokens in (1, 9):
        out = multiply(layer, torch.randn(tokens, 512, device=device, dtype=torch.bfloat16))
        assert out.isnan().any(0).nonzero().flatten().tolist() == [3]


def test_strided_and_empty_activations(device: torch.device) -> None:
    layer = layer_of(64, 256, 128, device, torch.bfloat16)
    wide = torch.randn(12, 640, device=device, dtype=torch.bfloat16)
    for view in (wide[:, :256], wide[::2, 100:356], wide[:, ::2][:, :256], wide[:1, 3:259]):
        assert torch.equal(multiply(layer, view), multiply(layer, view.contiguous()))
    assert multiply(layer, wide[:0, :256]).shape == (0, 64)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_is_an_operator_that_torch_can_trace(device: torch.device, block: Block) -> None:
    layer = layer_of(64, 256, block, device, torch.bfloat16)
    x = torch.randn(4, 256, device=device, dtype=torch.bfloat16)
    assert few_tokens.can_multiply("cuda", device.index, x.dtype, layer.block)
    arguments = (x, layer.codes, layer.scale, layer.bias, [*(layer.block or ())])
    checks = ("test_faketensor", "test_aot_dispatch_static")  # its schema check multiplies E4M3, which torch cannot
    torch.library.opcheck(torch.ops.fp8_convert.few_tokens.default, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["w8a8", "storage"])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_layers_use_it_compiled_and_not(mode: str, block: Block) -> None:
    """On a GPU a layer of either mode takes this path for one token, with the bits of the compiled one."""
    device = torch.device("cuda", 0)
    plain = nn.Linear(512, 256).to(device, torch.bfloat16).requires_grad_(False)
    layer = fp8_twin(plain, mode, block)
    x = torch.randn(1, 3, 512, device=device, dtype=torch.bfloat16)
    out = layer(x)
    assert torch.equal(out[0], multiply(layer, x[0]))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), out)
    many = torch.randn(1, 300, 512, device=device, dtype=torch.bfloat16)
    assert layer(many).shape == (1, 300, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(256, 4096), (3584, 3584), (9000, 1250)], ids=str)
def test_divided_sums_have_the_same_bits_wherever_they_run(size: tuple[int, int]) -> None:
    """Again, on two streams at once, in a CUDA graph that is replayed, and in a graph of compiled code."""
    device = torch.device("cuda", 0)
    layer = layer_of(*size, None, device, torch.bfloat16)
    x = torch.randn(9, size[1], device=device, dtype=torch.bfloat16)
    expected = multiply(layer, x)
    assert torch.equal(multiply(layer, x), expected)
    streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]
    torch.cuda.synchronize()
    found: list[Tensor] = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(multiply(layer, x))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = multiply(layer, x)
        second = multiply(layer, x + 0)
    for _ in range(3):
        first.zero_()
        second.zero_()
        graph.replay()
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)
    torch._dynamo.reset()
    compiled = torch.compile(multiply, fullgraph=True, dynamic=True)
    for tokens in (9, 5, 3):
        assert torch.equal(compiled(layer, x[:tokens]), expected[:tokens])


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_compiled_code_copies_nothing(block: Block, bias: bool, caplog: pytest.LogCaptureFixture) -> None:
    """torch understands what the kernel writes; otherwise it copies every weight before each call."""
    device = torch.device("cuda", 0)
    layer = layer_of(256, 512, block, device, torch.bfloat16, bias)
    torch._dynamo.reset()
    compiled = torch.compile(multiply, fullgraph=True, dynamic=False)
    for tokens in (1, 2, 40, 100):
        x = torch.randn(tokens, 512, device=device, dtype=torch.bfloat16)
        expected = multiply(layer, x)  # torch knows of the operator from here on
        out, code = run_and_get_code(compiled, layer, x)
        assert torch.equal(out, expected)
        assert "_few_tokens" in "".join(code) or "_one_token" in "".join(code)
        assert not re.findall(r"clone|copy_\(", "".join(code))
    assert "every input is mutated" not in caplog.text
