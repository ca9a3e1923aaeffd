"""Is a converted snapshot what its source gives? The source is converted again in memory, and all is compared.

Headers, codes and scales are compared with the files byte by byte, everything else by digest, and every field of the
record that source and recipe determine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..format import layout
from ..format.header import read_header
from ..format.reader import as_json
from ..format.record import Record, RecordedError, RecordedShard
from ..output.journal import Done, Source
from ..output.record import make_record
from ..plan.lora import Lora
from ..plan.lora_request import LoraRequest
from ..plan.manifest import Manifest, load_manifest, shipped
from ..plan.plan import ComponentPlan, ShardPlan
from ..plan.planning import make_plan
from ..plan.recipe import Recipe, recipe_sha256
from ..plan.settings import Settings
from ..plan.static import qualified
from ..snapshot.access import HubAccess
from ..snapshot.files import LocalFiles, content_sha256
from ..snapshot.locate import describe_source, fetch, local_folder, open_files
from ..snapshot.snapshot import Snapshot
from ..stream.reading import open_for_reading, read_exactly
from ..stream.supply import FolderSupply
from ..targets.choosing import TARGETS
from ..targets.key_maps import key_map
from ..targets.target import NATIVE, Target
from ..telling.errors import ConvertError, ResumableError
from ..telling.progress import Progress
from .codes import Read, compare_shard, compare_single
from .finding import Finding
from .loras import recorded_loras

# The settings that a record's recipe states as they were given.
_RECIPE_KEYS = (
    "ignored_layers", "components", "compact", "weight_block_size", "activation_scheme", "max_shard_size", "target",
)  # fmt: skip


@dataclass(frozen=True)
class Original:
    """What a converted snapshot is compared with: its source, whose files are here, its manifest and LoRAs."""

    snapshot: Snapshot
    files: LocalFiles
    manifest: Manifest
    loras: tuple[Lora, ...] = ()


def open_original(
    root: Path,
    record: Record,
    source: str | os.PathLike[str],
    manifest: str | None,
    loras: Sequence[LoraRequest],
    options: HubAccess,
) -> Original:
    """The source, fetched if need be, manifest and LoRAs. Raises ConvertError if the snapshot cannot have come of them.

    A Hub repository that the record names is read at the commit that the record names, unless another is asked for.
    """
    if record.format != layout.RECORD_FORMAT:
        raise ConvertError(
            f"{root} has a record of the format {record.format}, which cannot be compared with a source; verify it "
            "without --source, or convert the source again."
        )
    if imported := next((c.imported for c in record.components.values() if c.imported), None):
        raise ConvertError(
            f"{root} was imported (layout {imported:.80}), and an import is not compared with its source; verify it "
            "without --source."
        )
    stated_commit = record.source.commit
    by_record = options.revision is None and record.source.repo == os.fspath(source) and local_folder(source) is None
    if by_record and stated_commit is not None:
        options = replace(options, revision=stated_commit)
    try:
        files = open_files(source, options)
        snapshot = describe_source(files, options)
    except ResumableError:
        raise
    except ConvertError as error:
        if not (by_record and stated_commit is not None):
            raise
        raise ConvertError(f"{root} says that it was made from the commit {stated_commit!r:.80}: {error}") from error
    _check_components(root, record, snapshot)
    rules = _recorded_manifest(root, record, manifest)  # before the download: it may not be there
    merged = recorded_loras(root, record, loras, snapshot)
    return Original(snapshot, fetch(snapshot, files), rules, merged)


def _check_components(root: Path, record: Record, snapshot: Snapshot) -> None:
    """Raise ConvertError unless the source has the components that the record names."""
    stated = record.classes
    given = snapshot.classes
    if _reader(record).single_files and stated:  # components that it has no names for are left out
        given = {name: class_name for name, class_name in given.items() if name in stated}
    if stated == given:
        return
    if "" in stated and "" not in given:
        alike = " or ".join(n for n, class_name in given.items() if class_name == stated[""])
        raise ConvertError(
            f"{root} holds one component, and {snapshot.label} is a whole pipeline; pass the folder of that "
            f"component{f' ({alike})' if alike else ''} as --source."
        )
    if "" in given and "" not in stated:
        raise ConvertError(
            f"{root} holds a whole pipeline, and {snapshot.label} is one component; pass the pipeline's folder or Hub "
            "id as --source."
        )
    mine, others = (", ".join(f"{n} {c!r:.80}".strip() for n, c in sorted(x.items())) for x in (stated, given))
    raise ConvertError(
        f"{root} was made of {mine}, and {snapshot.label} has {others}; pass its own source as --source."
    )


def _reader(record: Record) -> Target:
    """Who the snapshot was written for; a name that is none is found with the recipe."""
    return TARGETS.get(record.recipe.target, NATIVE)


def described(source: Snapshot, record: Record) -> tuple[str, tuple[str, ...]]:
    """What is compared with, and notes on what that source cannot tell."""
    label = source.label if source.commit is None else f"{source.label} @ {source.commit}"
    notes, stated = [], record.source.repo
    if stated is not None and source.repo is None:
        notes.append(f"that it was made from {stated!r:.80} is not checked: the source given is a folder")
    if record.recipe.input_scales_sha256 is not None:
        notes.append("the input scales are not checked: they come from a file of their own, not from the source")
    return label, tuple(notes)


def _recorded_manifest(root: Path, record: Record, manifest: str | None) -> Manifest:
    """The manifest that the record names: a shipped one, or the one given."""
    name = record.recipe.manifest
    if manifest is None and name not in shipped():  # a path in a record is not followed
        raise ConvertError(
            f"There is no manifest named {name!r:.80} here; pass the one that {root} was converted with."
        )
    chosen = load_manifest(manifest or name)
    if chosen.sha256 != record.recipe.manifest_sha256:
        raise ConvertError(
            f"{root} was converted with another version of the manifest {name!r:.80}; pass that one with --manifest."
        )
    return chosen


def compare(
    root: Path,
    record: Record,
    original: Original,
    damaged: Collection[str],
    progress: Progress,
) -> Iterator[Finding]:
    """Convert the source again in memory and compare all that it determines; files in `damaged` have a finding.

    Headers, codes and scales are compared with the files; everything else by digest, and the record field by field.
    """
    try:
        plan = make_plan(original.snapshot, _recipe(root, record, original))
    except ConvertError as error:
        yield Finding(".", f"cannot be compared with its source: {error}")
        return
    progress.start(plan.bytes_to_read)
    done: dict[str, Done] = {}
    supply = FolderSupply(original.files)
    for component in plan.components:
        if component.single is not None:
            read = yield from compare_single(root, component, supply, damaged)
            done[component.files[0].path] = _done_single(component, record, read, original.files)
            progress.advance(sum(shard.source.size for shard in component.shards))
    for shard in (s for c in plan.components if c.single is None for s in c.shards):
        read = yield from compare_shard(root, shard, plan, supply, damaged)
        size, source_sha256 = shard.source.size, read.sha256.get(shard.source.path)
        errors = _errors([shard], record, read)
        for file in shard.files:
            stated = record.files.get(file.path)
            sha256 = stated.sha256 if stated else ""
            done[file.path] = Done(file.path, file.size, sha256, size, source_sha256, errors=errors)
        progress.advance(shard.source.size)
    progress.close()
    for path, data in plan.files.items():
        done[path] = Done(path, len(data), hashlib.sha256(data).hexdigest())
    for path, size in plan.sidecars.items():
        done[path] = Done(path, size, content_sha256(original.files, path))
    yield from _compare_files(record, done, {f.path for f in plan.weight_files}, damaged)
    yield from _compare_record(record, make_record(plan, done))


def _done_single(component: ComponentPlan, record: Record, read: Read, files: LocalFiles) -> Done:
    """The component's one file, with what its source shards gave as far as they were read to their ends."""
    assert component.single is not None
    file = component.single.file
    stated = record.files.get(file.path)
    first, *others = (
        Source(s.source.path, s.source.size, read.sha256.get(s.source.path, "")) for s in component.shards
    )
    others += [Source(e.file, e.nbytes, content_sha256(files, e.file)) for e in component.single.extras if e.file]
    sha256, errors = stated.sha256 if stated else "", _errors(component.shards, record, read)
    return Done(file.path, file.size, sha256, first.size, first.sha256, others=tuple(others), errors=errors)


