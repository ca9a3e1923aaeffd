"""Recorded blocks: the bits of the block itself, whatever changes between two calls."""

import copy
import logging
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from layers import fp8_twin
from runs import converted, run
from torch import Tensor, nn

from fp8_convert.loader import load_component, load_pipeline, report
from fp8_convert.loader.cuda_graphs import GraphedBlock, record_blocks, recorded_blocks
from fp8_convert.loader.shared_input import settle, share_inputs

WIDTH = 256


class Block(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        for name in ("to_q", "to_k", "to_v", "out"):
            plain = nn.Linear(WIDTH, WIDTH).to(device, torch.bfloat16).requires_grad_(False)
            self.add_module(name, fp8_twin(plain, "w8a8"))
        for other in (self.to_k, self.to_v):
            other.scale.copy_(self.to_q.scale)
        self.strength = 1.0
        self.settings = {"power": 1}

    def forward(self, x: Tensor, text: Tensor | None = None, *, flip: bool = False) -> tuple[Tensor, dict[str, Any]]:
        x = x.flip(-1) if flip else x
        mixed = self.to_q(x) + self.to_k(x) * self.to_v(x) ** self.settings["power"]
        out = x + self.strength * self.out(mixed)
        return (out if text is None else out + text), {"text": text, "shape": list(x.shape)}


class Model(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self, device: torch.device, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(device) for _ in range(count)])
        share_inputs(self)
        settle(self)

    def forward(self, x: Tensor, text: Tensor | None = None, **options: Any) -> Tensor:
        for block in self.blocks:
            x, _ = block(x, text, **options)
        return x


def twins(device: torch.device, count: int = 3) -> tuple[Model, Model]:
    """The same model recorded and not."""
    plain = Model(device, count)
    recorded = copy.deepcopy(plain)
    assert record_blocks(recorded) == count
    return recorded, plain


def tokens(seed: int, count: int = 100) -> Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", 0)


def test_on_a_cpu_it_is_refused_and_blocks_run_as_ever() -> None:
    with pytest.raises(ValueError, match="cuda_graphs=True needs a CUDA device, and the device is cpu"):
        load_pipeline(converted("z_image"), device="cpu", cuda_graphs=True)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        load_component(converted("z_image"), "transformer", device="cpu", cuda_graphs=True)
    model = Model(torch.device("cpu"))
    x = torch.randn(1, 4, WIDTH, dtype=torch.bfloat16)
    expected = model(x)
    record_blocks(model)
    for _ in range(3):
        assert torch.equal(model(x), expected)
    assert recorded_blocks(model) == (3, 0, 0)
    assert isinstance(model.blocks[0], Block)
    assert type(model.blocks[0]).__name__ == "Block"


def test_copies_are_plain() -> None:
    model = Model(torch.device("cpu"), 1)
    record_blocks(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.blocks[0]) is Block
        assert copied.state_dict().keys() == model.state_dict().keys()


@pytest.mark.gpu
def test_replays_have_the_bits_of_the_block(gpu: torch.device) -> None:
    recorded, plain = twins(gpu)
    kept = []
    for seed in range(6):
        for count in (100, 2000, 5):
            x, text = tokens(seed, count), tokens(seed + 50, count)
            for arguments in ((x,), (x, text)):
                out = recorded(*arguments)
                kept.append((out, plain(*arguments)))
    assert recorded_blocks(recorded) == (3, 3, 0)
    assert all(torch.equal(*pair) for pair in kept)  # also those of before: nothing is written over


@pytest.mark.gpu
def test_what_is_no_tensor_comes_out_too(gpu: torch.device) -> None:
    recorded, plain = twins(gpu, 1)
    for seed in range(4):
        x, text = tokens(seed), tokens(seed + 9)
        (a, told), (b, expected) = (model.blocks[0](x, text, flip=True) for model in (recorded, plain))
        assert torch.equal(a, b)
        assert told.keys() == expected.keys()
        assert told["shape"] == [1, 100, WIDTH]
        assert torch.equal(told["text"], text)


def twice(x: Tensor, text: Tensor | None) -> tuple[Tensor, None]:
    return x * 2, None


