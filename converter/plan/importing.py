"""The plan of an import: codes that another tool made keep their bytes, scales take this project's names and shapes.

Nothing is quantised. The manifest says how a weight is run: those that it makes eligible in its own mode, the others
stored in FP8. What no layer can hold in FP8, such as biases and norms of bare casts, is made BF16 again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..format import layout
from ..format.header import TensorInfo
from ..format.layout import STORAGE, W8A8, WEIGHT, WeightFormat
from ..snapshot.given_scale import GivenScale
from ..snapshot.modules import ModuleMap, module_map
from ..snapshot.snapshot import Component, Snapshot
from ..targets.adopting import Adopted
from ..telling.errors import ConvertError
from ..telling.notebook import Brief
from ..telling.quantities import plural
from .component import plan_component
from .decide import Decision, PlannedTensor, group_of, keep_all
from .manifest import ComponentRules, Manifest
from .plan import ComponentPlan, Imported, Plan
from .planning import json_files, left_out_notes
from .recipe import Recipe
from .schedule import MEMORY

_DIMENSIONS = {"Linear": 2, "Conv2d": 4, "Conv3d": 5}
# Other tools' descriptions of the whole snapshot, which readers would believe.
_OTHERS_CONFIGS = ("hf_quant_config.json",)


@dataclass(frozen=True, repr=False)
class _Decided(Brief):
    """One component's decisions by tensor, and what the user should know of them."""

    tensors: Mapping[str, PlannedTensor]
    rules: ComponentRules
    modules: ModuleMap
    imported: Imported
    notes: tuple[str, ...]


def plan_import(snapshot: Snapshot, adopted: Mapping[str, Adopted], recipe: Recipe) -> Plan:
    """Plan an import. adopted: the components of `snapshot` whose FP8 tensors are taken over, by name.

    The other components are copied. Raises ConvertError for what cannot be loaded as it is.
    """
    decided = {name: _decide(found, recipe.manifest) for name, found in adopted.items()}
    if not any(t.decision.fp8 for d in decided.values() for t in d.tensors.values()):
        raise ConvertError(f"{snapshot.label} has no FP8 weights of layers that can hold them: nothing to import.")
    static, notes = _activations(decided)
    decided = {name: _with_activations(d, static) for name, d in decided.items()}
    recipe = replace(recipe, activation_scheme="static" if static else "dynamic")
    components = tuple(_component(c, decided.get(c.name), recipe, snapshot.components) for c in snapshot.components)
    files = json_files(components)
    others = [path for path in snapshot.sidecars if path.rpartition("/")[2] in _OTHERS_CONFIGS]
    left_out = {*files, *others, layout.RECORD_FILE}
    notes = [
        *snapshot.remarks,
        *left_out_notes(snapshot.left_out),
        *(note for d in decided.values() for note in d.notes),
        *notes,
        *(f"{path} is left out: it describes the weights as they were" for path in others),
    ]
    sidecars = {path: size for path, size in snapshot.sidecars.items() if path not in left_out}
    return Plan(snapshot, recipe, components, files, sidecars, tuple(notes))


def _component(
    component: Component, decided: _Decided | None, recipe: Recipe, components: Sequence[Component]
) -> ComponentPlan:
    if decided is None:
        kept = keep_all(component.tensors, "component", "not imported: copied as it is")
        return plan_component(component, None, {t.info.name: t for t in kept}, recipe, None, MEMORY, components)
    planned = plan_component(component, decided.rules, decided.tensors, recipe, decided.modules, MEMORY, components)
    config = planned.config
    if config is None and layout.CONFIG_KEY in component.config:  # that of the other tool
        config = {key: value for key, value in component.config.items() if key != layout.CONFIG_KEY}
    return replace(planned, config=config, imported=decided.imported)


# One component's weights


def _decide(found: Adopted, manifest: Manifest) -> _Decided:
    component = found.component
    rules = _rules(component, manifest)
    modules = module_map(component, found.dropped)
    if problem := modules.problem or modules.misfit:
        raise ConvertError(f"{component.label} cannot be imported: {problem}.")
    decided = [PlannedTensor(t, _decide_one(t, found, rules, modules)) for t in component.tensors]
    decided, unequal = _with_groups(decided, rules)
    notes = _notes(found, component.label, decided, unequal)
    imported = Imported(found.label, tuple(unequal))
    return _Decided({t.info.name: t for t in decided}, rules, modules, imported, tuple(notes))


def _rules(component: Component, manifest: Manifest) -> ComponentRules:
    """The manifest's rules; where it has none, those of a component whose weights are stored."""
    rules = manifest.rules_for(component.name, component.class_name)
    if rules is not None and rules.mode != "keep":
        return rules
    return ComponentRules(component.name or "*", STORAGE, kinds=tuple(_DIMENSIONS))


def _decide_one(tensor: TensorInfo, found: Adopted, rules: ComponentRules, modules: ModuleMap) -> Decision:
    if (why := found.dropped.get(tensor.name)) is not None:
        return Decision("left out", why, dropped=True)
    module = tensor.name.removesuffix(WEIGHT)
    kind = modules.kinds.get(module) if tensor.name.endswith(WEIGHT) else None
    scale = found.scales.get(tensor.name)
    if scale is None:
        return Decision("imported", f"not FP8 in the layout {found.label}", kind)
    how = WeightFormat(_mode(module, kind, scale, rules), scale.block, scale.channel)
    problem = _unfit(tensor, kind, scale)
    if problem is None and module in modules.keep_fp32:
        problem = "the component's class keeps it in float32"
    if problem is None:
        why = "its codes are the values, with a scale of 1" if scale.bare else "codes and scale of the source"
        return Decision("imported", f"{why}, layout {found.label}", kind, how, given=scale)
    if scale.values.ndim:
        raise ConvertError(
            f"{tensor.name} of {found.component.label} has FP8 codes with scales of rows or blocks, but {problem}; "
            "this checkpoint cannot be imported."
        )
    return Decision("imported as BF16", problem, kind, given=scale)


