"""How much of a snapshot becomes FP8 and what keeps the rest: notes, and the refusal to convert next to nothing.

What a manifest keeps by a rule of its own, with evidence, is no news. What it keeps because no rule speaks of it is.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence

from ..format.layout import WEIGHT
from ..snapshot.snapshot import Component, Snapshot
from .decide import EXPERTS, PlannedTensor
from .manifest import ComponentRules, Manifest

LEAST_LINEARS = 0.1  # of a DiT's linear parameters: below that the manifest is not made for it
FEW_LINEARS = 0.3  # below that a note says so; without img_mlp Qwen-Image has 44%, Qwen-Image-2.1 30.2%
MUCH = 0.05  # of the bytes: what stays without a rule, or a component that no table names

_WORTH_NAMING = 0.05  # of what stays: the smallest reason that is given


def too_little(
    label: str, tensors: Sequence[PlannedTensor], rules: ComponentRules, user_patterns: Collection[str], manifest: str
) -> str | None:
    """Why a DiT of which next to nothing becomes FP8 is refused, None for one that is not."""
    kept = _kept(tensors, user_patterns)
    share = _share_of_linears(tensors, kept) if rules.runs_in_fp8 else 1.0
    if share >= LEAST_LINEARS:
        return None
    return (
        f"Only {_percent(share)} of the linear parameters of {label} would become FP8 with the manifest "
        f"{manifest}: {reasons(kept)}; pass the manifest of its family (`fp8-convert manifests` lists them) or a "
        "copy that names its layers, or leave it out with --component."
    )


def kept_note(
    label: str, tensors: Sequence[PlannedTensor], rules: ComponentRules, user_patterns: Collection[str]
) -> str | None:
    """What stays of a component and why, where that is unusual. What the user's own patterns keep is not counted."""
    kept = _kept(tensors, user_patterns)
    share = _share_of_linears(tensors, kept) if rules.runs_in_fp8 else 1.0
    if not any(t.decision.fp8 for t in tensors):
        return None if rules.runs_in_fp8 else f"{label} stays as it is: {reasons(kept)}"  # a DiT's user asked for it
    total, kept_bytes, unruled = _bytes_of(tensors), _bytes_of(kept), _bytes_of(_unruled(kept, rules))
    if share >= FEW_LINEARS and unruled < MUCH * total:
        return None
    linears = f", and {_percent(share)} of its linear parameters become FP8" if rules.runs_in_fp8 else ""
    return f"{_size(kept_bytes)} of {label} ({_percent(kept_bytes / total)}) stay as they are{linears}: {reasons(kept)}"


def integer_note(label: str, tensors: Iterable[PlannedTensor]) -> str | None:
    """Weights of linears that hold integers: they are copied, and no class computes with them as they are."""
    found = [
        t
        for t in tensors
        if t.decision.kind == "Linear" and t.info.name.endswith(WEIGHT) and not t.info.dtype.startswith(("F", "BF"))
    ]
    if not found:
        return None
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{found[0].info.name}{more} of {label} has the integer dtype {found[0].info.dtype} and stays as it is; a "
        "linear layer cannot be loaded with such a weight"
    )


def unnamed_notes(snapshot: Snapshot, manifest: Manifest) -> list[str]:
    """Large components that no table of the manifest speaks of: a UNet, say, whose text encoders become FP8."""
    sizes = {c.name: sum(t.nbytes for t in c.tensors) for c in snapshot.components}
    total = sum(sizes.values())
    return [
        f"{c.label} ({c.class_name}, {_size(sizes[c.name])}, {_percent(sizes[c.name] / total)} of the weights) stays "
        f"as it is: {why_unnamed(c, manifest)}"
        for c in snapshot.components
        if sizes[c.name] > MUCH * total and manifest.rules_for(c.name, c.class_name) is None
    ]