CHANGES = {
    "an option": lambda model, x: model(x, flip=True),
    "a number": lambda model, x: [setattr(b, "strength", 0.5) for b in model.blocks] and model(x),
    "a setting within a dict": lambda model, x: model.blocks[1].settings.update(power=2) or model(x),
    "codes in place": lambda model, x: model.blocks[0].out.codes.copy_(model.blocks[1].out.codes) is None or model(x),
    "a scale in place": lambda model, x: model.blocks[0].out.scale.mul_(2) is None or model(x),
    "another weight": lambda model, x: setattr(model.blocks[2], "out", copy.deepcopy(model.blocks[0].out)) or model(x),
    "another module": lambda model, x: setattr(model.blocks[2], "out", nn.Identity()) or model(x),
    "memory": lambda model, x: model.to("cpu").to("cuda")(x),
    "autocast": lambda model, x: torch.autocast("cuda", torch.float16)(model)(x),
    "a hook": lambda model, x: model.blocks[0].register_forward_hook(lambda *a: (a[2][0] * 2, {})) and model(x),
    "a hook within": lambda model, x: model.blocks[0].out.register_forward_hook(lambda *a: a[2] * 2) and model(x),
    "a forward of its own": lambda model, x: setattr(model.blocks[0], "forward", twice) or model(x),
    "high precision": lambda model, x: setattr(model.blocks[0].out, "high_precision", True) or model(x),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_heard(gpu: torch.device, change: Any) -> None:
    recorded, plain = twins(gpu)
    for seed in range(4):
        recorded(tokens(seed))
    assert recorded_blocks(recorded) == (3, 3, 0)
    x = tokens(7)
    before = plain(x)
    for _ in range(4):
        expected = change(plain, x)
        assert torch.equal(change(recorded, x), expected)
    assert not torch.equal(before, expected) or change is CHANGES["memory"]


@pytest.mark.gpu
def test_gradients_pass(gpu: torch.device) -> None:
    recorded, _ = twins(gpu)
    for seed in range(3):
        recorded(tokens(seed))
    with torch.enable_grad():
        x = tokens(1).requires_grad_()
        recorded(x).float().sum().backward()
    assert x.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["waits", "writes"])
def test_what_cannot_be_recorded_runs_and_is_named(
    gpu: torch.device, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Waiting(Block):
        def forward(self, x: Tensor, text: Tensor | None = None, **options: Any) -> tuple[Tensor, dict[str, Any]]:
            if kind == "writes":
                x.mul_(1.5)
            elif float(x.sum()) > 1e9:  # the host waits for the GPU
                x = x * 2
            return super().forward(x, text, **options)

    Waiting.__name__ = "Block"
    recorded, plain = twins(gpu)
    for model in (recorded, plain):
        model.blocks[1] = Waiting(gpu)
    plain.blocks[1].load_state_dict(recorded.blocks[1].state_dict())
    record_blocks(recorded)
    with caplog.at_level(logging.WARNING, "fp8_convert.loader"):
        for seed in range(4):
            assert torch.equal(recorded(tokens(seed)), plain(tokens(seed)))
    assert recorded_blocks(recorded) == (2, 2, 1)
    (said,) = [r.message for r in caplog.records if "CUDA graphs" in r.message]
    assert said.startswith("a Block runs without CUDA graphs: ")
    assert kind == "waits" or said.endswith("it writes into its inputs")
    assert any(
        "2 of 3 blocks are recorded as CUDA graphs, and 1 cannot be" in n for n in report(recorded).components[0].notes
    )


@pytest.mark.gpu
def test_threads_and_streams_do_not_meet(gpu: torch.device) -> None:
    recorded, plain = twins(gpu)
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for i in range(30):
                x = tokens(100 * seed + i)
                if not torch.equal(recorded(x), plain(x)):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with torch.inference_mode():
        x = tokens(1)
        for _ in range(4):
            out = recorded(x)
    assert torch.equal(out, plain(x))
    for _ in range(4):
        assert torch.equal(recorded(tokens(2)), plain(tokens(2)))


@pytest.mark.gpu
def test_memory_is_given_back(gpu: torch.device) -> None:
    recorded, _ = twins(gpu)
    del _
    for seed in range(4):
        recorded(tokens(seed, 20_000))
    held = torch.cuda.memory_allocated()
    del recorded
    import gc

    gc.collect()
    assert held - torch.cuda.memory_allocated() > 2 * 20_000 * WIDTH * 2  # what recordings read and write


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
@pytest.mark.parametrize("name", ["qwen_image", "z_image", "wan22"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_pipelines_give_the_same_pictures(name: str, compiled: bool) -> None:
    pictures = []
    for cuda_graphs in (False, True):
        pipe = load_pipeline(converted(name), device="cuda", cuda_graphs=cuda_graphs)
        pipe.set_progress_bar_config(disable=True)
        if compiled:
            torch._dynamo.reset()
            # Otherwise a kind of inputs may be computed by one graph now and by another later, with other bits.
            pipe.transformer.compile_repeated_blocks(dynamic=False)
        pictures.append([run(pipe, name, steps=5, seed=seed) for seed in (0, 1)])
    assert all(torch.equal(a, b) for a, b in zip(*pictures, strict=True))
    allowed, recorded, refused = recorded_blocks(pipe.transformer)
    assert (recorded, refused) == (allowed, 0)
    assert isinstance(next(m for m in pipe.transformer.modules() if isinstance(m, GraphedBlock)), nn.Module)
