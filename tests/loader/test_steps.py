"""`high_precision_steps`: which layers dequantise in which step, seen from what they compute, through real pipelines.

On the CPU `backend="scaled_mm"` runs FP8 products. A layer counts as dequantised where its output is, bit for bit,
that of a plain linear with the dequantised weight.
"""

import copy
import inspect
import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, ZImagePipeline
from diffusers.callbacks import PipelineCallback
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import apply_group_offloading
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from runs import bf16, converted, dequantised, psnr, quiet, replaced
from runs import run as run_to_pixels
from test_families import saved as saved_dit
from torch import Tensor, nn
from torch.nn.functional import linear

from fp8_convert.loader import load_component, load_pipeline, report, set_high_precision_steps
from fp8_convert.loader.linear import W8A8LinearMixin

NAMES = ["z_image", "qwen_image", "wan22", "flux", "qwen_image_edit", "qwen_image_layered"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another take most of the time of layers as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded(name: str, steps: Any = None, backend: str = "scaled_mm") -> Any:
    return quiet(
        load_pipeline(
            converted(name), device="cpu", backend=backend, high_precision_steps=steps, **replaced(name)
        )
    )  # fmt: skip


def run(pipe: Any, name: str = "z_image", **options: Any) -> Tensor:
    """The latents of one generation, or its pixels."""
    latents = {} if name == "qwen_image_layered" else {"output_type": "latent"}  # which that pipeline cannot return
    return run_to_pixels(pipe, name, **latents, **options)


def layers_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, W8A8LinearMixin)]


def dits(pipe: Any) -> dict[str, Any]:
    return {n: pipe.components[n] for n in ("transformer", "transformer_2") if n in pipe.components}


def watched(pipe: Any) -> list[list[Any]]:
    """[DiT, its layers that dequantised] of each later call of a DiT, in order."""
    calls: list[list[Any]] = []

    def count(layer: Any, args: tuple[Tensor], out: Tensor) -> None:
        (x,) = args
        calls[-1][1] += torch.equal(out, linear(x, layer.dequantized(x.dtype), layer.bias))

    for name, dit in dits(pipe).items():
        dit.register_forward_pre_hook(lambda *_, name=name: calls.append([name, 0]))
        for layer in layers_of(dit):
            layer.register_forward_hook(count)
    return calls


# Which layers, in which steps

ONE, TWO = "transformer", "transformer_2"
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "one call a step": ("z_image", {}, [ONE] * 4),
    "guidance in a batch": ("z_image", {"guidance_scale": 4.0}, [ONE] * 4),
    "guidance in two calls": ("qwen_image", {}, [ONE] * 8),
    "two DiTs": ("wan22", {}, [ONE, ONE, ONE, ONE, TWO, TWO, TWO, TWO]),
}


