"""The plan of a conversion as data: every component, every shard, every output file, and what they add up to.

It knows names, sizes, headers and decisions, and no place where a file lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..snapshot.snapshot import Component, Shard, Snapshot
from ..telling.notebook import Brief, one_line
from ..telling.quantities import change, plural
from .decide import STORAGE_FORMAT, PlannedTensor, scale_bytes
from .manifest import ComponentRules
from .recipe import Recipe
from .schedule import Schedule, scale_domain
from .sharding import OutputFile
from .showing import plan_html, plan_json
from .single_file import SingleFile


@dataclass(frozen=True, repr=False)
class ShardPlan(Brief):
    """One source shard and the output files that it becomes, mostly one.

    `copied` without FP8 weights, where its tensors are the file's own.
    """

    component: str
    source: Shard
    files: tuple[OutputFile, ...]
    tensors: tuple[PlannedTensor, ...]
    schedule: Schedule

    @property
    def copied(self) -> bool:
        return not self.source.renamed and not any(t.decision.fp8 for t in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the output files."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, repr=False)
class Imported(Brief):
    """A component whose FP8 weights another tool made: its layout, and the modules of groups with unequal scales."""

    layout: str
    unequal_scales: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, repr=False)
class ComponentPlan(Brief):
    """One component: its decisions and what is written for it. `rules` is None where nothing is converted.

    single: the one file that all shards go into, for readers that want it so; the shards have no files then.
    """

    source: Component
    rules: ComponentRules | None
    shards: tuple[ShardPlan, ...]
    config: Mapping[str, Any] | None
    problem: str | None
    imported: Imported | None = None
    single: SingleFile | None = None

    @property
    def files(self) -> tuple[OutputFile, ...]:
        """The component's safetensors files."""
        return (self.single.file,) if self.single else tuple(file for shard in self.shards for file in shard.files)

    @property
    def tensors(self) -> Iterable[PlannedTensor]:
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Bytes of all tensors before and after, scales included."""
        before = sum(t.nbytes for t in self.source.tensors)
        if self.single is not None:
            return before, self.single.file.stop
        return before, sum(s.schedule.outputs[-1].end for s in self.shards if s.schedule.outputs)


@dataclass(frozen=True, repr=False)
class Plan:
    """A whole conversion. `files` holds the JSON files to write, `sidecars` the bytes of those to copy."""

    snapshot: Snapshot
    recipe: Recipe
    components: tuple[ComponentPlan, ...]
    files: Mapping[str, bytes]
    sidecars: Mapping[str, int]
    notes: tuple[str, ...]

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
        return change(self.bytes_to_read, self.weight_bytes)

    @property
    def shards(self) -> tuple[ShardPlan, ...]:
        return tuple(shard for component in self.components for shard in component.shards)

    @property
    def weight_files(self) -> tuple[OutputFile, ...]:
        """The output's safetensors files."""
        return tuple(file for component in self.components for file in component.files)

    @cached_property
    def weight_bytes(self) -> int:
        """Size of the output's safetensors files."""
        return sum(file.size for file in self.weight_files)

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file of the output but the record."""
        return (*(file.path for file in self.weight_files), *self.files, *self.sidecars)

    @cached_property
    def bytes_to_write(self) -> int:
        """Size of the whole output but for the record."""
        written = self.weight_bytes + sum(len(f) for f in self.files.values())
        return written + sum(self.sidecars.values())

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
            t.info.nbytes - t.info.numel - scale_bytes(t.info.shape, STORAGE_FORMAT)
            for c in self.components
            if c.rules is not None and c.rules.runs_in_fp8
            for t in c.tensors
            if t.decision.kind == "Linear"
            and t.decision.rule in {rule.pattern for rule in c.rules.ignored_layers} - {*self.recipe.ignored_layers}
            and c.rules.rule_for(c.rules.storage_layers, t.module)
        )

    def to_json(self) -> dict[str, Any]:
        """The plan for scripts: every tensor with its decision, and the sums."""
        return plan_json(self)
