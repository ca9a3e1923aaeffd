"""DiTs on two ranks: context parallelism, tensor parallelism and spread weights give what one process gives."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from own_manifests import with_scales_of_rows
from pipelines import copied, saved
from ranks import Ranks
from runs import converted
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters

from fp8_convert.converter import convert
from fp8_convert.loader import LoadError, load_component, load_pipeline, report
from fp8_convert.loader.context_parallel import check_heads
from fp8_convert.loader.fully_sharded import _integers_can_be_spread, _share

MASK = "encoder_hidden_states_mask"


@pytest.fixture(scope="module", name="ranks", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def _ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


def device() -> str:
    """Of this rank."""
    on_cpu = torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo"
    return "cpu" if on_cpu or not torch.cuda.is_available() else f"cuda:{torch.cuda.current_device()}"


def inputs(name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Random ones for a DiT of `pipelines`; token counts that two ranks can share."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device(), dtype)

    text = random(1, 8, 128)
    if name == "qwen_image":
        timestep, shapes = torch.tensor([0.5], device=device(), dtype=dtype), [[(1, 4, 4)]]
        tokens = {"hidden_states": random(1, 16, 64), "encoder_hidden_states": text}
        return {**tokens, "timestep": timestep, "img_shapes": shapes, "return_dict": False}
    if name == "flux":
        ids = {"img_ids": random(16, 3), "txt_ids": random(8, 3), "pooled_projections": random(1, 128)}
        tokens = {"hidden_states": random(1, 16, 64), "encoder_hidden_states": text}
        return {**tokens, **ids, "timestep": torch.tensor([0.5], device=device(), dtype=dtype), "return_dict": False}
    timestep = torch.tensor([500], device=device())
    latents = {"hidden_states": random(1, 16, 2, 8, 8), "encoder_hidden_states": text}
    return {**latents, "timestep": timestep, "return_dict": False}


@torch.no_grad()
def run(dit: Any, name: str, **more: Any) -> Tensor:
    return dit(**inputs(name), **more)[0].float().cpu()


def difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# Context parallelism


def by_context(folder: Path, name: str, degrees: dict[str, int]) -> dict[str, float]:
    from diffusers import ContextParallelConfig

    alone = load_component(folder, "transformer", device=device())
    # A ring needs attention's sums, which not every backend tells; what is set holds for later models too.
    alone.set_attention_backend("_native_flash" if "ring_degree" in degrees else "native")
    wanted = run(alone, name)
    dit = load_component(folder, "transformer", device=device(), parallel_config=ContextParallelConfig(**degrees))
    found = {"eager": difference(run(dit, name), wanted)}
    dit.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    found["compiled"] = difference(run(dit, name), wanted)
    return found


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("qwen_image", {"ulysses_degree": 2}),
        ("qwen_image", {"ring_degree": 2}),
        ("wan22", {"ulysses_degree": 2}),
        ("wan22", {"ring_degree": 2}),
        ("flux", {"ulysses_degree": 2}),
    ],
)
def test_context_parallelism(ranks: Ranks, name: str, degrees: dict[str, int]) -> None:
    for found in ranks.run(by_context, converted(name), name, degrees):
        assert found["eager"] < 4e-3, found
        assert found["compiled"] < 4e-3, found


def with_masks(folder: Path) -> tuple[float, str]:
    """The difference that a mask of ones makes, by position too, and what is said of one that leaves a token out."""
    from diffusers import ContextParallelConfig

    dit = load_component(
        folder, "transformer", device=device(), parallel_config=ContextParallelConfig(ulysses_degree=2)
    )
    mask = torch.ones(1, 8, dtype=torch.bool, device=device())
    seen: list[Any] = []
    first_block = dit.transformer_blocks[0]
    first_block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs[MASK]), with_kwargs=True)
    wanted = run(dit, "qwen_image")
    given = run(dit, "qwen_image", **{MASK: mask})
    tokens = inputs("qwen_image")
    first = [tokens.pop(name) for name in ("hidden_states", "encoder_hidden_states")]
    with torch.no_grad():
        placed = dit(*first, mask.long(), **tokens)[0].float().cpu()
    assert seen == [None] * 3
    mask[0, -1] = False
    with pytest.raises(ValueError, match="leaves tokens out") as refused:
        run(dit, "qwen_image", **{MASK: mask})
    return difference(given, wanted) + difference(placed, wanted), str(refused.value)


def test_a_mask_of_ones_is_dropped_and_another_refused(ranks: Ranks) -> None:
    for found, said in ranks.run(with_masks, converted("qwen_image")):
        assert found == 0
        assert "run prompts of one length, or one at a time" in said


# Spread weights


def spread(folder: Path, name: str, options: dict[str, Any], context: bool) -> dict[str, Any]:
    """A DiT of a pipeline that is loaded with spread weights, beside one that is whole."""
    from diffusers import ContextParallelConfig

    whole = load_component(folder, "transformer", device=device(), **options)
    config = {"parallel_config": ContextParallelConfig(ulysses_degree=2)} if context else {}
    pipe = load_pipeline(folder, device=device(), fully_shard=True, **config, **options)
    dit = pipe.transformer
    wanted = run(whole, name)
    found = {"eager": difference(run(dit, name), wanted), "again": difference(run(dit, name), wanted)}
    torch._dynamo.reset()
    counters.clear()
    dit.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    found["compiled"] = difference(run(dit, name), wanted)
    found["graphs"] = counters["stats"]["unique_graphs"]
    sizes = [(p.to_local().numel(), p.numel()) for p in dit.parameters()]
    held = [*(p.to_local() for p in dit.parameters()), *dit.buffers()]
    bytes_of = {c.name: c.bytes_at_rest for c in report(pipe).components}
    assert bytes_of["transformer"] == sum(t.numel() * t.element_size() for t in held)
    assert "parameters are spread over 2 ranks, and this is what one of them holds" in str(report(pipe))
    with pytest.raises(NotImplementedError, match="copy the snapshot instead"):
        dit.save_pretrained("nowhere")
    for offload in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload, dit.enable_group_offload):
        with pytest.raises(ValueError, match="leave offloading out"):
            offload()
    return {
        **found,
        "held": sum(here for here, _ in sizes) / sum(all_of for _, all_of in sizes),
        "ok": report(pipe).ok,
    }


@pytest.mark.parametrize(
    ("name", "options", "context"),
    [("qwen_image", {}, True), ("wan22", {}, True), ("qwen_image", {"backend": "scaled_mm"}, False)],
)
def test_spread_weights(ranks: Ranks, name: str, options: dict[str, Any], context: bool) -> None:
    for found in ranks.run(spread, converted(name), name, options, context):
        most = 4e-3 if context else 0
        assert max(found[how] for how in ("eager", "again", "compiled")) <= most, found
        assert found["held"] == pytest.approx(0.5, abs=0.01), found
        assert 0 < found["graphs"] <= 2, found
        assert found["ok"]


def adapted(folder: Path, ways: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A DiT's output without and with a LoRA."""
    from diffusers import ContextParallelConfig

    if "parallel_config" in ways:
        ways = {**ways, "parallel_config": ContextParallelConfig(**ways["parallel_config"])}
    pipe = load_pipeline(folder, device=device(), **ways)
    before = run(pipe.transformer, "qwen_image")
    generator = torch.Generator().manual_seed(3)
    layer = "transformer.transformer_blocks.0.attn.to_v"
    shapes = {f"{layer}.lora_A.weight": (4, 256), f"{layer}.lora_B.weight": (256, 4)}
    pipe.load_lora_weights({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    return before, run(pipe.transformer, "qwen_image")


@pytest.mark.parametrize(
    "ways", [{"parallel_config": {"ulysses_degree": 2}}, {"fully_shard": True}], ids=lambda w: next(iter(w))
)
def test_loras_on_two_ranks(ranks: Ranks, ways: dict[str, Any]) -> None:
    before, wanted = ranks.run(adapted, converted("qwen_image"), {})[0]
    assert difference(wanted, before) > 0.02
    for _, found in ranks.run(adapted, converted("qwen_image"), ways):
        assert difference(found, wanted) < 4e-3


# Tensor parallelism


def sliced(folder: Path, name: str, options: dict[str, Any]) -> dict[str, Any]:
    from diffusers import TensorParallelConfig

    whole = load_component(folder, "transformer", device=device(), **options)
    wanted = run(whole, name)
    dit = load_component(
        folder, "transformer", device=device(), parallel_config=TensorParallelConfig(tp_degree=2), **options
    )
    found = {"eager": difference(run(dit, name), wanted)}
    dit.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    found["compiled"] = difference(run(dit, name), wanted)
    with pytest.raises(NotImplementedError, match="sharded with tensor parallelism"):
        dit.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="tensor parallelism"):
        dit.load_lora_adapter({})
    assert "linears are cut among 2 ranks, and this is what one of them holds" in str(report(dit))
    held, all_of = (report(model).components[0].bytes_at_rest for model in (dit, whole))
    return {**found, "held": held / all_of, "ok": report(dit).ok}


@pytest.mark.parametrize(
    ("name", "backend", "scales"),
    [("qwen_image", "auto", "tensor"), ("qwen_image", "scaled_mm", "block"), ("flux", "scaled_mm", "tensor")],
)
def test_tensor_parallelism(ranks: Ranks, name: str, backend: str, scales: str) -> None:
    options = {} if scales == "tensor" else {"weight_block_size": (128, 128)}
    for found in ranks.run(sliced, converted(name, **options), name, {"backend": backend}):
        assert found["eager"] < 8e-3, found
        assert found["compiled"] < 8e-3, found
        assert found["held"] < 0.8, found
        assert found["ok"]


def state(source: Path, how: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """What this rank holds of the DiT, and the bytes that it read for all."""
    from diffusers import TensorParallelConfig

    ways: dict[str, dict[str, Any]] = {
        "whole": {},
        "spread": {"fully_shard": True},
        "sliced": {"parallel_config": TensorParallelConfig(tp_degree=2)},
    }
    before = bytes_read()
    dit = load_component(source, "transformer", device=device(), **ways[how], **options)
    read = bytes_read() - before
    held = {name: getattr(t, "to_local", lambda t=t: t)().cpu() for name, t in dit.state_dict().items()}
    return {**held, "read": torch.tensor(read)}


def bytes_read() -> int:
    """By this process so far, from files and from what else it reads."""
    return int(Path("/proc/self/io").read_text().split()[1])


@functools.cache
def uneven() -> Path:
    """Qwen-Image whose blocks of 128 rows and columns differ in size, and so in their scales."""
    folder = runs.root() / "uneven"
    copied(saved("qwen_image"), folder)
    for file in folder.glob("transformer/*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                rows, columns = (2.0 ** (torch.arange(size) // 128) for size in tensor.shape)
                tensors[name] = (tensor.float() * rows[:, None] * columns / 8).to(tensor.dtype).contiguous()
        save_file(tensors, file, {"format": "pt"})
    return folder


@functools.cache
def uneven_fp8(scales: str) -> Path:
    folder = runs.root() / f"uneven-{scales}"
    convert(uneven(), folder, **SCALES[scales])
    return folder


SCALES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"manifest": with_scales_of_rows("qwen-image")},
    "block": {"weight_block_size": (128, 128)},
    "compact": {"compact": True},
}


@pytest.mark.parametrize(
    ("scales", "original"), [*((scales, False) for scales in SCALES), ("tensor", True), ("block", True)]
)
@pytest.mark.parametrize("how", ["spread", "sliced"])
def test_ranks_hold_the_parts_of_the_whole(ranks: Ranks, how: str, scales: str, original: bool) -> None:
    source, options = uneven_fp8(scales), {}
    if original:
        given = SCALES[scales]
        config = {"quantization_config": {"method": "fp8", "weight_block_size": [128, 128]}}
        source, options = uneven(), config if scales == "block" else {"quantization": "fp8", **given}
    wanted = ranks.run(state, uneven_fp8(scales), "whole", {})[0]
    different = [name for name, scale in wanted.items() if "weight_scale" in name and scale.unique().numel() > 1]
    assert len(different) > 10 or scales in ("tensor", "compact")
    one, other = ranks.run(state, source, how, options)
    assert one.keys() == other.keys() == wanted.keys()
    cut = 0
    for name, whole in wanted.items():
        if name == "read":
            continue
        parts = one[name], other[name]
        if parts[0].shape == whole.shape:
            rowwise_bias = name.endswith(("to_out.0.bias", "to_add_out.bias", "net.2.bias"))  # added by one alone
            assert torch.equal(parts[0], whole), name
            assert torch.equal(parts[1], torch.zeros_like(whole) if how == "sliced" and rowwise_bias else whole), name
            continue
        cut += 1
        dim = next(d for d, (part, size) in enumerate(zip(parts[0].shape, whole.shape, strict=True)) if part != size)
        assert torch.equal(torch.cat(parts, dim), whole), name
    assert cut > 20
    if (
        not original and ranks.device_type == "cpu"
    ):  # rows alone are read, and where columns are divided all; headers, configs and the record besides
        most = {"spread": 0.6, "sliced": 0.9}[how]
        assert all(int(held["read"]) < most * int(wanted["read"]) for held in (one, other))


def painted(folder: Path, name: str, ways: dict[str, Any]) -> Tensor:
    from diffusers import ContextParallelConfig, TensorParallelConfig

    if degrees := ways.get("parallel_config"):
        config = TensorParallelConfig if "tp_degree" in degrees else ContextParallelConfig
        ways = {**ways, "parallel_config": config(**degrees)}
    return runs.run(runs.quiet(load_pipeline(folder, device=device(), **ways)), name)


@pytest.mark.parametrize(
    ("name", "degrees", "options"),
    [
        ("qwen_image", {"ulysses_degree": 2, "ulysses_anything": True}, {}),
        ("wan22", {"ulysses_degree": 2}, {"backend": "scaled_mm", "high_precision_steps": (1, 0)}),
        ("qwen_image", {"tp_degree": 2}, {"backend": "scaled_mm", "high_precision_steps": (1, 0)}),
        ("z_image", {}, {}),
    ],
    ids=["qwen_image", "wan22", "qwen_image-sliced", "z_image"],
)
def test_pipelines_on_two_ranks(ranks: Ranks, name: str, degrees: dict[str, Any], options: dict[str, Any]) -> None:
    """Prompts of any length for Qwen-Image, whose text is divided too; weights spread in the same breath."""
    wanted = ranks.run(painted, converted(name), name, options)[0]
    ways = {"parallel_config": degrees or None, "fully_shard": "tp_degree" not in degrees, **options}
    one, other = ranks.run(painted, converted(name), name, ways)
    assert torch.equal(one, other)
    assert runs.psnr(one, wanted) > 40


def from_disk(folder: Path, how: str) -> int:
    """Bytes that the disk gave this rank while it loaded a DiT."""

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])

    before = so_far()
    state(folder, how, {})
    return so_far() - before


