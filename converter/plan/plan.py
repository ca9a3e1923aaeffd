"""The plan of a conversion, from headers alone: every tensor's decision, every output shard, every byte counted.

Pure: a described snapshot and a recipe in, frozen data out. What can be wrong with the input is found here, before
anything is downloaded or written.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..format import layout
from ..format.header import PREFIX_BYTES
from ..snapshot.modules import ModuleMap, module_map
from ..snapshot.source import CONFIG, MODEL_INDEX, Component, LeftOut, Shard, Snapshot
from ..telling.errors import ConvertError
from ..telling.notebook import Brief, html_table, one_line
from ..telling.quantities import byte_count, change, plural
from .coverage import kept_note, nothing_converted, unnamed_notes, why_unnamed
from .decide import STORAGE_FORMAT, PlannedTensor, check_patterns, decide, expand_aliases, is_dit, keep_all
from .manifest import ComponentRules
from .matching import Match, components_of, match_entries, match_tables, refuse_problems, why_unmatched
from .recipe import Recipe
from .schedule import Schedule, make_schedule, scale_domain
from .sharding import OutputFile, cut_into_files

_MOST_NOTES = 4  # on files that are left out for one reason
_QUANTIZED_DTYPES = {
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
}
_QUANTIZED_SUFFIXES = (
    ".weight_scale", ".weight_scale_inv", ".scale_weight", ".comfy_quant", ".qweight", ".qzeros", ".SCB",
    ".weight_packed", ".input_scale", ".quant_map", ".weight_format",
)  # fmt: skip

_MOST_FILES = 99_999  # as many as their names can number


@dataclass(frozen=True, repr=False)
class ShardPlan(Brief):
    """One source shard and the output files that it becomes, mostly one. Without FP8 weights it is `copied`."""

    component: str
    source: Shard
    files: tuple[OutputFile, ...]
    tensors: tuple[PlannedTensor, ...]
    schedule: Schedule

    @property
    def copied(self) -> bool:
        return not any(t.decision.fp8 for t in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the output files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, repr=False)
class ComponentPlan(Brief):
    """One component: its decisions and what is written for it. `rules` is None where nothing is converted."""

    source: Component
    rules: ComponentRules | None
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any] | None
    problem: str | None

    @property
    def tensors(self) -> Iterable[PlannedTensor]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Bytes of all tensors before and after, scales included."""
        before = sum(t.nbytes for t in self.source.tensors)
        return before, sum(s.schedule.outputs[-1].end for s in self.shards if s.schedule.outputs)


