"""q, k and v that share their input: the bits of each alone, one quantisation, and nothing shared that must not be."""

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from layers import quantized
from runs import converted
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp8_convert.converter import convert
from fp8_convert.converter.format.layout import WeightFormat
from fp8_convert.loader import load_component, load_pipeline
from fp8_convert.loader.install import install
from fp8_convert.loader.shared_input import SharedInput, _here, groups_of, settle, share_inputs, side_by_side

KINDS = {"tensor": (None, "dynamic"), "channel": ("channel", "dynamic"), "block": (128, "dynamic"),
         "static": (None, "static")}  # fmt: skip
NAMES = ("to_q", "to_k", "to_v")


class Attention(nn.Module):
    def __init__(
        self, kind: str, device: torch.device, share: bool = True, scales: tuple[float, ...] = (1, 1, 1)
    ) -> None:
        super().__init__()
        block, scheme = KINDS[kind]
        torch.manual_seed(0)
        weights = torch.randn(3 * 256, 256) * 0.05
        codes, scale = quantized(weights, block)
        for i, name in enumerate(NAMES):
            how = WeightFormat("w8a8", (128, 128) if block == 128 else None, block == "channel")
            layer = nn.Linear(256, 256).to(torch.bfloat16)
            made = install(layer, how, device="cpu", activation_scheme=scheme, backend="scaled_mm")
            made.codes.copy_(codes[i * 256 : (i + 1) * 256])
            rows = len(scale) // 3 if scale.dim() else 0
            made.scale.copy_((scale[i * rows : (i + 1) * rows] if scale.dim() else scale) * scales[i])
            if made.static_scale is not None:
                made.static_scale.fill_(0.01)
            self.add_module(name, made)
        if share:
            share_inputs(self)
        self.to(device).eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.get_submodule(name)(x) for name in NAMES)


