"""Which weights become FP8, in which mode and scheme, and the rule that says so. Pure: names and shapes in.

For a component under a manifest's rules, every tensor gets one Decision. Fusion groups are then made whole: a
group is converted or kept as one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..format.header import TensorInfo
from ..format.layout import SCHEME_CHANNEL, SOURCE_DTYPES, STORAGE, WEIGHT, Block, WeightFormat
from ..snapshot.given_scale import GivenScale
from ..snapshot.modules import ModuleMap
from ..telling.errors import ConvertError
from ..telling.notebook import Brief
from .manifest import ComponentRules, FusionGroup
from .pattern import closest, matches

if TYPE_CHECKING:
    from .lora import LowRank

# What --compact stores linears in: the block that every reader of block scales knows.
STORAGE_FORMAT = WeightFormat(STORAGE, (128, 128))


@dataclass(frozen=True, repr=False)
class Decision(Brief):
    """What happens to one tensor. `format` is None for a kept one.

    `rule` is the pattern, or for rules that no manifest states a short phrase; `group` names the fusion group whose
    members share the scale; `input_scale` is the activation scale that is written beside the weight's, if one is.
    `given` is the scale of codes that another tool made: they are copied, or without a `format` made BF16. `dropped`
    tensors are not written.
    """

    rule: str
    why: str
    kind: str | None = None
    format: WeightFormat | None = None
    group: str | None = None
    input_scale: float | None = None
    given: GivenScale | None = None
    dropped: bool = False

    @property
    def fp8(self) -> bool:
        return self.format is not None

    @property
    def mode(self) -> str | None:
        return self.format.mode if self.format else None

    @property
    def block(self) -> Block | None:
        return self.format.block if self.format else None

    @property
    def per_tensor(self) -> bool:
        """Whether it becomes FP8 with one scale, which it may share."""
        return self.format is not None and self.format.per_tensor

    @property
    def scheme(self) -> str | None:
        return self.format.scheme if self.format else None


@dataclass(frozen=True, repr=False)
class PlannedTensor(Brief):
    """A source tensor and its decision. merges: what LoRAs add to it first, one after the other."""

    info: TensorInfo
    decision: Decision
    merges: tuple[LowRank, ...] = ()

    @property
    def module(self) -> str:
        return self.info.name.removesuffix(WEIGHT)

    @property
    def out_bytes(self) -> int:
        """Bytes of the output tensor, scales not counted."""
        if self.decision.dropped:
            return 0
        if self.decision.fp8:
            return self.info.numel
        return 2 * self.info.numel if self.decision.given is not None else self.info.nbytes

    @property
    def out_dtype(self) -> str:
        """The dtype of the output tensor."""
        if self.decision.fp8:
            return "F8_E4M3"
        return "BF16" if self.decision.given is not None else self.info.dtype

    @property
    def bytes_after(self) -> int:
        """Bytes of the output tensor and of the scale of its weight."""
        how = self.decision.format
        return self.out_bytes + (scale_bytes(self.info.shape, how) if how else 0)


def scale_bytes(shape: Sequence[int], how: WeightFormat) -> int:
    """Bytes of the scale of a weight."""
    return 4 * math.prod(how.scale_shape(shape))


EXPERTS = Decision(
    "experts",
    "expert weights, which the component's class stacks in 3-D parameters: no layer of a kind that becomes FP8",
)


def keep_all(tensors: Iterable[TensorInfo], rule: str, why: str) -> list[PlannedTensor]:
    """The decisions for a component that is not converted."""
    return [PlannedTensor(t, Decision(rule, why)) for t in tensors]


def decide(
    tensors: Sequence[TensorInfo],
    rules: ComponentRules,
    modules: ModuleMap,
    *,
    user_patterns: Sequence[str] = (),
    compact: bool = False,
    block: Block | None = None,
    storage: WeightFormat = STORAGE_FORMAT,
) -> tuple[list[PlannedTensor], list[str]]:
    """Decide every tensor of one component; returns the decisions in order and notes for the user.

    user_patterns: `--ignored-layers`, already expanded by `expand_aliases`; they keep what they match in the
    source dtype. block: block size of the component's own mode, None for the scales that the rules state. storage: what
    `compact` stores linears in.
    """
    stored = storage if compact else None
    decided = [PlannedTensor(t, _decide_one(t, rules, modules, user_patterns, stored, block)) for t in tensors]
    return _make_groups_whole(decided, rules.fusion_groups, user_patterns)


def expand_aliases(patterns: Iterable[str], groups: Iterable[FusionGroup]) -> list[str]:
    """Replace the fused names that vLLM users know (`to_qkv`) by their members, segment by segment."""
    members = {alias: group.members for group in groups for alias in group.aliases}
    expanded = []
    for pattern in patterns:
        head, dot, last = pattern.rpartition(".")
        expanded += [head + dot + member for member in members.get(last, (last,))]
    return expanded


def check_patterns(patterns: Iterable[str], groups: Sequence[FusionGroup], names: Sequence[str]) -> None:
    """Raise ConvertError for a user's pattern that matches none of the layers `names`; offer the closest."""
    for pattern in patterns:
        if any(matches(p, name) for p in expand_aliases([pattern], groups) for name in names):
            continue
        near = closest(pattern, names)
        hint = f"did you mean {', '.join(near)}?" if near else "run with --dry-run to see the layers."
        raise ConvertError(f"The ignored layer {pattern!r} matches no linear layer of the DiT; {hint}")


