"""The record of a conversion, made from its plan, and the one in a snapshot's folder; `format/record.py` defines it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from ..format import layout
from ..format.reader import read_value
from ..format.record import (
    SEAL,
    Record,
    RecordedComponent,
    RecordedDecision,
    RecordedFile,
    RecordedPart,
    RecordedRecipe,
    RecordedShard,
    RecordedSource,
    read_record,
    record_problem,
    seal,
)
from ..format.untrusted import read_whole
from ..plan.plan import ComponentPlan, Plan
from ..plan.recipe import tool_version
from ..plan.showing import Row, rows

if TYPE_CHECKING:
    from .journal import Done


def make_record(plan: Plan, done: Mapping[str, Done]) -> Record:
    """The record of a finished conversion; `done` has every output file but the record itself."""
    sources: dict[str, tuple[str, str | None]]
    sources = {f.path: (s.source.path, None) for c in plan.components for s in c.shards for f in s.files}
    sources |= {c.files[0].path: (c.shards[0].source.path, c.source.name) for c in plan.components if c.single}
    snapshot = plan.snapshot
    record = Record(
        format=layout.RECORD_FORMAT,
        tool="fp8-convert",
        tool_version=tool_version(),
        source=RecordedSource(
            repo=snapshot.repo,
            commit=snapshot.commit,
            pipeline=snapshot.pipeline,
            base_repo=snapshot.base_repo,
            base_commit=snapshot.base_commit,
        ),
        recipe=read_value(RecordedRecipe, plan.recipe.to_json(), "the recipe"),
        recipe_sha256=plan.recipe.sha256(),
        components={c.source.name: _component(c, done) for c in plan.components},
        shards={path: _shard(done[path], *sources[path]) for path in sorted(sources)},
        files={path: RecordedFile(size=d.size, sha256=d.sha256) for path, d in sorted(done.items())},
        record_sha256="",
    )
    return replace(record, record_sha256=seal(record.to_json())[SEAL])


def load_record(root: Path) -> Record | None:
    """The record of the converted snapshot in a folder, None if it has none.

    Its types and paths are checked, its digests are not. Raises ConvertError if the record cannot be used.
    """
    path = root / layout.RECORD_FILE
    return read_record(_bytes(path), str(path)) if path.is_file() else None


def check_record(root: Path) -> str | None:
    """What is wrong with a folder's record itself, None if it is, byte for byte, what was written.

    Raises ConvertError if it is no JSON object or cannot be read.
    """
    path = root / layout.RECORD_FILE
    return record_problem(_bytes(path), str(path))


def _bytes(path: Path) -> bytes:
    return read_whole(path, str(path), layout.MAX_RECORD_BYTES)


def _shard(done: Done, source: str, component: str | None) -> RecordedShard:
    assert done.source_size is not None
    return RecordedShard(
        size=done.size,
        sha256=done.sha256,
        source=source,
        source_size=done.source_size,
        source_sha256=done.source_sha256 or "",  # in `verify`: of a source that could not be read to its end
        component=component,
        parts=tuple(
            RecordedPart(source=other.path, source_size=other.size, source_sha256=other.sha256) for other in done.others
        ),
    )


def _component(component: ComponentPlan, done: Mapping[str, Done]) -> RecordedComponent:
    before, after = component.weight_bytes
    modes = Counter(t.decision.mode for t in component.tensors)
    errors = {module: error for file in component.files for module, error in done[file.path].errors.items()}
    return RecordedComponent(
        class_=component.source.class_name,
        fp8_modules={mode: modes[mode] for mode in (layout.W8A8, layout.STORAGE)},
        bytes_before=before,
        bytes_after=after,
        shared_scales=_shared_scales(component),
        imported=component.imported.layout if component.imported is not None else None,
        unequal_scales=component.imported.unequal_scales if component.imported is not None else (),
        errors={module: errors[module] for module in sorted(errors)},
        decisions=tuple(_decision(component, row) for row in rows(component)),
    )


def _decision(component: ComponentPlan, row: Row) -> RecordedDecision:
    return RecordedDecision(
        mode=row.mode,
        scheme=row.scheme,
        kind=row.kind,
        rule=row.rule,
        why=row.why,
        tensors=row.count,
        dtypes=_dtypes(component, row),
        params=row.params,
        bytes_before=row.bytes_before,
        bytes_after=row.bytes_after,
    )


def _shared_scales(component: ComponentPlan) -> tuple[tuple[str, ...], ...]:
    """The modules of every fusion group that is converted with one scale per tensor: they have the same one."""
    groups: dict[str, list[str]] = {}
    for tensor in component.tensors:
        if tensor.decision.group is not None:
            groups.setdefault(tensor.decision.group, []).append(tensor.module)
    return tuple(sorted(tuple(sorted(modules)) for modules in groups.values()))


def _dtypes(component: ComponentPlan, row: Row) -> dict[str, int]:
    """How many of a row's tensors have each source dtype."""
    alike = attrgetter("mode", "scheme", "kind", "rule", "why")
    return dict(sorted(Counter(t.info.dtype for t in component.tensors if alike(t.decision) == alike(row)).items()))
