"""W8A8 and FP8 storage against BF16 on one CUDA device: linears, whole blocks, a text encoder, a VAE.

    python benchmarks/blocks.py [linears] [blocks] [storage] [--json FILE]

Random weights, the published sizes, milliseconds (medians). "Realised saving" is the share of the time that
FP8 matrix products save over BF16 ones which arrives in the whole: (T_bf16 - T_fp8) / (GEMMs_bf16 -
GEMMs_fp8).
"""

import argparse
import gc
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from qwen_inputs import qwen_inputs
from torch import Tensor, nn
from triton.testing import do_bench

from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.loader import kernels
from fp8_convert.loader.install import install

DEVICE = torch.device("cuda", 0)
SHAPES = {
    "Qwen attn": (4352, 3072, 3072),
    "Qwen MLP up": (4352, 3072, 12288),
    "Qwen MLP down": (4352, 12288, 3072),
    "Qwen text": (256, 3072, 12288),
    "Z-Image": (4352, 3840, 10240),
    "Wan attn": (32760, 5120, 5120),
    "Wan MLP up": (32760, 5120, 13824),
    "Wan MLP down": (32760, 13824, 5120),
}
NOT_W8A8 = re.compile(r"img_mlp|_mod\.")  # inside the blocks: what the Qwen-Image manifest keeps


def median(run: Callable[[], Any], budget_ms: int = 300) -> float:
    return float(do_bench(run, warmup=50, rep=budget_ms, return_mode="median"))


