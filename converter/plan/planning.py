"""The making of a plan, from headers alone: every tensor's decision, every output shard, every byte counted.

Pure: a described snapshot and a recipe in, a frozen `Plan` out. What can be wrong with the input is found here, before
anything is downloaded or written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..format import layout
from ..snapshot.modules import ModuleMap, module_map
from ..snapshot.snapshot import CONFIG, MODEL_INDEX, Component, LeftOut, Snapshot
from ..targets.target import NATIVE
from ..telling.errors import ConvertError
from ..telling.printable import printable
from ..telling.quantities import byte_count
from .component import encode_index, plan_component
from .coverage import integer_note, kept_note, nothing_converted, too_little, unnamed_notes, why_unnamed
from .decide import STORAGE_FORMAT, PlannedTensor, check_patterns, decide, expand_aliases, keep_all
from .manifest import ComponentRules, Rule
from .matching import Match, components_of, match_entries, match_tables, refuse_problems, why_unmatched
from .merges import with_merges
from .plan import ComponentPlan, Plan
from .recipe import Recipe
from .refused import PlanRefusedError
from .schedule import MEMORY, Memory
from .single_files import single_files
from .static import with_input_scales
from .unquantized import check_unquantized

_MOST_NOTES = 4  # on files that are left out for one reason


def make_plan(snapshot: Snapshot, recipe: Recipe, memory: Memory = MEMORY) -> Plan:
    """Decide every tensor of the snapshot and lay out every output file.

    Raises ConvertError for what cannot be, and PlanRefusedError, with the plan, for what would convert next to nothing.
    memory: what the conversion of a shard may take; the order of an output's tensors follows from it.
    """
    refuse_problems(recipe.manifest, match_tables(recipe.manifest, snapshot))
    chosen = {c.name: _rules_of(c, recipe, snapshot.components) for c in snapshot.components}
    _check_components(snapshot, recipe, chosen)
    converted = [name for name, rules in chosen.items() if rules is not None]
    if problem := recipe.reader.snapshot_problem(snapshot.components, converted):
        raise ConvertError(problem)
    maps = {c.name: module_map(c) for c in snapshot.components if chosen[c.name] is not None}
    _check_entries(snapshot, recipe, maps)
    decisions, notes, problems = _decide_all(snapshot, recipe, chosen, maps)
    refusal = _refusal(snapshot, recipe, chosen, decisions, problems)
    notes += _coverage_notes(snapshot, recipe, chosen, decisions, problems)
    if refusal is None:
        decisions, unused = with_input_scales(decisions, recipe)
        notes += unused
    if refusal is None and recipe.loras:
        decisions, merged = with_merges(decisions, snapshot, recipe, [n for n, rules in chosen.items() if rules])
        notes += merged
    components = tuple(
        plan_component(c, chosen[c.name], decisions[c.name], recipe, maps.get(c.name), memory, snapshot.components)
        for c in snapshot.components
    )
    notes += [*_compact_notes(recipe, components), *recipe.reader.notes(snapshot.components)]
    if recipe.reader.single_files:
        plan = single_files(snapshot, recipe, components, notes)
    else:
        files = json_files(components)
        notes = [*snapshot.remarks, *left_out_notes(snapshot.left_out), *notes]
        sidecars = {path: size for path, size in snapshot.sidecars.items() if path not in files}
        plan = Plan(snapshot, recipe, components, files, sidecars, tuple(notes))
    if refusal is not None:
        raise PlanRefusedError(refusal, plan)
    return plan


def json_files(components: Iterable[ComponentPlan]) -> dict[str, bytes]:
    """The configs and indices to write."""
    files = {}
    for component in components:
        if component.config is not None:
            files[component.source.path(CONFIG)] = layout.encode_json(component.config)
        if sum(len(shard.files) for shard in component.shards) > 1:
            files[component.source.path(layout.index_name(component.source.stem))] = encode_index(component)
    return files


def _compact_notes(recipe: Recipe, components: Iterable[ComponentPlan]) -> list[str]:
    dits = [c for c in components if c.rules is not None and c.rules.runs_in_fp8]
    if not recipe.compact or any(t.decision.mode == layout.STORAGE for c in dits for t in c.tensors):
        return []
    return ["--compact changes nothing here: no DiT layer that is converted has an FP8 storage rule"]


def left_out_notes(left_out: Iterable[LeftOut]) -> list[str]:
    """What is not carried over and why, in a few lines however many folders there are."""
    by_reason: dict[str, list[LeftOut]] = defaultdict(list)
    for item in left_out:
        by_reason[item.reason].append(item)
    notes = []
    for reason, items in by_reason.items():
        shown, rest = (items, []) if len(items) <= _MOST_NOTES else (items[: _MOST_NOTES - 1], items[_MOST_NOTES - 1 :])
        for item in shown:
            path = printable(item.path)
            if item.files == 1:
                notes.append(f"{path} ({byte_count(item.bytes)}) is left out: {reason}")
            else:
                place = f"beside {MODEL_INDEX}" if path == "./" else f"in {path}"
                notes.append(f"{item.files} files {place} ({byte_count(item.bytes)}) are left out: {reason}")
        if rest:
            count, size = sum(item.files for item in rest), byte_count(sum(item.bytes for item in rest))
            notes.append(f"{count} files in {len(rest)} other places ({size}) are left out: {reason}")
    return notes


def _rules_of(component: Component, recipe: Recipe, components: Sequence[Component]) -> ComponentRules | None:
    """The manifest's rules for a component that is to be converted, None for one that is only copied."""
    rules = recipe.manifest.rules_for(component.name, component.class_name)
    selected = not recipe.components or component.name in recipe.components
    wanted = selected and recipe.reader.why_kept(component, components) is None
    if rules is None or rules.mode == "keep" or not wanted:
        return None
    kept = tuple(Rule(pattern, why) for pattern, why in recipe.reader.kept_layers(component))
    return replace(rules, never_layers=(*kept, *rules.never_layers))