def _errors(shards: Sequence[ShardPlan], record: Record, read: Read) -> dict[str, RecordedError]:
    """What codes miss, by module: what the record says of shards that could not be read whole, which have a finding."""
    unread = [shard for shard in shards if shard.source.path not in read.sha256]
    stated = {s.component: record.components[s.component].errors for s in unread if s.component in record.components}
    names = ((shard.component, tensor.module) for shard in unread for tensor in shard.tensors)
    return read.errors | {m: stated[c][m] for c, m in names if c in stated and m in stated[c]}


def _compare_files(
    record: Record, given: Mapping[str, Done], weights: Collection[str], damaged: Collection[str]
) -> Iterator[Finding]:
    """Files that the source gives against those that the record has; the record's digests were checked before."""
    for path, done in given.items():
        stated = record.files.get(path)
        if stated is None and path not in damaged:
            yield Finding(path, "is missing, though the source gives it")
        elif stated is not None and path not in damaged and path not in weights and stated.sha256 != done.sha256:
            yield Finding(path, "differs from what the source gives")
    for path in sorted(record.files.keys() - given.keys()):
        yield Finding(path, "is not what the source gives")


def _compare_record(record: Record, given: Record) -> Iterator[Finding]:
    """The record's fields against those that source and recipe give; digests of files are compared elsewhere."""
    # The scales came from a file of the user's, of which the snapshot holds the maximum over each fusion group.
    recipe = replace(given.recipe, input_scales_sha256=record.recipe.input_scales_sha256)
    source = given.source
    if source.repo is None or record.source.repo is None:  # a folder makes no claim
        source = replace(source, repo=record.source.repo, commit=record.source.commit)
    expected = replace(
        given,
        tool_version=record.tool_version,
        source=source,
        recipe=recipe,
        recipe_sha256=recipe_sha256(record.tool_version, as_json(recipe)),
        shards={path: _expected_shard(shard, record.shards.get(path)) for path, shard in given.shards.items()},
        files=record.files,
        record_sha256=record.record_sha256,
    )
    for problem in _differences(record.to_json(), expected.to_json(), "the record"):
        yield Finding(layout.RECORD_FILE, problem)