@pytest.mark.parametrize("case", CASES)
def test_all_layers_dequantise_in_the_first_and_last_steps_and_none_between(case: str) -> None:
    name, options, models = CASES[case]
    pipe = loaded(name, (1, 2))
    calls = watched(pipe)
    run(pipe, name, steps=4, **options)
    every = {model: len(layers_of(dit)) for model, dit in dits(pipe).items()}
    high = [step in (0, 2, 3) for step in range(4) for _ in range(len(models) // 4)]
    assert calls == [[model, every[model] * so] for model, so in zip(models, high, strict=True)]
    assert not any(layer.high_precision for dit in dits(pipe).values() for layer in layers_of(dit))


@pytest.mark.parametrize("name", NAMES)
def test_all_steps_equal_dequantising_and_none_equals_w8a8(name: str) -> None:
    pipe = loaded(name, (0, 2))
    every = run(pipe, name)
    set_high_precision_steps(pipe, (0, 0))
    none = run(pipe, name)
    assert torch.equal(none, run(loaded(name), name))
    assert torch.equal(every, run(loaded(name, backend="dequantize"), name))
    assert not torch.equal(every, none)


def test_a_pipeline_without_a_callback_is_followed_by_its_timesteps(tmp_path: Path) -> None:
    folder = saved_dit("hunyuanvideo-1.5", tmp_path)
    dit: Any = load_component(folder, device="cpu", quantization="fp8", backend="scaled_mm")
    vae = diffusers.AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(32, 32, 32, 32, 32))
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.HunyuanVideo15Pipeline(
        transformer=dit, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), guider=ClassifierFreeGuidance(), **parts
    )
    set_high_precision_steps(quiet(pipe), (1, 2))
    embeds = {"prompt_embeds": torch.ones(1, 8, 64), "prompt_embeds_2": torch.ones(1, 8, 32)}
    embeds |= {f"prompt_embeds_mask{which}": torch.ones(1, 8) for which in ("", "_2")}
    embeds |= {f"negative_{name}": tensor for name, tensor in embeds.items()}
    calls = watched(pipe)
    for _ in range(2):
        calls.clear()
        pipe(height=64, width=64, num_frames=5, num_inference_steps=4, output_type="latent", **embeds)
        layers = len(layers_of(dit))
        assert [count // layers for _, count in calls] == [1, 1, 0, 0, 1, 1, 1, 1]
    assert not any(layer.high_precision for layer in layers_of(dit))


def test_a_mixed_run_equals_a_loop_driven_by_hand() -> None:
    expected = _by_hand(loaded("z_image"), steps=4, high={0, 3})
    assert torch.equal(run(loaded("z_image", (1, 1)), steps=4), expected)


@torch.no_grad()
def _by_hand(pipe: Any, steps: int, high: set[int]) -> Tensor:
    """What run() does, written out: one DiT and one that dequantises, taken in turns."""
    other = dequantised("z_image", pipe)
    embeds, _ = pipe.encode_prompt("a red cube", do_classifier_free_guidance=False, max_sequence_length=32)
    generator = torch.Generator("cpu").manual_seed(0)
    latents = pipe.prepare_latents(1, pipe.transformer.in_channels, 64, 64, torch.float32, "cpu", generator)
    tokens = latents.shape[2] * latents.shape[3] // 4
    config = pipe.scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    pipe.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
    for step, t in enumerate(pipe.scheduler.timesteps):
        dit = other.transformer if step in high else pipe.transformer
        (out,) = dit([*latents.bfloat16().unsqueeze(2)], (1000 - t[None]) / 1000, embeds, return_dict=False)[0]
        latents = pipe.scheduler.step(-out.float().transpose(0, 1), t, latents, return_dict=False)[0]
    return latents


# Runs of every kind


def test_runs_of_other_lengths_follow_one_another(caplog: pytest.LogCaptureFixture) -> None:
    pipe = loaded("z_image", (1, 1))
    calls = watched(pipe)
    counts = {}
    with caplog.at_level(logging.WARNING, "fp8_convert"):
        for steps in (4, 2, 3, 1, 2):
            calls.clear()
            run(pipe, steps=steps)
            counts[steps] = [count // 28 for _, count in calls]
    assert counts == {4: [1, 0, 0, 1], 2: [1, 1], 3: [1, 0, 1], 1: [1]}
    assert [r.message for r in caplog.records if "covers" in r.message] == [
        f"high_precision_steps=(1, 1) covers all {steps} steps: no W8A8 linear runs in FP8" for steps in (2, 1)
    ]


class Halving(PipelineCallback):  # type: ignore[misc]
    """Halves the latents after the first step, in the form of diffusers' own callbacks, which name what they take."""

    tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012

    def callback_fn(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        assert list(tensors) == self.tensor_inputs
        return {"latents": tensors["latents"] * (0.5 if step == 0 else 1.0)}


@pytest.mark.parametrize("name", ["z_image", "flux"])
def test_the_callback_stays_the_callers(name: str) -> None:
    pipe, plain = loaded(name, (2, 1)), loaded(name, backend="dequantize")
    seen: list[Any] = []

    def halve(each: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        seen.append((step, float(timestep), *tensors))
        return {"latents": tensors["latents"] * (0.5 if step == 0 else 1.0)}

    halved = run(plain, name, steps=3, callback_on_step_end=halve)
    theirs, seen = seen, []
    assert torch.equal(run(pipe, name, steps=3, callback_on_step_end=halve), halved)
    assert seen == theirs
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert torch.equal(run(pipe, name, steps=3, callback_on_step_end=Halving()), halved)
    assert not torch.equal(run(pipe, name, steps=3), halved)


@pytest.mark.parametrize("how", ["interrupt", "raise"])
def test_a_run_that_ends_early_leaves_nothing_behind(how: str) -> None:
    pipe = loaded("z_image", (2, 1))
    picture = run(pipe, steps=4)
    calls = watched(pipe)

    def stop(each: Any, step: int, *_: Any) -> dict[str, Any]:
        if how == "raise":
            raise KeyboardInterrupt
        each._interrupt = True
        return {}

    if how == "raise":
        with pytest.raises(KeyboardInterrupt):
            run(pipe, steps=4, callback_on_step_end=stop)
    else:
        run(pipe, steps=4, callback_on_step_end=stop)
    assert calls == [[ONE, 28]]
    assert not any(layer.high_precision for layer in layers_of(pipe.transformer))
    assert torch.equal(run(pipe, steps=4), picture)
    assert [count // 28 for _, count in calls[1:]] == [1, 1, 0, 1]


def test_a_scheduler_and_a_dit_put_in_later_are_followed() -> None:
    pipe, plain = loaded("wan22", (1, 0)), loaded("wan22", backend="dequantize")
    for each in (pipe, plain):
        each.scheduler = UniPCMultistepScheduler.from_config(each.scheduler.config, flow_shift=5.0)
    assert torch.equal(run(pipe, "wan22", steps=1), run(plain, "wan22", steps=1))
    pipe = loaded("z_image", (1, 0))
    picture = run(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.transformer = pickle.loads(pickle.dumps(copy.deepcopy(pipe.transformer)))
    calls = watched(pipe)
    assert torch.equal(run(pipe), picture)
    assert calls == [[ONE, 28], [ONE, 0]]


# The pipeline is still what it was


def test_the_pipeline_keeps_its_name_and_signature_and_can_be_copied() -> None:
    pipe = loaded("z_image", (1, 0))
    assert isinstance(pipe, ZImagePipeline)
    assert type(pipe).__name__ == "ZImagePipeline"
    assert inspect.signature(type(pipe).__call__) == inspect.signature(ZImagePipeline.__call__)
    with pytest.raises(TypeError, match="no_such_argument"):
        pipe("a red cube", no_such_argument=1)
    copies = copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))
    picture = run(pipe)
    for other in copies:
        assert type(other) is type(pipe)
        assert torch.equal(run(other), picture)
    set_high_precision_steps(pipe, None)
    assert type(pipe) is ZImagePipeline
    assert not torch.equal(run(pipe), picture)
    assert report(pipe).high_precision_steps is None


def test_saving_writes_an_ordinary_pipeline(tmp_path: Path) -> None:
    pipe, plain = loaded("z_image", (1, 0)), loaded("z_image")
    picture = run(pipe)
    assert not torch.equal(run(plain), picture)
    pipe.save_pretrained(tmp_path / "mine")
    plain.save_pretrained(tmp_path / "plain")
    for file in sorted((tmp_path / "plain").rglob("*.json")):
        mine = tmp_path / "mine" / file.relative_to(tmp_path / "plain")
        assert json.loads(mine.read_text()) == json.loads(file.read_text())
    again = load_pipeline(tmp_path / "mine", device="cpu", backend="scaled_mm", high_precision_steps=(1, 0))
    assert torch.equal(run(quiet(again)), picture)


def test_casting_and_offloading() -> None:
    pipe = loaded("z_image", (1, 0))
    pipe.to("cpu").to(torch.float32).to(torch.bfloat16)  # which rounds buffers that are no weights
    picture = run(pipe)
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    calls = watched(pipe)
    assert torch.equal(run(pipe), picture)
    assert calls == [[ONE, 28], [ONE, 0]]


# What is refused, and what is told


@pytest.mark.parametrize("steps", [1, "11", (1,), (1, 1, 1), (-1, 0), (0, 0.5), (True, 1), ("1", "1"), {1: 1}])
def test_counts_that_mean_nothing_are_refused(steps: Any) -> None:
    with pytest.raises(
        ValueError, match=r"give two counts from 0 up, of the first and the last steps, such as \(1, 1\)"
    ):
        loaded("z_image", steps)


@pytest.mark.parametrize("steps", [None, (0, 0), [0, 0]])
def test_no_steps_leave_the_pipeline_alone(steps: Any) -> None:
    assert type(loaded("z_image", steps)) is ZImagePipeline


def test_pipelines_that_cannot_keep_it_are_refused() -> None:
    with pytest.raises(ValueError, match="ZImagePipeline has no W8A8 linears, so high_precision_steps=\\(1, 1\\)"):
        set_high_precision_steps(bf16("z_image"), (1, 1))
    silent = diffusers.PixArtAlphaPipeline.__new__(diffusers.PixArtAlphaPipeline)
    with pytest.raises(ValueError, match="PixArtAlphaPipeline does not tell which step it is at"):
        set_high_precision_steps(silent, (1, 1))


def test_the_report_tells_the_steps_and_how_many_there_were() -> None:
    pipe = loaded("wan22", [1, 2])
    told = report(pipe)
    says = "20 linears dequantise in the first 1 and the last 2 steps of a run"
    assert told.ok
    assert told.high_precision_steps == (1, 2)
    assert {c.name: c.notes[0] for c in told.components if c.notes} == {ONE: says, TWO: says}
    assert json.loads(json.dumps(told.to_json()))["high_precision_steps"] == [1, 2]
    run(pipe, "wan22", steps=4)
    assert says + " (3 of 4 in the last run)" in str(report(pipe))
    told = report(loaded("z_image", (1, 2), backend="dequantize"))
    assert "no linears dequantise in the first 1 and the last 2 steps of a run: all of them always do" in str(told)


# torch.compile


def compiled_graphs(name: str, steps: Any, device: str, **options: Any) -> tuple[list[int], float]:
    """How many graphs there are after runs of 4, 5 and 9 steps with the blocks compiled, and the first run's PSNR."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = quiet(load_pipeline(converted(name), device=device, backend="scaled_mm", high_precision_steps=steps))
    for dit in dits(pipe).values():
        dit.compile_repeated_blocks(fullgraph=True, **options)
    counts, pictures = [], []
    for number in (4, 5, 9):
        pictures.append(run(pipe, name, steps=number))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    with torch.compiler.set_stance("force_eager"):
        return counts, psnr(pictures[0], run(pipe, name, steps=4))


def test_compiled_blocks_have_two_graphs_whatever_the_number_of_steps() -> None:
    (plain, *others), _ = compiled_graphs("wan22", None, "cpu", backend="eager")
    assert plain > 0
    assert others == [plain, plain]
    assert compiled_graphs("wan22", (0, 2), "cpu", backend="eager") == ([2 * plain] * 3, float("inf"))


def test_a_dit_compiled_as_a_whole_has_two_graphs() -> None:
    pipe = loaded("z_image", (1, 1))
    picture = run(pipe, steps=4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.transformer.compile(backend="eager")
    assert torch.equal(run(pipe, steps=4), picture)
    run(pipe, steps=7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize("name", ["z_image", "qwen_image", "wan22"])
def test_cuda_compiles_each_block_for_either_kind_of_step(name: str) -> None:
    (plain, *others), _ = compiled_graphs(name, None, "cuda")
    assert others == [plain, plain]
    (both, *others), close = compiled_graphs(name, (0, 2), "cuda")
    assert plain < both <= 2 * plain
    assert others == [both, both]
    assert close > 30


@pytest.mark.gpu
def test_cuda_offloads() -> None:
    pipe = quiet(load_pipeline(converted("z_image"), device="cuda", high_precision_steps=(1, 0)))
    picture = run(pipe)
    for offload in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        pipe = quiet(load_pipeline(converted("z_image"), device="cpu", high_precision_steps=(1, 0)))
        getattr(pipe, offload)()
        assert torch.equal(run(pipe), picture)
        set_high_precision_steps(pipe, None)
        assert not torch.equal(run(pipe), picture)
