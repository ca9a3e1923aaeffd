"""Decisions: what becomes FP8, by which rule, and fusion groups as a whole."""

import pytest

from fp8_convert.converter.format.header import TensorInfo
from fp8_convert.converter.plan.decide import PlannedTensor, check_patterns, decide, expand_aliases
from fp8_convert.converter.plan.manifest import ComponentRules, FusionGroup, Rule
from fp8_convert.converter.snapshot.modules import ModuleMap
from fp8_convert.converter.telling.errors import ConvertError

QKV = FusionGroup("attn", ("to_q", "to_k", "to_v"), ("to_qkv",), "fused")
W13 = FusionGroup("feed_forward", ("w1", "w3"), ("w13",), "fused")
RULES = ComponentRules(
    component="transformer",
    mode="w8a8",
    kinds=("Linear", "Conv2d"),
    eligible=(Rule("blocks", "blocks are big"), Rule("conv", "so are convolutions")),
    never_layers=(Rule("norm", "norms are small"),),
    ignored_layers=(Rule("mod", "sensitive"),),
    storage_layers=(Rule("mod", "stored by --compact"),),
    fusion_groups=(QKV, W13),
)
ATTENTION = [f"blocks.0.attn.to_{m}" for m in "qkv"]


def info(name: str, shape: tuple[int, ...] = (256, 256), dtype: str = "BF16") -> TensorInfo:
    return TensorInfo(name, dtype, shape, 0, 0)


def decided(
    modules: list[str],
    *,
    shape: tuple[int, ...] = (256, 256),
    dtype: str = "BF16",
    rules: ComponentRules = RULES,
    kinds: dict[str, str] | None = None,
    keep_fp32: frozenset[str] = frozenset(),
    user_patterns: tuple[str, ...] = (),
    compact: bool = False,
    block: tuple[int, int] | None = None,
) -> tuple[dict[str, PlannedTensor], list[str]]:
    tensors = [info(f"{m}.weight", shape, dtype) for m in modules]
    map_ = ModuleMap(kinds or dict.fromkeys(modules, "Linear"), keep_fp32)
    planned, notes = decide(tensors, rules, map_, user_patterns=user_patterns, compact=compact, block=block)
    assert [p.info for p in planned] == tensors
    return {p.module: p for p in planned}, notes


def one(module: str, **options: object) -> tuple[bool, str]:
    planned, _ = decided([module], **options)  # type: ignore[arg-type]
    return planned[module].decision.fp8, planned[module].decision.rule


def test_eligible() -> None:
    planned, notes = decided(["blocks.0.mlp"])
    decision = planned["blocks.0.mlp"].decision
    assert (decision.mode, decision.scheme, decision.block, decision.group) == ("w8a8", "tensor", None, None)
    assert (decision.rule, decision.why, decision.kind) == ("blocks", "blocks are big", "Linear")
    assert notes == []


def test_blocks() -> None:
    planned, _ = decided(["blocks.0.mlp"], block=(128, 64))
    assert planned["blocks.0.mlp"].decision.scheme == "block128x64"


@pytest.mark.parametrize(
    ("module", "options", "rule"),
    [
        ("head", {}, "not eligible"),
        ("blocks.0.norm", {}, "norm"),
        ("blocks.0.mod", {}, "mod"),
        ("blocks.0.x", {"kinds": {}}, "blocks"),
        ("blocks.0.x", {"kinds": {"other": "Linear"}}, "unknown module"),
        ("blocks.0.x", {"kinds": {"blocks.0.x": "Embedding"}}, "kind Embedding"),
        ("blocks.0.x", {"keep_fp32": frozenset({"blocks.0.x"})}, "_keep_in_fp32_modules"),
        ("blocks.0.x", {"user_patterns": ("x",)}, "x"),
        ("blocks.0.x", {"dtype": "F64"}, "dtype F64"),
        ("blocks.0.x", {"dtype": "I8"}, "dtype I8"),
        ("blocks.0.x", {"shape": (256,)}, "shape [256]"),
        ("blocks.0.x", {"shape": (0, 256)}, "shape [0, 256]"),
        ("conv", {"kinds": {"conv": "Conv2d"}}, "shape [256, 256]"),
        ("blocks.0.x", {"shape": (5, 6)}, "element count no multiple of 4"),
        ("blocks.0.x", {"shape": (2, 6)}, "blocks"),
    ],
)
def test_kept_and_why(module: str, options: dict[str, object], rule: str) -> None:
    assert one(module, **options) == (rule == "blocks", rule)


def test_only_weights_are_eligible() -> None:
    planned, _ = decide([info("blocks.0.x.bias")], RULES, ModuleMap({"blocks.0.x": "Linear"}))
    assert planned[0].decision.rule == "no weight"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_source_dtypes(dtype: str) -> None:
    assert one("blocks.0.x", dtype=dtype) == (True, "blocks")


def test_convolutions_have_no_blocks() -> None:
    planned, _ = decided(["conv"], shape=(8, 4, 3, 3), kinds={"conv": "Conv2d"}, block=(128, 128))
    assert planned["conv"].decision.scheme == "tensor"


def test_compact_stores_what_w8a8_must_skip() -> None:
    planned, _ = decided(["blocks.0.mod", "blocks.0.norm"], compact=True)
    assert (planned["blocks.0.mod"].decision.mode, planned["blocks.0.mod"].decision.scheme) == (
        "storage",
        "block128x128",
    )
    assert not planned["blocks.0.norm"].decision.fp8


