"""Is a converted snapshot what its source gives? The source is converted again in memory, and all is compared.

Headers, codes and scales are compared with the files byte by byte, everything else by digest, and every field of the
record that source and recipe determine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..format import layout
from ..format.header import read_header
from ..output.journal import Done
from ..output.record import SEAL, make_record
from ..plan.manifest import Manifest, load_manifest, shipped
from ..plan.planning import make_plan
from ..plan.recipe import Recipe, recipe_sha256
from ..snapshot.access import SourceOptions
from ..snapshot.locate import fetch, local_folder, open_source
from ..snapshot.source import Snapshot, content_sha256
from ..stream.reading import open_for_reading, read_exactly
from ..telling.errors import ConvertError, ResumableError
from ..telling.progress import Progress
from .codes import compare_shard
from .finding import Finding


def open_original(
    root: Path, record: Mapping[str, Any], source: str | os.PathLike[str], options: SourceOptions
) -> Snapshot:
    """The source, with its files on this machine. Raises ConvertError if the snapshot cannot have come from it.

    A Hub repository that the record names is read at the commit that the record names, unless another is asked for.
    """
    stated_source = record["source"]
    stated_commit = stated_source["commit"]
    by_record = options.revision is None and stated_source["repo"] == os.fspath(source) and local_folder(source) is None
    if by_record and stated_commit is not None:
        options = replace(options, revision=stated_commit)
    try:
        snapshot = open_source(source, options)
    except ResumableError:
        raise
    except ConvertError as error:
        if not (by_record and stated_commit is not None):
            raise
        raise ConvertError(f"{root} says that it was made from the commit {stated_commit!r:.80}: {error}") from error
    stated = recorded_classes(record)
    given = {c.name: c.class_name for c in snapshot.components}
    if stated == given:
        return fetch(snapshot)
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


def described(source: Snapshot, record: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """What is compared with, and notes on what that source cannot tell."""
    label = source.label if source.commit is None else f"{source.label} @ {source.commit}"
    stated = record["source"]["repo"]
    if stated is not None and source.repo is None:
        return label, (f"that it was made from {stated!r:.80} is not checked: the source given is a folder",)
    return label, ()


def recorded_classes(record: Mapping[str, Any]) -> dict[str, str | None]:
    """The components' classes by name, as the record states them."""
    return {name: entry["class"] for name, entry in record["components"].items()}


def recorded_manifest(root: Path, record: Mapping[str, Any], manifest: str | None) -> Manifest:
    """The manifest that the record names: a shipped one, or the one given."""
    name = record["recipe"]["manifest"]
    if manifest is None and name not in shipped():  # a path in a record is not followed
        raise ConvertError(
            f"There is no manifest named {name!r:.80} here; pass the one that {root} was converted with."
        )
    chosen = load_manifest(manifest or name)
    if chosen.sha256 != record["recipe"]["manifest_sha256"]:
        raise ConvertError(
            f"{root} was converted with another version of the manifest {name!r:.80}; pass that one with --manifest."
        )
    return chosen


def compare(
    root: Path,
    record: Mapping[str, Any],
    snapshot: Snapshot,
    manifest: Manifest,
    damaged: Collection[str],
    progress: Progress,
) -> Iterator[Finding]:
    """Convert the source again in memory and compare all that it determines; files in `damaged` have a finding.

    Headers, codes and scales are compared with the files; everything else by digest, and the record field by field.
    """
    try:
        plan = make_plan(snapshot, _recipe(root, record, manifest))
    except ConvertError as error:
        yield Finding(".", f"cannot be compared with its source: {error}")
        return
    progress.start(plan.bytes_to_read)
    done: dict[str, Done] = {}
    for shard in plan.shards:
        digests = yield from compare_shard(root, shard, plan, damaged)
        for file in shard.files:
            stated = record["files"].get(file.path, {})
            done[file.path] = Done(
                file.path, file.size, stated.get("sha256", ""), shard.source.size, digests.get(shard.source.path)
            )
        progress.advance(shard.source.size)
    progress.close()
    for path, data in plan.files.items():
        done[path] = Done(path, len(data), hashlib.sha256(data).hexdigest())
    for path in plan.sidecars:
        done[path] = Done(path, snapshot.files.sizes()[path], content_sha256(snapshot.files, path))
    yield from _compare_files(record, done, {f.path for f in plan.weight_files}, damaged)
    yield from _compare_record(record, make_record(plan, done))


def _compare_files(
    record: Mapping[str, Any], given: Mapping[str, Done], weights: Collection[str], damaged: Collection[str]
) -> Iterator[Finding]:
    """Files that the source gives against those that the record has; the record's digests were checked before."""
    for path, done in given.items():
        stated = record["files"].get(path)
        if stated is None and path not in damaged:
            yield Finding(path, "is missing, though the source gives it")
        elif stated is not None and path not in damaged and path not in weights and stated["sha256"] != done.sha256:
            yield Finding(path, "differs from what the source gives")
    for path in sorted(record["files"].keys() - given.keys()):
        yield Finding(path, "is not what the source gives")


def _compare_record(record: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Finding]:
    """The record's fields against those that source and recipe give; digests of files are compared elsewhere."""
    expected = {**given, "tool_version": record["tool_version"]}
    # The scales came from a file of the user's, of which the snapshot holds the maximum over each fusion group.
    expected["recipe"] = {**given["recipe"], "input_scales_sha256": record["recipe"]["input_scales_sha256"]}
    expected["recipe_sha256"] = recipe_sha256(record["tool_version"], expected["recipe"])
    if given["source"]["repo"] is None or record["source"]["repo"] is None:  # a folder makes no claim
        names = {key: record["source"][key] for key in ("repo", "commit")}
        expected["source"] = {**given["source"], **names}
    for part in ("files", SEAL):
        expected[part] = record[part]
    for path, entry in expected["shards"].items():
        stated = record["shards"].get(path, {})
        expected["shards"][path] = {**entry, **{k: stated[k] for k in ("size", "sha256") if k in stated}}
        if entry["source_sha256"] is None and "source_sha256" in stated:  # could not be read to its end: found
            expected["shards"][path]["source_sha256"] = stated["source_sha256"]
    for problem in _differences(record, expected, "the record"):
        yield Finding(layout.RECORD_FILE, problem)


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


def _recipe(root: Path, record: Mapping[str, Any], manifest: Manifest) -> Recipe:
    """The recipe that the record states."""
    stated = record["recipe"]
    block = stated["weight_block_size"]
    return Recipe(
        manifest=manifest,
        ignored_layers=tuple(stated["ignored_layers"]),
        components=tuple(stated["components"]),
        compact=stated["compact"],
        block=(block[0], block[1]) if block else None,
        activation_scheme=stated["activation_scheme"],
        max_shard_size=stated["max_shard_size"],
        input_scales=_stored_input_scales(root, record) if stated["input_scales_sha256"] else None,
    )


def _stored_input_scales(root: Path, record: Mapping[str, Any]) -> dict[str, float]:
    scales = {}
    for path in record["shards"]:
        header = read_header(root / path, path)
        fd = open_for_reading(root / path, path)
        try:
            for tensor in header.tensors:
                if tensor.name.endswith(layout.INPUT_SCALE):
                    data = bytearray(4)
                    read_exactly(fd, memoryview(data), header.data_start + tensor.start, path)
                    scales[tensor.name.removesuffix(layout.INPUT_SCALE)] = float(np.frombuffer(data, np.float32)[0])
        finally:
            os.close(fd)
    return scales