@pytest.mark.parametrize("how", ["whole", "spread", "sliced"])
def test_the_disk_gives_each_byte_once(ranks: Ranks, how: str) -> None:
    folder = converted("flux")
    files = [*folder.glob("transformer/*.safetensors")]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    given = sum(ranks.run(from_disk, folder, how))
    if not given:
        pytest.skip("this file system does not tell")
    size = sum(file.stat().st_size for file in files)
    assert 0.9 * size < given < 1.1 * size


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_those_of_fsdp(count: int) -> None:
    for rows in range(1, 12):
        chunks = torch.arange(rows).chunk(count)
        wanted = [[*chunk.tolist()] for chunk in chunks] + [[]] * (count - len(chunks))
        assert [[*range(*_share(rows, rank, count))] for rank in range(count)] == wanted


def test_fsdp_of_torch_2_11_takes_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module calls `nn.Parameter(tensor)`, which is trained; later versions of it say whether."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    codes = torch.zeros(2, 3, dtype=torch.int8)
    with _integers_can_be_spread():
        held = _fsdp_param.nn.Parameter(codes)
    assert not held.requires_grad
    assert torch.equal(held, codes)
    assert _fsdp_param.nn is torch.nn
    with pytest.raises(RuntimeError, match="require gradients"):
        _fsdp_param.nn.Parameter(codes)


