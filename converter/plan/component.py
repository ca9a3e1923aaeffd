"""What is written for one component: its output files, cut and numbered, its config and its index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..format import layout
from ..format.header import PREFIX_BYTES
from ..snapshot.modules import ModuleMap
from ..snapshot.snapshot import Component, Shard
from ..targets.target import Layer
from ..telling.errors import ConvertError
from .decide import PlannedTensor
from .manifest import ComponentRules
from .plan import ComponentPlan, ShardPlan
from .recipe import Recipe
from .schedule import Memory, make_schedule
from .sharding import OutputFile, cut_into_files

_MOST_FILES = 99_999  # as many as their names can number


def plan_component(
    component: Component,
    rules: ComponentRules | None,
    decisions: Mapping[str, PlannedTensor],
    recipe: Recipe,
    modules: ModuleMap | None,
    memory: Memory,
    components: Sequence[Component],
) -> ComponentPlan:
    """Lay out the component's shards and config.

    modules: of its class, None where nothing of it is converted. components: all of its snapshot. Raises ConvertError
    for what the target would not read right.
    """
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
        shards.append(plan_shard(component, source, tensors, spread, recipe.max_shard_size, memory))
    shards = _named(component, shards)
    converted = any(t.decision.fp8 for s in shards for t in s.tensors)
    config = None
    if rules is not None and converted:
        config = _config(component, rules, shards, recipe, components, modules.tied if modules else ())
    problem = modules.problem if modules else None
    return ComponentPlan(component, rules if converted else None, tuple(shards), config, problem)


def plan_shard(
    component: Component,
    source: Shard,
    tensors: tuple[PlannedTensor, ...],
    spread: Collection[str],
    max_shard_size: int | None,
    memory: Memory,
) -> ShardPlan:
    """The plan of one source shard; its output files have no paths yet.

    spread: fusion groups with members in several shards.
    """
    schedule = make_schedule(tensors, spread, memory)
    modules = {t.module: t.decision.format for t in tensors if t.decision.format is not None}
    if not modules and not source.renamed:  # the file is copied, header and all, where it need not be cut
        schedule = replace(schedule, outputs=source.header.tensors, measured=(), early=(), late=())
        if max_shard_size is None or source.size <= max_shard_size or not schedule.outputs:
            header = len(source.header.raw).to_bytes(PREFIX_BYTES, "little") + source.header.raw
            whole = OutputFile("", header, schedule.outputs)
            return ShardPlan(component.name, source, (whole,), tensors, schedule)
    files = cut_into_files(schedule.outputs, modules, source.header.metadata, max_shard_size)
    return ShardPlan(component.name, source, files, tensors, schedule)


def _named(component: Component, shards: Sequence[ShardPlan]) -> list[ShardPlan]:
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


def _config(
    component: Component,
    rules: ComponentRules,
    shards: Sequence[ShardPlan],
    recipe: Recipe,
    components: Sequence[Component],
    tied: Collection[str],
) -> dict[str, Any]:
    """The component's config.json with its quantization_config.

    tied: linears without a weight of their own in the checkpoint.
    """
    tensors = [t for shard in shards for t in shard.tensors]
    fp8 = [t.decision for t in tensors if t.decision.fp8]
    formats = {d.format for d in fp8 if d.format is not None}
    # Other readers take an "fp8" component's linears for what its kind is run in: a DiT's for W8A8.
    # Of a scale for each row they know nothing.
    native = len(formats) > 1 or any(d.kind != "Linear" or d.mode != rules.mode for d in fp8)
    native = native or any(f.channel for f in formats)
    own = {f.block for f in formats if f.mode == rules.mode and f.block is not None}
    kept = [t.module for t in tensors if t.decision.kind == "Linear" and not t.decision.fp8]
    ignored = recipe.reader.ignored_layers(component, {*tied, *kept}, components)
    layers = [Layer(t.module, t.decision.kind, t.decision.format) for t in tensors if t.decision.kind is not None]
    if problem := next(recipe.reader.problems(component, layers, ignored), None):
        raise ConvertError(f"{component.label} cannot be written for --target {recipe.target}: {problem}.")
    config = layout.quantization_config(
        native=native,
        activation_scheme=recipe.activation_scheme if rules.runs_in_fp8 else "dynamic",
        ignored_layers=sorted(ignored),
        block=next(iter(own), None),
    )
    return {**component.config, layout.CONFIG_KEY: config}


def encode_index(component: ComponentPlan) -> bytes:
    """The component's index file: which tensor lies in which of its files."""
    weight_map = {
        output.name: file.path.rpartition("/")[2]
        for shard in component.shards
        for file in shard.files
        for output in file.outputs
    }
    total = component.weight_bytes[1]
    return layout.encode_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