def _expected_shard(given: RecordedShard, stated: RecordedShard | None) -> RecordedShard:
    if stated is None:
        return given
    # A source that could not be read to its end has no digest, and a finding.
    source_sha256 = given.source_sha256 or stated.source_sha256
    parts = tuple(
        part if part.source_sha256 or part.source not in stated.sources else stated.sources[part.source]
        for part in given.parts
    )
    return replace(given, size=stated.size, sha256=stated.sha256, source_sha256=source_sha256, parts=parts)


def _differences(stated: Any, expected: Any, where: str) -> Iterator[str]:
    """Where two JSON values differ, in words."""
    if isinstance(stated, dict) and isinstance(expected, dict):
        for key in sorted(stated.keys() | expected.keys()):
            name = f"{key!r:.80} of {where}"
            if key not in expected:
                yield f"{name} is not what the source gives"
            elif key not in stated:
                yield f"{name} is missing"
            else:
                yield from _differences(stated[key], expected[key], name)
    elif stated != expected or type(stated) is not type(expected):
        yield f"{where} is {stated!r:.80}, and the source gives {expected!r:.80}"


def _recipe(root: Path, record: Record, original: Original) -> Recipe:
    """The recipe that the record states."""
    stated = {key: getattr(record.recipe, key) for key in _RECIPE_KEYS}
    if not record.recipe.input_scales_sha256:
        recipe = Settings.read(stated).resolve(original.snapshot, original.manifest)
        return replace(recipe, loras=original.loras)
    # The file of scales is not here, but the scales are.
    scheme, scales = stated.pop("activation_scheme"), _stored_input_scales(root, record)
    if _reader(record).single_files:
        scales = _native_scales(original.snapshot, scales)
    recipe = Settings.read(stated).resolve(original.snapshot, original.manifest)
    return replace(recipe, activation_scheme=scheme, input_scales=scales, loras=original.loras)


def _native_scales(snapshot: Snapshot, scales: Mapping[str, float]) -> dict[str, float]:
    """Input scales by the modules' names in the source, from those in single files."""
    found = {}
    for component in snapshot.components:
        names = key_map(component.class_name, component.config)
        for tensor in component.tensors if names is not None else ():
            module = tensor.name.removesuffix(layout.WEIGHT)
            if names is None or module == tensor.name:
                continue
            if scale := scales.get(qualified(component.name, names.original_module(module))):
                found[qualified(component.name, module)] = scale
    return found


def _stored_input_scales(root: Path, record: Record) -> dict[str, float]:
    scales = {}
    for path, shard in record.shards.items():
        component = shard.component or path.rpartition("/")[0]
        header = read_header(root / path, path)
        fd = open_for_reading(root / path, path)
        try:
            for tensor in header.tensors:
                if tensor.name.endswith(layout.INPUT_SCALE):
                    data = bytearray(4)
                    read_exactly(fd, memoryview(data), header.data_start + tensor.start, path)
                    name = qualified(component, tensor.name.removesuffix(layout.INPUT_SCALE))
                    scales[name] = float(np.frombuffer(data, np.float32)[0])
        finally:
            os.close(fd)
    return scales