def test_a_user_s_pattern_keeps_what_compact_would_store() -> None:
    assert one("blocks.0.mod", compact=True, user_patterns=("mod",)) == (False, "mod")


@pytest.mark.parametrize(("shape", "kept"), [((256, 384), False), ((256, 200), True), ((200, 256), True)], ids=str)
def test_unaligned_linears(shape: tuple[int, int], kept: bool) -> None:
    rules = ComponentRules("text_encoder", "storage", kinds=("Linear",), unaligned="keep", eligible=RULES.eligible)
    planned, _ = decided(["blocks.0.x"], shape=shape, rules=rules, block=(128, 128))
    assert planned["blocks.0.x"].decision.fp8 is not kept
    padded, _ = decided(["blocks.0.x"], shape=shape, block=(128, 128))  # RULES pad
    assert padded["blocks.0.x"].decision.fp8


# Fusion groups


def test_members_share_a_group_by_their_parent() -> None:
    planned, _ = decided(
        [*ATTENTION, "blocks.1.attn.to_q", "blocks.1.attn.to_k", "blocks.0.attn.to_out", "blocks.0.to_q"]
    )
    groups = {m: p.decision.group for m, p in planned.items()}
    assert {groups[m] for m in ATTENTION} == {"blocks.0.attn.(to_q|to_k|to_v)"}
    assert groups["blocks.1.attn.to_q"] == groups["blocks.1.attn.to_k"] == "blocks.1.attn.(to_q|to_k|to_v)"
    assert groups["blocks.0.attn.to_out"] is None
    assert groups["blocks.0.to_q"] is None  # its parent is no attn


def test_a_member_alone_is_no_group() -> None:
    planned, _ = decided(["blocks.0.attn.to_q"])
    assert planned["blocks.0.attn.to_q"].decision.group is None


def test_block_scales_are_never_shared() -> None:
    planned, _ = decided(ATTENTION, block=(128, 128))
    assert {p.decision.group for p in planned.values()} == {None}


@pytest.mark.parametrize("block", [None, (128, 128)], ids=str)
def test_naming_one_member_keeps_the_group_and_says_so(block: tuple[int, int] | None) -> None:
    others = ["blocks.1.attn.to_q", "blocks.1.attn.to_k", "blocks.0.feed_forward.w1", "blocks.0.feed_forward.w3"]
    planned, notes = decided([*ATTENTION, *others], user_patterns=("blocks.0.attn.to_k",), block=block)
    assert [m for m, p in planned.items() if not p.decision.fp8] == ATTENTION
    assert all(planned[m].decision.rule == "blocks.0.attn.to_k" for m in ATTENTION)
    assert planned["blocks.0.attn.to_q"].decision.why == "shares a scale with blocks.0.attn.to_k, which is kept"
    assert notes == [
        "the ignored layer 'blocks.0.attn.to_k' names one member of a fused projection; 2 other weights stay with it"
    ]


def test_naming_all_members_says_nothing() -> None:
    planned, notes = decided(ATTENTION, user_patterns=("attn",))
    assert not any(p.decision.fp8 for p in planned.values())
    assert notes == []


def test_a_member_that_cannot_be_converted_keeps_the_group() -> None:
    tensors = [info(f"{m}.weight", dtype="F64" if m.endswith("v") else "BF16") for m in ATTENTION]
    planned, notes = decide(tensors, RULES, ModuleMap(dict.fromkeys(ATTENTION, "Linear")))
    assert [p.decision.rule for p in planned] == ["dtype F64"] * 3
    assert notes == []


# Users' patterns


def test_a_member_of_an_unfit_size_keeps_the_group() -> None:
    tensors = [info(f"{m}.weight", (5, 6) if m.endswith("q") else (8, 6)) for m in ATTENTION]
    planned, _ = decide(tensors, RULES, ModuleMap(dict.fromkeys(ATTENTION, "Linear")))
    assert {p.decision.rule for p in planned} == {"element count no multiple of 4"}


def test_aliases_of_fused_names() -> None:
    members = ["blocks.0.to_q", "blocks.0.to_k", "blocks.0.to_v"]
    assert expand_aliases(["blocks.0.to_qkv"], [QKV, W13]) == members
    assert expand_aliases(["w13", "to_q"], [QKV, W13]) == ["w1", "w3", "to_q"]
    planned, notes = decided([*ATTENTION, "blocks.0.mlp"], user_patterns=tuple(expand_aliases(["to_qkv"], [QKV])))
    assert [m for m, p in planned.items() if p.decision.fp8] == ["blocks.0.mlp"]
    assert notes == []


def test_a_pattern_that_matches_nothing_offers_the_closest() -> None:
    names = [*ATTENTION, "blocks.0.img_mlp.net.2"]
    check_patterns(["img_mlp", "to_qkv", "*.to_q"], [QKV], names)
    with pytest.raises(ConvertError, match=r"'img_mpl' matches no linear layer of the DiT; did you mean img_mlp"):
        check_patterns(["to_q", "img_mpl"], [QKV], names)
    with pytest.raises(ConvertError, match="run with --dry-run to see the layers"):
        check_patterns(["zzzzzz"], [QKV], names)
    with pytest.raises(ConvertError, match="matches no linear layer"):
        check_patterns(["w13"], [QKV, W13], names)