def why_unnamed(component: Component, manifest: Manifest) -> str:
    """Why no table of the manifest applies to the component."""
    for table in manifest.components:
        if fnmatch.fnmatchcase(component.name, table.component):
            classes = " or ".join(table.classes)
            return f"the manifest {manifest.name} has rules for {table.component} of the class {classes}"
    return f"no table of the manifest {manifest.name} names it"


def nothing_converted(
    snapshot: Snapshot,
    manifest: Manifest,
    chosen: Mapping[str, ComponentRules | None],
    decisions: Mapping[str, Mapping[str, PlannedTensor]],
    problems: Mapping[str, str],
    user_patterns: Collection[str],
) -> str:
    """The refusal of a plan without any FP8 weight: why, component by component, and what to do."""
    said, asked = [], False
    for component in snapshot.components:
        rules = chosen[component.name]
        if component.name in problems:
            said.append(f"{component.label}: {problems[component.name]}")
        elif rules is not None:
            tensors = decisions[component.name].values()
            asked = asked or any(t.decision.rule in user_patterns for t in tensors)
            said.append(f"{component.label}: {reasons(tensors)}")
    if not said:
        said = [f"it converts none of {', '.join(c.label for c in snapshot.components)}"]
    advice = "pass --manifest with one that names its layers"
    if problems:
        advice = "upgrade diffusers or transformers if a newer version has the class"
    elif asked:
        advice = "drop some of the ignored layers"
    why = "; ".join(said)
    return f"Nothing in {snapshot.label} becomes FP8 with the manifest {manifest.name} ({why}); {advice}."


def reasons(tensors: Iterable[PlannedTensor]) -> str:
    """The rules that keep the most bytes, embeddings aside where there is anything else."""
    kept = [t for t in tensors if not t.decision.fp8]
    layers = [t for t in kept if t.decision.kind != "Embedding"]
    by_rule: dict[str, list[PlannedTensor]] = {}
    for tensor in layers or kept:
        by_rule.setdefault(tensor.decision.rule, []).append(tensor)
    if not by_rule:
        return "it has no weights"
    groups = sorted(by_rule.items(), key=lambda item: -_bytes_of(item[1]))
    least = _WORTH_NAMING * sum(_bytes_of(group) for _, group in groups)
    return ", ".join(_reason(*group) for n, group in enumerate(groups) if n == 0 or _bytes_of(group[1]) >= least)


def _kept(tensors: Iterable[PlannedTensor], user_patterns: Collection[str]) -> list[PlannedTensor]:
    return [t for t in tensors if not t.decision.fp8 and t.decision.rule not in user_patterns]


def _reason(rule: str, tensors: Sequence[PlannedTensor]) -> str:
    count = f"{len(tensors)} tensors" if len(tensors) > 1 else "1 tensor"
    more = "; they are loaded into 3-D parameters, which no FP8 layer holds yet" if rule == EXPERTS.rule else ""
    return f"{rule} ({count}, {_size(_bytes_of(tensors))}, such as {tensors[0].module}{more})"


def _share_of_linears(tensors: Sequence[PlannedTensor], kept: Iterable[PlannedTensor]) -> float:
    """The part of the linear layers' parameters that is not `kept`; of all tensors where there are no such layers."""
    linears = [t for t in tensors if t.decision.kind == "Linear"] or tensors
    total = sum(t.info.numel for t in linears)
    left = sum(t.info.numel for t in kept if t.decision.kind == "Linear" or linears is tensors)
    return 1 - left / total if total else 0.0


def _unruled(kept: Iterable[PlannedTensor], rules: ComponentRules) -> list[PlannedTensor]:
    """Kept tensors that no rule speaks of: the manifest's, the class's, the format's. Embeddings are never FP8."""
    written = (*rules.never_layers, *rules.ignored_layers)
    return [
        t
        for t in kept
        if t.decision.rule != "_keep_in_fp32_modules"
        and t.decision.kind != "Embedding"
        and "no multiple of" not in t.decision.rule
        and rules.rule_for(written, t.module) is None
    ]


def _bytes_of(tensors: Iterable[PlannedTensor]) -> int:
    return sum(t.info.nbytes for t in tensors)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