@dataclass(frozen=True, repr=False)
class Plan:
    """A whole conversion. `files` holds the JSON files to write, `sidecars` those to copy."""

    snapshot: Snapshot
    recipe: Recipe
    components: tuple[ComponentPlan, ...]
    files: Mapping[str, bytes]
    sidecars: tuple[str, ...]
    notes: tuple[str, ...]
    input_scales: Mapping[str, float]

    def __repr__(self) -> str:
        converted = sum(t.decision.fp8 for c in self.components for t in c.tensors)
        return one_line(self, f"{self.title}: {self.sizes}, {plural(converted, 'FP8 weight')}")

    def _repr_html_(self) -> str:
        return plan_html(self, f"{self.title}: {self.sizes}")

    @property
    def title(self) -> str:
        """What is converted, and by which manifest."""
        commit = f" @ {self.snapshot.commit[:12]}" if self.snapshot.commit else ""
        pipeline = f" ({self.snapshot.pipeline})" if self.snapshot.pipeline else ""
        return f"{self.snapshot.label}{commit}{pipeline}, manifest {self.recipe.manifest.name}"

    @property
    def sizes(self) -> str:
        """What becomes of the weights' files, in words."""
        return change(self.bytes_to_read, sum(s.size for s in self.shards))

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        return tuple(shard for component in self.components for shard in component.shards)

    @property
    def weight_files(self) -> tuple[OutputFile, ...]:
        """The output's safetensors files."""
        return tuple(file for shard in self.shards for file in shard.files)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file of the output but the record."""
        return (*(file.path for file in self.weight_files), *self.files, *self.sidecars)

    @cached_property
    def bytes_to_write(self) -> int:
        """Size of the whole output but for the record."""
        copied = sum(self.snapshot.files.sizes()[p] for p in self.sidecars)
        return sum(s.size for s in self.shards) + sum(len(f) for f in self.files.values()) + copied

    @cached_property
    def bytes_to_read(self) -> int:
        """Bytes of all source shards."""
        return sum(s.source.size for s in self.shards)

    @cached_property
    def bytes_read_twice(self) -> int:
        """Bytes of weights that are measured first, because their fusion group does not fit the window."""
        return sum(t.info.nbytes for s in self.shards for t in s.tensors if scale_domain(t) in s.schedule.measured)

    @cached_property
    def compact_saves(self) -> int:
        """Bytes that --compact would save beyond this plan: ignored DiT layers that the manifest has storage for."""
        if self.recipe.compact:
            return 0
        return sum(
            t.info.nbytes - t.info.numel - _scale_bytes(t.info.shape, STORAGE_FORMAT)
            for c in self.components
            if c.rules is not None and is_dit(c.rules)
            for t in c.tensors
            if t.decision.kind == "Linear"
            and t.decision.rule in {rule.pattern for rule in c.rules.ignored_layers} - {*self.recipe.ignored_layers}
            and c.rules.rule_for(c.rules.storage_layers, t.module)
        )

    def to_json(self) -> dict[str, Any]:
        """The plan for scripts: every tensor with its decision, and the sums."""
        return {
            "source": self.snapshot.label,
            "commit": self.snapshot.commit,
            "pipeline": self.snapshot.pipeline,
            "recipe": self.recipe.to_json(),
            "notes": list(self.notes),
            "bytes_to_write": self.bytes_to_write,
            "bytes_to_read": self.bytes_to_read,
            "bytes_read_twice": self.bytes_read_twice,
            "components": [_component_json(c) for c in self.components],
        }


@dataclass(frozen=True, repr=False)
class Row(Brief):
    """Tensors of one component that share a decision: what tables and records show."""

    mode: str | None
    scheme: str | None
    kind: str | None
    rule: str
    why: str
    count: int
    params: int
    bytes_before: int
    bytes_after: int


def rows(component: ComponentPlan) -> list[Row]:
    """The component's decisions, summed up by what was decided and why; FP8 first, then by size."""
    sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for tensor in component.tensors:
        d = tensor.decision
        total = sums[d.mode, d.scheme, d.kind, d.rule, d.why]
        after = tensor.info.numel + _scale_bytes(tensor.info.shape, d.format) if d.format else tensor.info.nbytes
        for i, value in enumerate((1, tensor.info.numel, tensor.info.nbytes, after)):
            total[i] += value
    table = [Row(*key, *values) for key, values in sums.items()]
    return sorted(table, key=lambda r: (r.mode is None, r.mode or "", -r.bytes_before, r.rule))


def plan_html(plan: Plan, caption: str) -> str:
    """A plan's components as a table for a notebook."""
    table = []
    for component in plan.components:
        before, after = component.weight_bytes
        fp8, all_of_it = sum(t.decision.fp8 for t in component.tensors), sum(1 for _ in component.tensors)
        label, class_name = component.source.label, component.source.class_name
        table.append((label, class_name, fp8, all_of_it - fp8, byte_count(before), byte_count(after)))
    return html_table(caption, ("component", "class", "FP8", "kept", "before", "after"), table, plan.notes)


def make_plan(snapshot: Snapshot, recipe: Recipe) -> Plan:
    """Decide every tensor of the snapshot and lay out every output file. Raises ConvertError for what cannot be."""
    refuse_problems(recipe.manifest, match_tables(recipe.manifest, snapshot))
    chosen = {c.name: _rules_of(c, recipe) for c in snapshot.components}
    _check_components(snapshot, recipe, chosen)
    maps = {c.name: module_map(c) for c in snapshot.components if chosen[c.name] is not None}
    _check_entries(snapshot, recipe, maps)
    decisions, notes, problems = _decide_all(snapshot, recipe, chosen, maps)
    if not any(t.decision.fp8 for tensors in decisions.values() for t in tensors.values()):
        asked = _user_patterns(recipe, chosen)
        raise nothing_converted(snapshot, recipe.manifest, chosen, decisions, problems, asked)
    notes += _coverage_notes(snapshot, recipe, chosen, decisions, problems)
    input_scales = _input_scales(decisions, recipe)
    components = tuple(
        _plan_component(c, chosen[c.name], decisions[c.name], recipe, input_scales, problems.get(c.name))
        for c in snapshot.components
    )
    files = {}
    for component in components:
        if component.config is not None:
            files[component.source.path(CONFIG)] = layout.encode_json(component.config)
        if sum(len(shard.files) for shard in component.shards) > 1:
            files[component.source.path(layout.index_name(component.source.stem))] = _index(component)
    sidecars = tuple(p for p in snapshot.sidecars if p not in files)
    if recipe.compact and not any(
        t.decision.mode == layout.STORAGE for c in components if c.rules and is_dit(c.rules) for t in c.tensors
    ):
        notes.append("--compact changes nothing here: no DiT layer that is converted has an FP8 storage rule")
    notes = [*snapshot.remarks, *_left_out_notes(snapshot.left_out), *notes]
    return Plan(snapshot, recipe, components, files, sidecars, tuple(notes), input_scales)