def _check_components(snapshot: Snapshot, recipe: Recipe, chosen: Mapping[str, ComponentRules | None]) -> None:
    names = [c.name for c in snapshot.components]
    for name in recipe.components:
        if name not in names:
            raise ConvertError(f"{snapshot.label} has no component {name!r} with weights; it has {', '.join(names)}.")
        component = next(c for c in snapshot.components if c.name == name)
        if why := recipe.reader.why_kept(component, snapshot.components):
            raise ConvertError(f"--target {recipe.target} keeps {name}: {why}; drop --component {name}.")
        if chosen[name] is None:
            raise ConvertError(
                f"The manifest {recipe.manifest.name} does not convert {name}; drop --component {name} or pass another "
                "--manifest."
            )
    for component in snapshot.components:
        if (rules := chosen[component.name]) is None:
            continue
        check_unquantized(component, snapshot.label)
        if rules.weight_scales == layout.SCHEME_CHANNEL and recipe.reader is not NATIVE:
            raise ConvertError(
                f"The manifest {recipe.manifest.name} gives {component.label} a scale for each row, which nothing but "
                f"fp8-convert's loader reads; drop --target {recipe.target} or pass another --manifest."
            )
    has_dit = any(rules is not None and rules.runs_in_fp8 for rules in chosen.values())
    for given, option in (
        (recipe.ignored_layers, "--ignored-layers"),
        (recipe.block, "--weight-block-size"),
        (recipe.input_scales, "--input-scales"),
    ):
        if given and not has_dit:
            raise ConvertError(f"{option} applies to the DiT, and none is converted here; drop the option.")


def _check_entries(snapshot: Snapshot, recipe: Recipe, maps: Mapping[str, ModuleMap]) -> None:
    """Refuse a manifest with an entry that matches nothing in the components that are converted, `maps`.

    What a table says may be meant for others of its components: those are asked before it is refused.
    """
    manifest = recipe.manifest
    if manifest.optional:
        return
    for table in manifest.components:
        components = components_of(manifest, table, snapshot)
        selected = [c for c in components if c.name in maps]
        if selected and any(m.problem for m in _matches_in(selected, table, recipe, maps)):
            refuse_problems(manifest, _matches_in(components, table, recipe, maps))


def _matches_in(
    components: Sequence[Component], table: ComponentRules, recipe: Recipe, maps: Mapping[str, ModuleMap]
) -> list[Match]:
    """What the table's entries match in the components; empty where that cannot be said of one of them."""
    known = [maps.get(c.name) or module_map(c) for c in components]
    if any(why_unmatched(c, m) for c, m in zip(components, known, strict=True)):
        return []
    return match_entries(recipe.manifest, table, components, known)