def benchmarked(folder: Path) -> list[dict[str, Any]]:
    """The rows of benchmarks/parallel.py for a small model."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import timing

    timing.DEVICE = torch.device(device())
    import parallel

    rows: list[dict[str, Any]] = []

    class Rows(parallel.Silence):
        def add(self, **row: Any) -> None:
            rows.append(row)

    config = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 128, "joint_attention_dim": 128}
    parallel.CASES["tiny"] = parallel.Case(
        "QwenImageTransformer2DModel", config, lambda: inputs("qwen_image") | {"return_dict": True}
    )
    parallel.RUNS, parallel.TIMED_S, parallel.MODES = 1, 0, ("eager",)
    bench = parallel.Bench(Rows(), "tiny", folder)
    del bench.inputs["return_dict"]
    with torch.no_grad():
        bench.write()
        for way in parallel.WAYS:
            for what in ("bf16", "ours"):
                if (what, way) != ("bf16", "tensor"):  # diffusers has that for accelerators alone
                    bench.run(what, way)
    return rows


def test_the_benchmark_measures_every_way(ranks: Ranks, tmp_path: Path) -> None:
    rows = ranks.run(benchmarked, tmp_path)[0]
    assert len({(row["what"], row["way"], row["mode"]) for row in rows}) == len(rows) == 11
    for row in rows:
        assert row["to_one"] < 5e-3, row
        assert row["to_bf16"] < 0.1, row
        assert row["ms"] > 0


# What cannot be


def config_of(name: str) -> Any:
    from diffusers import ContextParallelConfig, ParallelConfig, TensorParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    kind = torch.device(device()).type
    if name == "nothing":
        return ParallelConfig()
    if name == "flat":
        return ContextParallelConfig(ulysses_degree=2, mesh=init_device_mesh(kind, (2,)))
    if name == "square":
        return TensorParallelConfig(mesh=init_device_mesh(kind, (2, 1)))
    if name == "one":
        return init_device_mesh(kind, (1,))
    what, _, degree = name.partition(" ")
    if what == "tensor":
        return TensorParallelConfig(tp_degree=int(degree))
    return ContextParallelConfig(**{f"{what}_degree": int(degree)}) if degree else name


def refused(folder: Path, component: str | None, options: dict[str, Any], error: type[Exception]) -> str:
    options = {key: config_of(value) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(error) as raised:
        load_component(folder, component, device=device(), **options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("z_image", {"parallel_config": "tensor 2"}, LoadError, "with tensor parallelism: diffusers 0"),
        ("z_image", {"parallel_config": "ulysses 2"}, LoadError, "no plan for ZImageTransformer2DModel; pass fully_"),
        ("qwen_image", {"parallel_config": "tensor 2", "fully_shard": True}, ValueError, "leave fully_shard out"),
        ("qwen_image", {"parallel_config": "ulysses"}, ValueError, "parallel_config is 'ulysses'; use diffusers'"),
        ("qwen_image", {"parallel_config": "nothing"}, ValueError, "parallel_config is ParallelConfig("),
        ("qwen_image", {"parallel_config": "tensor 1"}, ValueError, "divides among 1 ranks, and torchrun started 2"),
        ("qwen_image", {"parallel_config": "ulysses 4"}, ValueError, "divides among 4 ranks, and torchrun started 2"),
        ("qwen_image", {"parallel_config": "ring 3"}, ValueError, "let both be the same, or pass a mesh of those"),
        ("qwen_image", {"parallel_config": "flat"}, ValueError, "pass one with the dimensions ring and ulysses"),
        ("qwen_image", {"parallel_config": "square"}, ValueError, "of TensorParallelConfig has the dimensions 2"),
        ("qwen_image", {"fully_shard": "cpu"}, ValueError, "fully_shard is 'cpu'; use True, or a DeviceMesh"),
        (
            "qwen_image",
            {"fully_shard": True, "cuda_graphs": True},
            ValueError,
            "this is one of several ranks",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    ranks: Ranks, name: str, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    for sentence in ranks.run(refused, converted(name), "transformer", options, error):
        assert said in sentence


def test_a_mesh_is_for_the_ranks_that_it_has(ranks: Ranks) -> None:
    _, other = ranks.run(one_alone, converted("qwen_image"))
    assert "The mesh of fully_shard does not have rank 1, which loads a DiT too." in other


def one_alone(folder: Path) -> str:
    mesh = config_of("one")
    if torch.distributed.get_rank() == 0:
        return ""
    with pytest.raises(ValueError, match="does not have rank") as raised:
        load_component(folder, "transformer", device=device(), fully_shard=mesh)
    return str(raised.value)


@pytest.mark.parametrize(("heads", "degree", "anything", "fits"), [
    (24, 2, False, True), (24, 5, False, False), (24, 5, True, True), (2, 3, True, False), (40, 16, True, False),
])  # fmt: skip
def test_heads_that_ulysses_can_divide(heads: int, degree: int, anything: bool, fits: bool) -> None:
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=anything)
    if fits:
        check_heads(config, heads, "it")
        return
    with pytest.raises(LoadError, match=f"it has {heads} attention heads, which ulysses_degree={degree} cannot divide"):
        check_heads(config, heads, "it")


def test_heads_that_slices_cannot_divide(ranks: Ranks, tmp_path: Path) -> None:
    folder = copied(converted("qwen_image"), tmp_path / "odd")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "num_attention_heads": 3}))
    for sentence in ranks.run(refused, folder, "transformer", {"parallel_config": "tensor 2"}, LoadError):
        assert "transformer has 3 attention heads, which 2 ranks cannot share equally" in sentence


def test_blocks_are_not_cut(ranks: Ranks) -> None:
    folder = converted("qwen_image", weight_block_size=(256, 256))
    for sentence in ranks.run(refused, folder, "transformer", {"parallel_config": "tensor 2"}, LoadError):
        assert "attn.to_q.weight would be cut within its blocks of 256; use fewer ranks, or convert it with" in sentence


def test_a_text_encoder_is_not_divided(ranks: Ranks) -> None:
    for options in ({"parallel_config": "ulysses 2"}, {"fully_shard": True}):
        for sentence in ranks.run(refused, converted("qwen_image"), "text_encoder", options, LoadError):
            assert "text_encoder cannot be divided: parallel_config and fully_shard are for DiTs" in sentence


def lone(folder: Path) -> str:
    load_component(folder, device=device(), fully_shard=True)
    return report(load_component(folder, device=device(), fully_shard=True)).components[0].notes[-1]


def test_a_lone_dit_is_divided(ranks: Ranks, tmp_path: Path) -> None:
    convert(saved("z_image") / "transformer", tmp_path / "dit")
    assert set(ranks.run(lone, tmp_path / "dit")) == {
        "parameters are spread over 2 ranks, and this is what one of them holds"
    }


def given_whole(folder: Path) -> str:
    dit = load_component(folder, "transformer", device=device())
    config = config_of("ulysses 2")
    with pytest.raises(ValueError, match="save_as is for one process"):
        load_pipeline(folder, device=device(), save_as="nowhere", parallel_config=config)
    with pytest.raises(LoadError) as raised:
        load_pipeline(folder, device=device(), transformer_2=dit, parallel_config=config)
    load_pipeline(folder, device=device(), transformer_2=None, parallel_config=config)
    return str(raised.value)


def test_a_given_dit_is_not_left_whole(ranks: Ranks) -> None:
    for sentence in ranks.run(given_whole, converted("wan22")):
        assert "transformer_2 cannot be divided: parallel_config and fully_shard are for DiTs" in sentence


@pytest.mark.parametrize("scales", ["channel", "block"])
def test_a_scale_that_another_rank_has_is_checked(ranks: Ranks, scales: str, tmp_path: Path) -> None:
    folder = copied(uneven_fp8(scales), tmp_path / "damaged")
    (file,) = folder.glob("transformer/*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.startswith("transformer_blocks.0.attn.to_q.weight_scale"))
    tensors[name][-1] = float("nan")
    save_file(tensors, file, metadata)
    for sentence in ranks.run(refused, folder, "transformer", {"parallel_config": "tensor 2"}, LoadError):
        assert name in sentence


def with_gradients(folder: Path) -> str:
    dit = load_component(folder, "transformer", device=device(), parallel_config=config_of("tensor 2"))
    tokens = inputs("qwen_image")
    dit(**tokens)  # nothing is trained, so nothing is in the way
    tokens["hidden_states"].requires_grad_(True)
    with pytest.raises(RuntimeError) as raised:
        dit(**tokens)
    return str(raised.value)


def test_sliced_linears_have_no_gradients(ranks: Ranks) -> None:
    for sentence in ranks.run(with_gradients, converted("qwen_image")):
        assert "run the DiT under torch.no_grad()" in sentence


def odd(folder: Path) -> str:
    dit = load_component(folder, "transformer", device=device(), parallel_config=config_of("ulysses 2"))
    tokens = inputs("qwen_image")
    tokens["encoder_hidden_states"] = tokens["encoder_hidden_states"][:, :7]
    with pytest.raises(ValueError, match="7 tokens") as raised:
        dit(**tokens)
    return str(raised.value)


def test_tokens_that_ranks_cannot_share(ranks: Ranks) -> None:
    for sentence in ranks.run(odd, converted("qwen_image")):
        assert "encoder_hidden_states has 7 tokens, which 2 ranks cannot share equally; pass ulysses_any" in sentence


def plainly(folder: Path) -> tuple[str, str, float]:
    """Through plain diffusers: context parallelism runs, tensor parallelism is refused before and after loading."""
    from diffusers import ParallelConfig, QwenImageTransformer2DModel

    context, tensor = config_of("ulysses 2"), config_of("tensor 2")
    load = QwenImageTransformer2DModel.from_pretrained
    with pytest.raises(ValueError, match="tensor-parallel") as before:
        load(folder / "transformer", parallel_config=tensor, dtype=torch.bfloat16)
    whole = load(folder / "transformer", dtype=torch.bfloat16).to(device())
    with pytest.raises(ValueError, match="tensor parallelism") as after:
        whole.enable_parallelism(config=tensor)
    wanted = run(whole, "qwen_image")
    whole.enable_parallelism(config=context)
    dit = load(
        folder / "transformer", dtype=torch.bfloat16, parallel_config=ParallelConfig(context_parallel_config=context)
    ).to(device())
    mask = torch.ones(1, 8, dtype=torch.bool, device=device())
    found = [difference(run(each, "qwen_image", **{MASK: mask}), wanted) for each in (whole, dit)]
    return str(before.value), str(after.value), max(found)


def test_plain_diffusers(ranks: Ranks) -> None:
    for before, after, found in ranks.run(plainly, converted("qwen_image")):
        assert "cannot be combined with a tensor-parallel" in before
        assert "is quantized, which cannot be combined with tensor parallelism" in after
        assert found < 4e-3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_map_of_plain_diffusers_over_two_gpus(tmp_path: Path) -> None:
    """Of a snapshot whose text encoder is BF16: stock transformers wants another package for FP8 on a GPU."""
    from diffusers import DiffusionPipeline, QwenImageTransformer2DModel

    folder = tmp_path / "out"
    convert(saved("qwen_image"), folder, components=["transformer"])
    load, options = DiffusionPipeline.from_pretrained, {"dtype": torch.bfloat16}
    wanted = runs.run(runs.quiet(load(folder, **options).to("cuda:0")), "qwen_image")
    balanced = load(folder, device_map="balanced", **options)
    assert torch.equal(runs.run(runs.quiet(balanced), "qwen_image"), wanted)
    one = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", **options).to("cuda:0")
    places = {name: 0 for name, _ in one.named_children()} | {"transformer_blocks.0": 0, "transformer_blocks.1": 1}
    del places["transformer_blocks"]
    both = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", device_map=places, **options)
    assert {p.device.index for p in both.parameters()} == {0, 1}
    assert torch.equal(run(both, "qwen_image"), run(one, "qwen_image"))


def test_one_process_alone_is_told_how_to_start_several() -> None:
    from diffusers import ContextParallelConfig

    for options in ({"fully_shard": True}, {"parallel_config": ContextParallelConfig(ulysses_degree=2)}):
        with pytest.raises(ValueError, match="start them with `torchrun --nproc-per-node 2"):
            load_pipeline(converted("qwen_image"), device="cpu", **options)