def _left_out_notes(left_out: Iterable[LeftOut]) -> list[str]:
    """What is not carried over and why, in a few lines however many folders there are."""
    by_reason: dict[str, list[LeftOut]] = defaultdict(list)
    for item in left_out:
        by_reason[item.reason].append(item)
    notes = []
    for reason, items in by_reason.items():
        shown, rest = (items, []) if len(items) <= _MOST_NOTES else (items[: _MOST_NOTES - 1], items[_MOST_NOTES - 1 :])
        for item in shown:
            path = "".join(c if c.isprintable() else "?" for c in item.path)
            if item.files == 1:
                notes.append(f"{path} ({byte_count(item.bytes)}) is left out: {reason}")
            else:
                place = f"beside {MODEL_INDEX}" if path == "./" else f"in {path}"
                notes.append(f"{item.files} files {place} ({byte_count(item.bytes)}) are left out: {reason}")
        if rest:
            count, size = sum(item.files for item in rest), byte_count(sum(item.bytes for item in rest))
            notes.append(f"{count} files in {len(rest)} other places ({size}) are left out: {reason}")
    return notes


def _rules_of(component: Component, recipe: Recipe) -> ComponentRules | None:
    """The manifest's rules for a component that is to be converted, None for one that is only copied."""
    rules = recipe.manifest.rules_for(component.name, component.class_name)
    selected = not recipe.components or component.name in recipe.components
    return rules if rules is not None and rules.mode != "keep" and selected else None


def _check_components(snapshot: Snapshot, recipe: Recipe, chosen: Mapping[str, ComponentRules | None]) -> None:
    names = [c.name for c in snapshot.components]
    for name in recipe.components:
        if name not in names:
            raise ConvertError(f"{snapshot.label} has no component {name!r} with weights; it has {', '.join(names)}.")
        if chosen[name] is None:
            raise ConvertError(
                f"The manifest {recipe.manifest.name} does not convert {name}; drop --component {name} or pass another "
                "--manifest."
            )
    for component in snapshot.components:
        if chosen[component.name] is not None:
            _check_unquantized(component, snapshot)
    dits = [rules for rules in chosen.values() if rules is not None and is_dit(rules)]
    for given, option in (
        (recipe.ignored_layers, "--ignored-layers"),
        (recipe.block, "--weight-block-size"),
        (recipe.input_scales, "--input-scales"),
    ):
        if given and not dits:
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


def _check_unquantized(component: Component, snapshot: Snapshot) -> None:
    """Refuse to quantise again, by name."""
    label = f"{component.label} of {snapshot.label}"
    advice = "give the original BF16, FP16 or FP32 snapshot"
    if (config := component.config.get(layout.CONFIG_KEY)) is not None:
        method = config.get("quant_method", "unknown") if isinstance(config, dict) else "unknown"
        raise ConvertError(f"{label} is already quantised (quant_method {method!r:.80}); {advice}.")
    names = {t.name for t in component.tensors}
    for tensor in component.tensors:
        if tensor.name.endswith(_QUANTIZED_SUFFIXES) or tensor.name in ("scaled_fp8", "weight_scale"):
            raise ConvertError(f"{label} is already quantised (it has {tensor.name}); {advice}.")
        if tensor.dtype in _QUANTIZED_DTYPES:
            module = tensor.name.removesuffix(layout.WEIGHT)
            if not any(module + s in names for s in (*_QUANTIZED_SUFFIXES, ".scale")):
                raise ConvertError(f"{tensor.name} in {label} holds {tensor.dtype} codes without a scale; {advice}.")
            raise ConvertError(f"{label} is already quantised ({tensor.name} is {tensor.dtype}); {advice}.")


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
    groups = [g for r in chosen.values() if r is not None and is_dit(r) for g in r.fusion_groups]
    for component in snapshot.components:
        rules = chosen[component.name]
        tensors = list(component.tensors)
        if rules is None:
            decided = keep_all(tensors, "component", _why_kept(component, recipe))
        else:
            modules = maps[component.name]
            dit = is_dit(rules)
            if modules.problem:
                problems[component.name] = modules.problem
                notes.append(f"{component.label} stays as it is: {modules.problem}")
            if dit:
                layers += [name for name, kind in modules.kinds.items() if kind in rules.kinds]
            decided, said = decide(
                tensors,
                rules,
                modules,
                user_patterns=expand_aliases(recipe.ignored_layers, rules.fusion_groups) if dit else (),
                compact=recipe.compact,
                block=(recipe.block if dit else None) or rules.weight_block_size,
            )
            notes += said
        decisions[component.name] = {t.info.name: t for t in decided}
    if not any(name in problems for name, rules in chosen.items() if rules is not None and is_dit(rules)):
        check_patterns(recipe.ignored_layers, groups, layers)
    return decisions, list(dict.fromkeys(notes)), problems