class Counting(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def tokens(count: int, device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(1, count, 256, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("count", [1, 48, 256, 1500])
@pytest.mark.parametrize("kind", KINDS)
def test_has_the_bits_of_each_alone(device: torch.device, kind: str, count: int) -> None:
    together, alone = Attention(kind, device), Attention(kind, device, share=False)
    for seed in range(3):
        x = tokens(count, device, seed)
        assert equal(together(x), alone(x))
        assert equal(together(x)[::-1], tuple(alone.get_submodule(name)(x) for name in reversed(NAMES)))
    (group,) = groups_of(together)
    assert not group.apart


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_quantised_once(device: torch.device, kind: str) -> None:
    together = Attention(kind, device)
    x = tokens(2000, device)
    together(x)
    with Counting() as counted:
        together(x)
    casts = counted.seen["reciprocal"]  # the torch form of each quantisation takes one
    assert casts == 1


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_take_one_product_where_weights_lie_side_by_side(device: torch.device, kind: str) -> None:
    together, alone = Attention(kind, device), Attention(kind, device, share=False)
    if device.type == "cpu":  # where `settle` leaves them be
        for leaf in ("weight", "bias", "weight_scale", "weight_scale_inv"):
            held = [getattr(m, leaf, None) for m in together.children()]
            if held[0] is not None and held[0].dim():
                joint = torch.cat([t.detach() for t in held])
                for tensor, piece in zip(held, joint.chunk(3), strict=True):
                    tensor.data = piece
    x = tokens(256, device)
    together(x)
    with Counting() as counted:
        out = together(x)
    blocks = 2 if kind == "block" and device.type == "cpu" else 1  # there a block product is a sum of two
    assert counted.seen["_scaled_mm"] == blocks
    assert all(one.is_contiguous() for one in out)  # as each alone, for what is slow on slices
    assert equal(out, alone(x))


@pytest.mark.gpu
def test_weights_lie_side_by_side_on_a_gpu_wherever_they_come_from() -> None:
    device = torch.device("cuda", 0)
    model = Attention("channel", device)
    for moved in (model, model.to("cpu").to(device), copy.deepcopy(model).to("cpu").to(device)):
        layers = list(moved.children())
        assert side_by_side([m.codes for m in layers]) is not None
        assert side_by_side([m.bias for m in layers]) is not None
        assert side_by_side([m.scale for m in layers]) is not None
    assert model.to_q.weight.untyped_storage().nbytes() == 3 * 256 * 256


def test_what_is_written_into_meanwhile_is_quantised_anew(device: torch.device) -> None:
    together, alone = Attention("tensor", device), Attention("tensor", device, share=False)
    for count in (100, 2000):
        x = tokens(count, device)
        q = together.to_q(x)
        assert torch.equal(q, alone.to_q(x))
        x.mul_(3)
        assert torch.equal(together.to_k(x), alone.to_k(x))
        assert torch.equal(together.to_v(x), alone.to_v(x))


def test_different_inputs_end_the_sharing(device: torch.device) -> None:
    """As in cross attention, whose k and v see another sequence."""
    together, alone = Attention("tensor", device), Attention("tensor", device, share=False)
    x, other = tokens(100, device), tokens(77, device, seed=5)
    for _ in range(2):
        assert torch.equal(together.to_q(x), alone.to_q(x))
        assert torch.equal(together.to_k(other), alone.to_k(other))
        assert torch.equal(together.to_v(other), alone.to_v(other))
    assert groups_of(together)[0].apart


def test_results_that_nobody_fetches_end_the_sharing(device: torch.device) -> None:
    together, alone = Attention("tensor", device), Attention("tensor", device, share=False)
    for seed in range(5):
        x = tokens(50, device, seed)
        assert torch.equal(together.to_q(x), alone.to_q(x))
        del x
    assert groups_of(together)[0].apart


def test_two_streams_of_a_block_may_alternate(device: torch.device) -> None:
    image, text = Attention("tensor", device), Attention("channel", device)
    alone = Attention("tensor", device, share=False), Attention("channel", device, share=False)
    x, c = tokens(2000, device), tokens(40, device, seed=3)
    for _ in range(2):
        for name in NAMES:
            assert torch.equal(image.get_submodule(name)(x), alone[0].get_submodule(name)(x))
            assert torch.equal(text.get_submodule(name)(c), alone[1].get_submodule(name)(c))
    assert not groups_of(image)[0].apart
    assert not groups_of(text)[0].apart


def test_threads_do_not_see_each_others(device: torch.device) -> None:
    together, alone = Attention("tensor", device), Attention("tensor", device, share=False)
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for i in range(20):
                x = tokens(64, device, 100 * seed + i)
                if not equal(together(x), alone(x)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_members_with_scales_of_their_own_are_left_alone(device: torch.device) -> None:
    together = Attention("tensor", device, scales=(1, 2, 1))
    alone = Attention("tensor", device, share=False, scales=(1, 2, 1))
    x = tokens(100, device)
    assert equal(together(x), alone(x))
    assert groups_of(together)[0].apart


def test_a_scale_that_changes_later_counts(device: torch.device) -> None:
    together, alone = Attention("tensor", device), Attention("tensor", device, share=False)
    x = tokens(100, device)
    assert equal(together(x), alone(x))
    for model in (together, alone):
        model.to_v.scale.mul_(2)
    assert equal(together(x), alone(x))


def test_weights_that_are_replaced_count(device: torch.device) -> None:
    together, alone = Attention("tensor", device), Attention("tensor", device, share=False)
    x = tokens(100, device)
    together(x)
    for model in (together, alone):
        codes = model.to_k.weight.detach().flip(0).clone()
        model.to_k.weight = nn.Parameter(codes, requires_grad=False)
    assert equal(together(x), alone(x))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies_share_among_themselves(device: torch.device, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = Attention("tensor", device)
    x = tokens(100, device)
    expected = model(x)
    other = copied(model)
    (group,) = groups_of(other)
    assert group is not groups_of(model)[0]
    assert group.members == (other.to_q, other.to_k, other.to_v)
    assert equal(other(x), expected)


def test_inference_mode_counts_no_versions_and_shares_nothing(device: torch.device) -> None:
    together, alone = Attention("tensor", device), Attention("tensor", device, share=False)
    with torch.inference_mode():
        x = tokens(100, device) * 1
        q = together.to_q(x)
        x.mul_(2)
        assert torch.equal(together.to_k(x), alone.to_k(x))
    assert q.shape == (1, 100, 256)
    assert not groups_of(together)[0].apart


def test_hooks_that_change_the_input_are_heard(device: torch.device) -> None:
    together, alone = Attention("tensor", device), Attention("tensor", device, share=False)
    for model in (together, alone):
        model.to_k.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    x = tokens(100, device)
    assert equal(together(x), alone(x))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_knows_no_groups(device: torch.device, kind: str) -> None:
    together, alone = Attention(kind, device), Attention(kind, device, share=False)
    x = tokens(64, device)
    together(x)
    torch._dynamo.reset()
    compiled = [torch.compile(model, fullgraph=True, backend="aot_eager")(x) for model in (together, alone)]
    assert equal(*compiled)
    assert equal(together(x), alone(x))


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "wan22"])
def test_every_attention_of_a_pipeline_is_a_group(name: str, tmp_path: Path, device: torch.device) -> None:
    convert(pipelines.saved(name), tmp_path / "out", quiet=True)
    pipe = load_pipeline(tmp_path / "out", device=device, backend="scaled_mm")
    groups = groups_of(pipe.transformer)
    assert groups
    linears = {id(m) for m in pipe.transformer.modules() if getattr(m, "mode", "") == "w8a8"}
    assert all(id(member) in linears for group in groups for member in group.members)
    before = pipe.transformer.state_dict()
    if hasattr(pipe.transformer, "fuse_qkv_projections"):
        pipe.transformer.fuse_qkv_projections()
    after = pipe.transformer.state_dict()
    assert list(before) == list(after)
    settle(pipe.transformer)
    assert isinstance(groups[0], SharedInput)


@pytest.mark.parametrize(("name", "component"), [
    ("qwen_image", "transformer"), ("z_image", "transformer"), ("wan22", "transformer"), ("qwen_image", "vae"),
    ("qwen_image", "text_encoder"),
])  # fmt: skip
def test_a_model_goes_with_the_last_name_for_it(name: str, component: str) -> None:
    """Without waiting for the garbage collector, or a GPU's memory would not be free when it is asked for."""
    gc.collect()
    gc.disable()
    try:
        model = load_component(converted(name), component, device="cpu", backend="scaled_mm")
        for members in [group.members for group in groups_of(model)]:
            x = torch.ones(2, 3, members[0].in_features, dtype=torch.bfloat16)
            assert all(member(x).shape[-1] == member.out_features for member in members)
        held = [weakref.ref(module) for module in model.modules()]
        model = members = None
        assert not [ref() for ref in held if ref() is not None]
    finally:
        gc.enable()


def test_a_copy_of_a_member_is_none(device: torch.device) -> None:
    together, alone = Attention("tensor", device), Attention("tensor", device, share=False)
    x = tokens(100, device)
    copied = copy.copy(together.to_q)
    assert torch.equal(copied(x), alone.to_q(x))
    assert equal(together(x), alone(x))
    del together
    assert torch.equal(copied(x), alone.to_q(x))  # the others are gone
    assert not any(kept.waiting for kept in _here.kept if kept.group is copied.shared)


def test_what_a_run_that_stopped_leaves_keeps_no_model(device: torch.device) -> None:
    together = Attention("tensor", device)
    together.to_q(tokens(100, device))  # and then no memory for k, say
    held = weakref.ref(together.to_k)
    del together
    assert held() is None
