"""What users do with a pipeline, done to FP8 ones and to BF16 ones that hold the dequantised weights: the
same comes out.

On the CPU every FP8 layer dequantises, so outputs are compared bit for bit. `mixed` is Qwen-Image converted
with compact=True: W8A8 and storage side by side in one DiT. `rows` has a scale for each row of a linear.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_group_offloading
from own_manifests import with_scales_of_rows
from runs import assert_same_weights, bf16, dequantised, loaded, modules_of, psnr, quiet
from runs import run as run_to_pixels
from safetensors import safe_open
from torch import Tensor, nn

from fp8_convert.loader import load_pipeline, report
from fp8_convert.loader.weights import Fp8Weight

PIPELINES = {
    "z_image": ("z_image", {}),
    "mixed": ("qwen_image", {"compact": True}),
    "wan22": ("wan22", {}),
    "rows": ("z_image", {"manifest": with_scales_of_rows("z-image")}),
}
BLOCKS = {"z_image": "layers", "qwen_image": "transformer_blocks", "wan22": "blocks"}


@pytest.fixture(params=PIPELINES)
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    name, options = PIPELINES[request.param]
    return name, loaded(name, **options)


def run(pipe: Any, name: str, **options: Any) -> Tensor:
    """One generation; Wan's stops at its latents, since its VAE is plain BF16 and takes most of the time."""
    return run_to_pixels(pipe, name, **({"output_type": "latent"} if name == "wan22" else {}), **options)


def codes_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.codes.view(torch.uint8).clone() for n, m in model.named_modules() if isinstance(m, Fp8Weight)}


def assert_codes(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = codes_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], codes) for n, codes in expected.items())


def test_output_equals_bf16_with_the_dequantised_weights(case: tuple[str, Any]) -> None:
    name, pipe = case
    plain = dequantised(name, pipe)
    assert torch.equal(run(pipe, name), run(plain, name))
    assert not torch.equal(run(pipe, name), run(bf16(name), name))


def test_casting_there_and_back(case: tuple[str, Any]) -> None:
    name, pipe = case
    plain = dequantised(name, pipe)
    for part, model in modules_of(pipe).items():
        assert model.dtype == plain.components[part].dtype
        codes = codes_of(model)
        for each in (model, plain.components[part]):
            each.to(torch.float32)
            assert each.dtype == torch.float32
            each.to(torch.bfloat16)
        assert_codes(model, codes)
    pipe.to("cpu").to(torch.bfloat16)
    assert torch.equal(run(pipe, name), run(plain, name))


def test_copies(case: tuple[str, Any]) -> None:
    name, pipe = case
    picture = run(pipe, name)
    pipe.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(run(pipe, name), picture)
    pipe.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(run(pipe, name), picture)
    assert report(pipe).ok


def test_saving_and_loading_again(case: tuple[str, Any], tmp_path: Path) -> None:
    name, pipe = case
    pipe.save_pretrained(tmp_path / "one")
    pipe.transformer.save_pretrained(tmp_path / "one/transformer", max_shard_size="300KB")
    again = quiet(load_pipeline(tmp_path / "one", device="cpu"))
    for part, model in modules_of(pipe).items():
        assert_same_weights(model, modules_of(again)[part])
    assert report(again).ok
    again.save_pretrained(tmp_path / "two")
    for part in ("transformer", "text_encoder", "vae"):
        for file in sorted((tmp_path / "two" / part).glob("*.safetensors")):
            if not (tmp_path / "one" / part / file.name).exists():
                continue  # the DiT was sharded the first time
            with safe_open(file, "pt") as second, safe_open(tmp_path / "one" / part / file.name, "pt") as first:
                assert set(second.keys()) == set(first.keys())
                assert second.metadata() == first.metadata()
                for key in second.keys():  # noqa: SIM118  (safe_open is no mapping)
                    assert torch.equal(_bits(second.get_tensor(key)), _bits(first.get_tensor(key)))
    assert torch.equal(run(again, name), run(pipe, name))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", ["sequential", "leaf", "block", "disk"])
def test_offloading(case: tuple[str, Any], kind: str, tmp_path: Path) -> None:
    name, pipe = case
    picture = run(pipe, name)
    model = pipe.transformer
    weight = next(m for m in model.modules() if isinstance(m, Fp8Weight))
    cpu = torch.device("cpu")
    if kind == "sequential":
        cpu_offload(model, cpu)
        assert weight.weight.is_meta
    else:
        leaf = {"offload_type": "leaf_level"} if kind == "leaf" else {"offload_type": "block_level"}
        blocks = {} if kind == "leaf" else {"num_blocks_per_group": 1}
        disk = {"offload_to_disk_path": str(tmp_path)} if kind == "disk" else {}
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **leaf, **blocks, **disk)
        if kind == "disk":
            assert any(tmp_path.iterdir())
    assert torch.equal(run(pipe, name), picture)
    assert torch.equal(run(pipe, name), picture)