def _coverage_notes(
    snapshot: Snapshot,
    recipe: Recipe,
    chosen: Mapping[str, ComponentRules | None],
    decisions: Mapping[str, Mapping[str, PlannedTensor]],
    problems: Mapping[str, str],
) -> list[str]:
    """What stays as it is and might surprise. Raises ConvertError for a DiT of which next to nothing becomes FP8."""
    asked = _user_patterns(recipe, chosen)
    notes = [] if recipe.components else unnamed_notes(snapshot, recipe.manifest)
    for component in snapshot.components:
        rules = chosen[component.name]
        if rules is None or component.name in problems:
            continue
        tensors = list(decisions[component.name].values())
        note = kept_note(component.label, tensors, rules, asked, recipe.manifest.name)
        notes += [note] if note else []
    return notes


def _user_patterns(recipe: Recipe, chosen: Mapping[str, ComponentRules | None]) -> set[str]:
    """The user's ignored layers as decisions name them, aliases expanded."""
    groups = [g for rules in chosen.values() if rules is not None and is_dit(rules) for g in rules.fusion_groups]
    return set(expand_aliases(recipe.ignored_layers, groups))


def _why_kept(component: Component, recipe: Recipe) -> str:
    if recipe.components and component.name not in recipe.components:
        return "not among the components asked for"
    rules = recipe.manifest.rules_for(component.name, component.class_name)
    if rules is None:
        return why_unnamed(component, recipe.manifest)
    return rules.why or f"the manifest {recipe.manifest.name} does not convert it"


def _input_scales(decisions: Mapping[str, Mapping[str, PlannedTensor]], recipe: Recipe) -> dict[str, float]:
    """The activation scale of every W8A8 module; a fusion group shares its maximum."""
    if recipe.input_scales is None:
        return {}
    given = recipe.input_scales
    w8a8 = [t for tensors in decisions.values() for t in tensors.values() if t.decision.mode == layout.W8A8]
    for tensor in w8a8:
        if tensor.module not in given:
            raise ConvertError(
                f"The input scales lack {tensor.module}{layout.INPUT_SCALE}; calibrate it or name the layer in "
                "--ignored-layers."
            )
    if unknown := sorted(set(given) - {t.module for t in w8a8}):
        raise ConvertError(f"The input scales name {unknown[0]}, which is no W8A8 layer of this plan; remove it.")
    largest: dict[str, float] = defaultdict(float)
    for tensor in w8a8:
        domain = tensor.decision.group or tensor.module
        largest[domain] = max(largest[domain], given[tensor.module])
    return {t.module: largest[t.decision.group or t.module] for t in w8a8}


def _plan_component(
    component: Component,
    rules: ComponentRules | None,
    decisions: Mapping[str, PlannedTensor],
    recipe: Recipe,
    input_scales: Mapping[str, float],
    problem: str | None,
) -> ComponentPlan:
    shards_of_group = Counter(
        group
        for shard in component.shards
        for group in {decisions[t.name].decision.group for t in shard.header.tensors}
        if group is not None
    )
    spread = {group for group, count in shards_of_group.items() if count > 1}
    shards = []
    for source in component.shards:
        tensors = tuple(decisions[t.name] for t in source.header.tensors)
        shards.append(_plan_shard(component, source, tensors, spread, input_scales, recipe.max_shard_size))
    shards = _named(component, shards)
    converted = any(t.decision.fp8 for s in shards for t in s.tensors)
    config = _config(component, rules, shards, recipe) if rules is not None and converted else None
    return ComponentPlan(component, rules if converted else None, tuple(shards), config, problem)