def fill(layer: nn.Module, weight: Tensor) -> None:
    """Gives an FP8 layer the codes and scale of `weight` (the contract's formula)."""
    wide = weight.float()
    if layer.block is None:
        scale = wide.abs().max() / 448
        full: Tensor = scale
    else:
        tall, broad = (-(-size // edge) for size, edge in zip(weight.shape, layer.block, strict=True))
        n, k = layer.block
        padded = nn.functional.pad(wide, (0, broad * k - weight.shape[1], 0, tall * n - weight.shape[0]))
        scale = padded.view(tall, n, broad, k).abs().amax((1, 3)).clamp(min=1e-4) / 448
        full = kernels.expand_scale(scale, layer.block, weight.shape)
    layer.scale.copy_(scale)
    layer.codes.copy_((wide * (1 / full)).clamp(-448, 448))


def make_fp8(model: nn.Module, wanted: Callable[[str, nn.Module], bool], mode: str, block: int | None = None) -> int:
    """Turns the wanted layers of `model` into FP8 ones; returns how many."""
    count = 0
    for name, module in list(model.named_modules()):
        if wanted(name, module):
            weight = module.weight.data
            linear = block and isinstance(module, nn.Linear)
            install(module, WeightFormat(mode, (block, block) if linear else None), device=DEVICE)
            fill(module, weight)
            count += 1
    return count


def linear_times(m: int, k: int, n: int) -> dict[str, float]:
    """Milliseconds of one linear with m tokens, BF16 and W8A8, and of the pieces of the latter."""
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    plain = nn.Linear(k, n, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    weight = plain.weight.data
    times = {"bf16": median(lambda: plain(x))}
    rows = install(nn.Linear(k, n, device=DEVICE, dtype=torch.bfloat16), WeightFormat("w8a8"), device=DEVICE)
    fill(rows, weight)
    times["w8a8"] = median(lambda: rows(x))
    static = install(
        nn.Linear(k, n, device=DEVICE, dtype=torch.bfloat16),
        WeightFormat("w8a8"),
        device=DEVICE,
        activation_scheme="static",
    )
    fill(static, weight)
    static.get_buffer("input_scale").copy_(x.abs().max().float() / 448)
    times["w8a8 static"] = median(lambda: static(x))
    groups = install(
        nn.Linear(k, n, device=DEVICE, dtype=torch.bfloat16), WeightFormat("w8a8", (128, 128)), device=DEVICE
    )
    fill(groups, weight)
    times["w8a8 block"] = median(lambda: groups(x))
    stored = install(
        nn.Linear(k, n, device=DEVICE, dtype=torch.bfloat16), WeightFormat("storage", (128, 128)), device=DEVICE
    )
    fill(stored, weight)
    times["storage"] = median(lambda: stored(x))
    codes, scale = kernels.quantize_rows(x, rows.scale)
    ones, one = torch.ones(1, n, device=DEVICE), torch.ones((), device=DEVICE)
    other = rows.codes.t()
    times["quantise"] = median(lambda: kernels.quantize_rows(x, rows.scale))
    times["quantise groups"] = median(lambda: kernels.quantize_groups(x))
    for fast in (True, False):
        name = "gemm rows" + ("" if fast else " precise")
        times[name] = median(
            lambda fast=fast: torch._scaled_mm(codes, other, scale, ones, out_dtype=torch.bfloat16, use_fast_accum=fast)
        )
    times["gemm tensor"] = median(
        lambda: torch._scaled_mm(codes, other, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    )
    return times


def ceiling(m: int, k: int, times: dict[str, float]) -> float:
    """BF16 time over the best that is possible: the fastest FP8 product and one pass over x at 3 TB/s."""
    return times["bf16"] / (min(times["gemm rows"], times["gemm tensor"]) + 3 * m * k / 3e9)


def bench_linears() -> dict[str, Any]:
    results = {}
    for name, (m, k, n) in SHAPES.items():
        times = linear_times(m, k, n)
        best = ceiling(m, k, times)
        results[name] = {**times, "speedup": times["bf16"] / times["w8a8"], "ceiling": best}
        shown = "  ".join(f"{key} {value:.3f}" for key, value in times.items())
        print(f"{name:14} {m}x{k}x{n}: x{times['bf16'] / times['w8a8']:.2f} of {best:.2f}  {shown}", flush=True)
    return results


def qwen_blocks() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import QwenImageTransformer2DModel

    with torch.device(DEVICE):
        model = QwenImageTransformer2DModel(num_layers=4).to(torch.bfloat16)
        inputs = qwen_inputs()
    return model, inputs


def wan_block() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    with torch.device(DEVICE):
        model = WanTransformer3DModel(num_layers=1, num_attention_heads=40, ffn_dim=13824)
        keep = model._keep_in_fp32_modules
        for name, parameter in model.named_parameters():
            if not any(part in keep for part in name.split(".")):
                parameter.data = parameter.data.to(torch.bfloat16)
        inputs = {
            "hidden_states": torch.randn(1, 16, 21, 60, 104, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=torch.bfloat16),
            "timestep": torch.tensor([500]),
        }
    return model, inputs


def is_w8a8(name: str, module: nn.Module) -> bool:
    inside = "blocks." in name
    return inside and isinstance(module, nn.Linear) and not NOT_W8A8.search(name)


def products(model: nn.Module, inputs: dict[str, Any]) -> Counter[tuple[int, int, int]]:
    """How often each (tokens, K, N) product of a W8A8 layer runs in one forward."""
    seen: Counter[tuple[int, int, int]] = Counter()

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[args[0].numel() // args[0].shape[-1], module.in_features, module.out_features] += 1

    hooks = [m.register_forward_pre_hook(note) for n, m in model.named_modules() if is_w8a8(n, m)]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def bench_model(name: str, make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> dict[str, float]:
    gc.collect()
    torch.cuda.empty_cache()
    times = {}

    def time(key: str, model: nn.Module, inputs: dict[str, Any]) -> None:
        times[key] = median(lambda: model(**inputs), 1000)

    torch.manual_seed(0)
    model, inputs = make()
    model.eval().requires_grad_(False)
    expected = model(**inputs).sample
    counted = products(model, inputs)
    time("bf16 eager", model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks()
    time("bf16 compiled", model, inputs)
    uncompile(model)
    make_fp8(model, is_w8a8, "w8a8")
    difference = (model(**inputs).sample - expected).float().norm() / expected.float().norm()
    time("w8a8 eager", model, inputs)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    time("w8a8 compiled", model, inputs)
    del model
    model, inputs = make()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    time("layerwise casting eager", model, inputs)
    saving = 0.0
    for (m, k, n), count in counted.items():
        part = linear_times(m, k, n)
        saving += count * (part["bf16"] - min(part["gemm rows"], part["gemm tensor"]))
    result = {
        **times,
        "relative difference": float(difference),
        "gemm saving": saving,
        "realised eager": (times["bf16 eager"] - times["w8a8 eager"]) / saving,
        "realised compiled": (times["bf16 compiled"] - times["w8a8 compiled"]) / saving,
    }
    print(name, "  ".join(f"{key} {value:.3f}" for key, value in result.items()), flush=True)
    return result


def bench_blocks() -> dict[str, Any]:
    models = {"Qwen-Image, 4 blocks": qwen_blocks, "Wan2.2, 1 block": wan_block}
    return {name: bench_model(name, make) for name, make in models.items()}


def uncompile(model: nn.Module) -> None:
    """Undoes `compile_repeated_blocks`."""
    for module in model.modules():
        module._compiled_call_impl = None


def bench_storage() -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    results: dict[str, Any] = {}
    config = Qwen2_5_VLTextConfig(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=4, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    with torch.device(DEVICE):
        encoder = Qwen2_5_VLTextModel(config).to(torch.bfloat16).eval().requires_grad_(False)
        ids = {tokens: torch.randint(0, 1024, (1, tokens)) for tokens in (64, 512, 2048)}
        vae = AutoencoderKLQwenImage().to(torch.bfloat16).eval().requires_grad_(False)
        latents = torch.randn(1, 16, 1, 64, 64, dtype=torch.bfloat16)
    for kind in ("bf16", "storage"):
        if kind == "storage":
            make_fp8(encoder, lambda _, m: isinstance(m, nn.Linear), "storage", 128)
            make_fp8(vae, lambda _, m: isinstance(m, (nn.Conv2d, nn.Conv3d)), "storage")
        for tokens, tensor in ids.items():
            results[f"text encoder {tokens} {kind}"] = median(lambda tensor=tensor: encoder(tensor))
        results[f"vae decode {kind}"] = median(lambda: vae.decode(latents), 1000)
    for name, value in results.items():
        print(f"{name:30} {value:.3f}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", choices=["linears", "blocks", "storage", []])
    parser.add_argument("--json", help="write all numbers there")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(DEVICE), "torch", torch.__version__)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(DEVICE), "torch": torch.__version__}
    with torch.no_grad():
        for what in arguments.what or ["linears", "blocks", "storage"]:
            results[what] = globals()[f"bench_{what}"]()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