def _mode(module: str, kind: str | None, scale: GivenScale, rules: ComponentRules) -> str:
    """How an FP8 weight is run: as the source says, where it does; else as the manifest runs what it converts."""
    if scale.mode is not None:
        return scale.mode
    kept = rules.rule_for(rules.never_layers, module) or rules.rule_for(rules.ignored_layers, module)
    if kind != "Linear" or kept or not rules.rule_for(rules.eligible, module):
        return STORAGE
    return rules.mode


def _unfit(tensor: TensorInfo, kind: str | None, scale: GivenScale) -> str | None:
    """Why no layer holds the tensor in FP8, None if one does."""
    if kind not in _DIMENSIONS:
        return f"an FP8 {kind} cannot be loaded" if kind else "only weights of linears and convolutions are held in FP8"
    if len(tensor.shape) != _DIMENSIONS[kind] or tensor.numel == 0:
        return f"its shape {list(tensor.shape)} is not that of a {kind}"
    return "its element count is no multiple of 4, so its scale would not be aligned" if tensor.numel % 4 else None


def _with_groups(
    decided: Sequence[PlannedTensor], rules: ComponentRules
) -> tuple[list[PlannedTensor], list[tuple[str, ...]]]:
    """The decisions with the names of fusion groups whose members share a scale, and the groups whose do not."""
    groups: dict[str, list[int]] = {}
    for position, tensor in enumerate(decided):
        if (name := group_of(tensor, rules.fusion_groups)) is not None:
            groups.setdefault(name, []).append(position)
    result, unequal = list(decided), []
    for name, positions in groups.items():
        members = [decided[p] for p in positions]
        if len(members) < 2 or not any(t.decision.fp8 for t in members):
            continue
        first = members[0].decision
        if any(t.decision.format != first.format for t in members) or not _share(members):
            unequal.append(tuple(sorted(t.module for t in members)))
        elif first.per_tensor:
            for p in positions:
                result[p] = replace(decided[p], decision=replace(decided[p].decision, group=name))
    return result, sorted(unequal)


def _share(members: Iterable[PlannedTensor]) -> bool:
    """Whether per-tensor scales are one; those of rows and blocks stay apart when weights are fused."""
    scales = {float(s.values) for t in members if (s := t.decision.given) is not None and s.values.ndim == 0}
    return len(scales) <= 1


# Activations


def _activations(decided: Mapping[str, _Decided]) -> tuple[bool, list[str]]:
    """Whether activations are static: every W8A8 weight has one scale and one for its input. And what is not used."""
    fp8 = [t.decision for d in decided.values() for t in d.tensors.values() if t.decision.fp8]
    static = all(_has_input_scale(d) and d.per_tensor for d in fp8 if d.mode == W8A8)
    static = static and any(d.mode == W8A8 for d in fp8)
    unused = sum(_has_input_scale(d) and not (static and d.mode == W8A8) for d in fp8)
    if not unused:
        return static, []
    why = "of layers whose activations are not quantised" if static else "not every W8A8 layer has one: dynamic"
    return static, [f"{plural(unused, 'input scale')} of the source {'is' if unused == 1 else 'are'} left out ({why})"]


def _has_input_scale(decision: Decision) -> bool:
    return decision.given is not None and decision.given.input_scale is not None


def _with_activations(decided: _Decided, static: bool) -> _Decided:
    def scaled(tensor: PlannedTensor) -> PlannedTensor:
        d = tensor.decision
        if not static or d.mode != W8A8 or d.given is None:
            return tensor
        return replace(tensor, decision=replace(d, input_scale=d.given.input_scale))

    return replace(decided, tensors={name: scaled(t) for name, t in decided.tensors.items()})


# What the user should know


def _notes(
    found: Adopted, label: str, decided: Sequence[PlannedTensor], unequal: Sequence[tuple[str, ...]]
) -> list[str]:
    fp8 = [t for t in decided if t.decision.fp8]
    notes = [f"{label}: {plural(len(fp8), 'FP8 weight')} imported from the layout {found.label}"]
    checks: list[tuple[Callable[[PlannedTensor], bool], str]] = [
        (
            lambda t: t.decision.given is not None and t.decision.given.bare,
            "have NO SCALE in the source: their codes are taken for the values, with a scale of 1",
        ),
        (
            lambda t: t.decision.given is not None and not t.decision.fp8,
            "are FP8 in the source and are made BF16, since no layer holds them in FP8",
        ),
        (
            lambda t: t.decision.dropped and "another component" in t.decision.why,
            "belong to another component and are left out",
        ),
    ]
    for is_one, words in checks:
        if names := [t.info.name for t in decided if is_one(t)]:
            notes.append(f"{label}: {plural(len(names), 'tensor')} {words}, such as {names[0]}")
    notes += [f"{label}: {note}" for note in found.notes]
    if unequal:
        count = plural(len(unequal), "group")
        groups = "; ".join(", ".join(group) for group in unequal[:3]) + ("; …" if len(unequal) > 3 else "")
        notes.append(
            f"{label}: {count} of weights that some runtimes fuse differ in scale; such a runtime would quantise "
            f"them again ({groups})"
        )
    return notes