def _plan_shard(
    component: Component,
    source: Shard,
    tensors: tuple[PlannedTensor, ...],
    spread: set[str],
    input_scales: Mapping[str, float],
    max_shard_size: int | None,
) -> ShardPlan:
    """The plan of one source shard; its output files have no paths yet."""
    schedule = make_schedule(tensors, spread, input_scales)
    modules = {t.module: t.decision.format for t in tensors if t.decision.format is not None}
    if not modules:  # nothing becomes FP8: the file is copied, header and all, where it need not be cut
        schedule = replace(schedule, outputs=source.header.tensors, measured=(), early=(), late=())
        if max_shard_size is None or source.size <= max_shard_size or not schedule.outputs:
            header = len(source.header.raw).to_bytes(PREFIX_BYTES, "little") + source.header.raw
            whole = OutputFile("", header, schedule.outputs)
            return ShardPlan(component.name, source, (whole,), tensors, schedule)
    files = cut_into_files(schedule.outputs, modules, source.header.metadata, max_shard_size)
    return ShardPlan(component.name, source, files, tensors, schedule)


def _named(component: Component, shards: list[ShardPlan]) -> list[ShardPlan]:
    """The shards with the paths of their files, which are numbered through the whole component."""
    count = sum(len(shard.files) for shard in shards)
    if count > _MOST_FILES:
        raise ConvertError(f"{component.label} would become {count} files; choose a larger --max-shard-size.")
    numbers = iter(range(1, count + 1))
    return [
        replace(
            shard,
            files=tuple(
                replace(file, path=component.path(layout.shard_name(component.stem, next(numbers), count)))
                for file in shard.files
            ),
        )
        for shard in shards
    ]


def _config(component: Component, rules: ComponentRules, shards: list[ShardPlan], recipe: Recipe) -> dict[str, Any]:
    """The component's config.json with its quantization_config."""
    tensors = [t for shard in shards for t in shard.tensors]
    fp8 = [t.decision for t in tensors if t.decision.fp8]
    formats = {d.format for d in fp8 if d.format is not None}
    # Other readers take an "fp8" component's linears for what its kind is run in: a DiT's for W8A8.
    native = len(formats) > 1 or any(d.kind != "Linear" or d.mode != rules.mode for d in fp8)
    own = {f.block for f in formats if f.mode == rules.mode and f.block is not None}
    config = layout.quantization_config(
        native=native,
        activation_scheme=recipe.activation_scheme if is_dit(rules) else "dynamic",
        ignored_layers=sorted(t.module for t in tensors if t.decision.kind == "Linear" and not t.decision.fp8),
        block=next(iter(own), None),
    )
    return {**component.config, layout.CONFIG_KEY: config}


def _index(component: ComponentPlan) -> bytes:
    weight_map = {
        output.name: file.path.rpartition("/")[2]
        for shard in component.shards
        for file in shard.files
        for output in file.outputs
    }
    total = component.weight_bytes[1]
    return layout.encode_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _scale_bytes(shape: tuple[int, ...], how: layout.WeightFormat) -> int:
    return 4 * math.prod(how.scale_shape(shape))


def _component_json(component: ComponentPlan) -> dict[str, Any]:
    before, after = component.weight_bytes
    return {
        "name": component.source.name,
        "class": component.source.class_name,
        "problem": component.problem,
        "bytes_before": before,
        "bytes_after": after,
        "shards": [
            {
                "source": s.source.path,
                "paths": [file.path for file in s.files],
                "bytes_before": s.source.size,
                "bytes_after": s.size,
                "tensors": [_tensor_json(t) for t in s.tensors],
            }
            for s in component.shards
        ],
    }


def _tensor_json(tensor: PlannedTensor) -> dict[str, Any]:
    d = tensor.decision
    return {
        "name": tensor.info.name,
        "dtype": tensor.info.dtype,
        "shape": list(tensor.info.shape),
        "decision": "fp8" if d.fp8 else "keep",
        "mode": d.mode,
        "scheme": d.scheme,
        "group": d.group,
        "rule": d.rule,
        "why": d.why,
    }