def test_vae_tiling_and_slicing(case: tuple[str, Any]) -> None:
    name, pipe = case
    plain = dequantised(name, pipe)
    channels = 16
    shape = (2, channels, 16, 16) if name == "z_image" else (2, channels, 1, 16, 16)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    pictures = []
    for each in (pipe, plain):
        each.vae.enable_tiling()
        each.vae.enable_slicing()
        for size in ("tile_sample_min_size", "tile_sample_min_height", "tile_sample_min_width"):
            if hasattr(each.vae, size):
                setattr(each.vae, size, 32)
        with torch.no_grad():
            pictures.append(each.vae.decode(latents).sample)
    assert torch.equal(*pictures)


# LoRA


def lora(model: nn.Module, name: str, seed: int, rank: int = 4) -> dict[str, Tensor]:
    """Random adapter weights for the attention of the first block, large enough to show."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, module in model.named_modules():
        if path.startswith(f"{BLOCKS[name]}.0.") and path.endswith(("to_q", "to_out.0")):
            sizes = module.in_features, module.out_features
            state[f"transformer.{path}.lora_A.weight"] = torch.randn(rank, sizes[0], generator=generator) * 0.1
            state[f"transformer.{path}.lora_B.weight"] = torch.randn(sizes[1], rank, generator=generator) * 0.1
    return {key: value.bfloat16() for key, value in state.items()}


def test_lora_beside_fp8_weights(case: tuple[str, Any]) -> None:
    name, pipe = case
    plain = dequantised(name, pipe)
    before = run(pipe, name)
    codes = codes_of(pipe.transformer)
    for each in (pipe, plain):
        each.load_lora_weights(lora(plain.transformer, name, 1), adapter_name="one")
    with_lora = run(pipe, name)
    assert torch.equal(with_lora, run(plain, name))
    assert not torch.equal(with_lora, before)
    for each in (pipe, plain):
        each.load_lora_weights(lora(bf16(name).transformer, name, 2), adapter_name="one", hotswap=True)
    swapped = run(pipe, name)
    assert torch.equal(swapped, run(plain, name))
    assert not torch.equal(swapped, with_lora)
    assert report(pipe).ok
    for each in (pipe, plain):
        each.set_adapters(["one"], [0.5])
    assert torch.equal(run(pipe, name), run(plain, name))
    with pytest.raises(RuntimeError, match="Leave the adapter beside them"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe, name), before)
    assert_codes(pipe.transformer, codes | {})


# torch.compile


def compiled_graphs(pipe: Any, name: str) -> tuple[int, Tensor]:
    """How many graphs a run compiles with repeated blocks compiled, and the picture."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    picture = run(pipe, name)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], picture


def test_compiled_blocks_make_no_more_graphs(case: tuple[str, Any]) -> None:
    name, pipe = case
    graphs, picture = compiled_graphs(pipe, name)
    expected, theirs = compiled_graphs(dequantised(name, pipe), name)
    assert graphs == expected
    assert graphs > 0
    assert torch.equal(picture, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own, as in BF16
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
def test_inductor_compiles_blocks() -> None:
    pipe = loaded("qwen_image", compact=True)
    picture = run(pipe, "qwen_image")
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    assert psnr(run(pipe, "qwen_image"), picture) > 35


# Caches


def block_calls(pipe: Any, name: str, steps: int) -> int:
    """How often the query projection of any of the DiT's blocks runs in one generation."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hooks = [m.register_forward_hook(count) for d in dits(pipe) for n, m in d.named_modules() if n.endswith(".to_q")]
    run(pipe, name, steps=steps)
    for hook in hooks:
        hook.remove()
    return calls


def dits(pipe: Any) -> list[Any]:
    return [pipe.transformer, *([pipe.transformer_2] if hasattr(pipe, "transformer_2") else [])]


CACHES = {
    "first-block": lambda: FirstBlockCacheConfig(threshold=10.0),
    "taylorseer": lambda: TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        max_order=1,
        cache_identifiers=[r"^(transformer_)?blocks\.\d+\.attn1?$"],  # its default misses Wan's attn1
    ),
    "magcache": lambda: MagCacheConfig(
        threshold=10.0, max_skip_steps=2, retention_ratio=0.0, num_inference_steps=6, mag_ratios=torch.ones(6)
    ),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", ["qwen_image", "wan22"])
def test_caches_skip_the_same_calls(name: str, kind: str) -> None:
    pipe = loaded(name)
    plain = dequantised(name, pipe)
    everything = block_calls(pipe, name, 6)
    counts = []
    for each in (pipe, plain):
        for dit in dits(each):
            dit.enable_cache(CACHES[kind]())
        counts.append(block_calls(each, name, 6))
    assert counts[0] == counts[1]
    assert counts[0] < everything


def test_cache_dit_skips_the_same_calls() -> None:
    cache_dit = pytest.importorskip("cache_dit")
    pipe = loaded("qwen_image")
    plain = dequantised("qwen_image", pipe)
    everything = block_calls(pipe, "qwen_image", 6)
    counts = []
    for each in (pipe, plain):
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=0.9
        )
        cache_dit.enable_cache(each, cache_config=config)
        counts.append(block_calls(each, "qwen_image", 6))
    assert counts[0] == counts[1]
    assert counts[0] < everything