def _decide_one(
    tensor: TensorInfo,
    rules: ComponentRules,
    modules: ModuleMap,
    user_patterns: Sequence[str],
    storage: WeightFormat | None,
    block: Block | None,
) -> Decision:
    if not tensor.name.endswith(WEIGHT):
        if len(tensor.shape) == 3 and _is_of_experts(tensor.name):
            return EXPERTS
        return Decision("no weight", "biases, tables and buffers are small and stay as they are")
    module = tensor.name.removesuffix(WEIGHT)
    kind = modules.kinds.get(module)
    if kind is None and modules.problem is None and _is_of_experts(module):
        return EXPERTS
    if kind is None:
        return Decision("unknown module", modules.problem or "no module of the component's class has this name")
    if kind not in rules.kinds:
        return Decision(f"kind {kind}", f"only {', '.join(rules.kinds)} weights become FP8 here", kind)
    if module in modules.keep_fp32:
        return Decision("_keep_in_fp32_modules", "the component's class keeps it in float32", kind)
    if never := rules.rule_for(rules.never_layers, module):
        return Decision(never.pattern, never.why, kind)
    if asked := next((p for p in user_patterns if matches(p, module)), None):
        return Decision(asked, "ignored layer that the user named", kind)
    if ignored := rules.rule_for(rules.ignored_layers, module):
        stored = rules.rule_for(rules.storage_layers, module) if storage else None
        if stored is None or storage is None:
            return Decision(ignored.pattern, ignored.why, kind)
        how = storage if kind == "Linear" else WeightFormat(STORAGE)
        chosen = Decision(stored.pattern, stored.why, kind, how)
    elif eligible := rules.rule_for(rules.eligible, module):
        chosen = Decision(eligible.pattern, eligible.why, kind, _own_format(rules, kind, block))
    else:
        return Decision("not eligible", "no pattern of the manifest makes it eligible", kind)
    return _fit(tensor, chosen, rules)


def _own_format(rules: ComponentRules, kind: str, block: Block | None) -> WeightFormat:
    """The component's own format of a weight: scales of blocks and rows are for linears alone."""
    if kind != "Linear":
        return WeightFormat(rules.mode)
    return WeightFormat(rules.mode, block, channel=block is None and rules.weight_scales == SCHEME_CHANNEL)


def _is_of_experts(name: str) -> bool:
    """Whether a name is one of a mixture's experts, as in `mlp.experts.gate_up_proj` or `mlp.experts.3.up_proj`."""
    return "experts" in name.split(".")[:-1]


def _fit(tensor: TensorInfo, decision: Decision, rules: ComponentRules) -> Decision:
    """The decision, or a kept one where the tensor's dtype or shape does not allow it."""
    kept = replace(decision, format=None)
    dimensions = {"Linear": 2, "Conv2d": 4, "Conv3d": 5}[decision.kind or "Linear"]
    if tensor.dtype not in SOURCE_DTYPES:
        return replace(kept, rule=f"dtype {tensor.dtype}", why="only BF16, FP16 and FP32 weights become FP8")
    if len(tensor.shape) != dimensions or tensor.numel == 0:
        return replace(kept, rule=f"shape {list(tensor.shape)}", why=f"not the weight of a {decision.kind}")
    if tensor.numel % 4:
        return replace(kept, rule="element count no multiple of 4", why="its scale would not be aligned")
    block = decision.block
    if block and decision.mode == rules.mode and rules.unaligned == "keep":
        unaligned = any(size % edge for size, edge in zip(tensor.shape, block, strict=True))
        if unaligned:
            why = "other readers infer the block size from the shape and would misread edge blocks"
            return replace(kept, rule=f"no multiple of {block[0]}x{block[1]}", why=why)
    return decision


def _make_groups_whole(
    decided: list[PlannedTensor], groups: Sequence[FusionGroup], user_patterns: Sequence[str]
) -> tuple[list[PlannedTensor], list[str]]:
    """Give fusion group members one group name, and keep them all where one is kept."""
    members: dict[str, list[int]] = {}
    for position, tensor in enumerate(decided):
        if (name := group_of(tensor, groups)) is not None:
            members.setdefault(name, []).append(position)
    taken_along: Counter[str] = Counter()
    for name, positions in members.items():
        kept = [decided[p] for p in positions if not decided[p].decision.fp8]
        for p in positions:
            tensor = decided[p]
            if not kept:
                if tensor.decision.per_tensor and len(positions) > 1:
                    decided[p] = PlannedTensor(tensor.info, replace(tensor.decision, group=name))
            elif tensor.decision.fp8:
                cause = kept[0]
                why = f"shares a scale with {cause.module}, which is kept"
                decided[p] = PlannedTensor(tensor.info, Decision(cause.decision.rule, why, tensor.decision.kind))
                if cause.decision.rule in user_patterns:
                    taken_along[cause.decision.rule] += 1
    notes = [
        f"the ignored layer {pattern!r} names one member of a fused projection; {count} other weights stay with it"
        for pattern, count in taken_along.items()
    ]
    return decided, notes


def group_of(tensor: PlannedTensor, groups: Sequence[FusionGroup]) -> str | None:
    """`parent.(a|b|c)` for a member of a fusion group."""
    if tensor.decision.kind is None or not tensor.info.name.endswith(WEIGHT):
        return None
    parent, _, member = tensor.module.rpartition(".")
    for group in groups:
        if member in group.members and matches(group.parent, parent):
            return f"{parent}.({'|'.join(group.members)})"
    return None