def _decide_all(
    snapshot: Snapshot,
    recipe: Recipe,
    chosen: Mapping[str, ComponentRules | None],
    maps: Mapping[str, ModuleMap],
) -> tuple[dict[str, dict[str, PlannedTensor]], list[str], dict[str, str]]:
    """Decisions by component and tensor name, notes for the user, and why classes could not be built."""
    decisions: dict[str, dict[str, PlannedTensor]] = {}
    notes: list[str] = []
    problems: dict[str, str] = {}
    layers: list[str] = []
    groups = [g for r in chosen.values() if r is not None and r.runs_in_fp8 for g in r.fusion_groups]
    for component in snapshot.components:
        rules = chosen[component.name]
        tensors = list(component.tensors)
        if rules is None:
            decided = keep_all(tensors, "component", _why_kept(component, recipe, snapshot.components))
        else:
            modules = maps[component.name]
            if modules.problem:
                problems[component.name] = modules.problem
                notes.append(f"{component.label} stays as it is: {modules.problem}")
            if rules.runs_in_fp8 and recipe.block and rules.weight_scales != layout.SCHEME_TENSOR:
                notes.append(
                    f"--weight-block-size takes the place of the manifest's {rules.weight_scales} scales in "
                    f"{component.label}"
                )
            if rules.runs_in_fp8:
                layers += [name for name, kind in modules.kinds.items() if kind in rules.kinds]
            decided, said = decide(
                tensors,
                rules,
                modules,
                user_patterns=expand_aliases(recipe.ignored_layers, rules.fusion_groups) if rules.runs_in_fp8 else (),
                compact=recipe.compact,
                block=recipe.reader.block(
                    component, (recipe.block if rules.runs_in_fp8 else None) or rules.weight_block_size
                ),
                storage=replace(STORAGE_FORMAT, block=recipe.reader.block(component, STORAGE_FORMAT.block)),
            )
            notes += said
        decisions[component.name] = {t.info.name: t for t in decided}
    if not any(name in problems for name, rules in chosen.items() if rules is not None and rules.runs_in_fp8):
        check_patterns(recipe.ignored_layers, groups, layers)
    return decisions, list(dict.fromkeys(notes)), problems


def _refusal(
    snapshot: Snapshot,
    recipe: Recipe,
    chosen: Mapping[str, ComponentRules | None],
    decisions: Mapping[str, Mapping[str, PlannedTensor]],
    problems: Mapping[str, str],
) -> str | None:
    """Why a plan that converts nothing, or next to nothing of a DiT, is refused; None for any other."""
    asked = _user_patterns(recipe, chosen)
    if not any(t.decision.fp8 for tensors in decisions.values() for t in tensors.values()):
        return nothing_converted(snapshot, recipe.manifest, chosen, decisions, problems, asked)
    for component in snapshot.components:
        rules, tensors = chosen[component.name], list(decisions[component.name].values())
        if rules is not None and component.name not in problems:
            found = too_little(component.label, tensors, rules, asked, recipe.manifest.name)
            if found is not None:
                return found
    return None


def _coverage_notes(
    snapshot: Snapshot,
    recipe: Recipe,
    chosen: Mapping[str, ComponentRules | None],
    decisions: Mapping[str, Mapping[str, PlannedTensor]],
    problems: Mapping[str, str],
) -> list[str]:
    """What stays as it is and might surprise."""
    asked = _user_patterns(recipe, chosen)
    notes = [] if recipe.components else unnamed_notes(snapshot, recipe.manifest)
    for component in snapshot.components:
        rules = chosen[component.name]
        if rules is None or component.name in problems:
            continue
        tensors = list(decisions[component.name].values())
        kept = kept_note(component.label, tensors, rules, asked)
        notes += filter(None, [kept, integer_note(component.label, tensors)])
    return notes


def _user_patterns(recipe: Recipe, chosen: Mapping[str, ComponentRules | None]) -> set[str]:
    """The user's ignored layers as decisions name them, aliases expanded."""
    groups = [g for rules in chosen.values() if rules is not None and rules.runs_in_fp8 for g in rules.fusion_groups]
    return set(expand_aliases(recipe.ignored_layers, groups))


def _why_kept(component: Component, recipe: Recipe, components: Sequence[Component]) -> str:
    if recipe.components and component.name not in recipe.components:
        return "not among the components asked for"
    rules = recipe.manifest.rules_for(component.name, component.class_name)
    if rules is None:
        return why_unnamed(component, recipe.manifest)
    if rules.mode != "keep" and (why := recipe.reader.why_kept(component, components)):
        return why
    return rules.why or f"the manifest {recipe.manifest.name} does not convert it"
