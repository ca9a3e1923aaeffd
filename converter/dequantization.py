"""`dequantize`: a converted snapshot back to one that stock diffusers and transformers load, in BF16 or FP16."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .checks.digests import as_recorded, check_but_shards
from .format.layout import RECORD_FILE, STAGING
from .format.record import Record
from .output.journal import Done
from .output.record import check_record, load_record
from .output.space import SPARE_BYTES
from .output.target import Target, open_target
from .output.writing import FileWriter, write_pieces, write_small
from .plan.plain import PLAIN_DTYPES, PlainPlan, PlainShard, plan_plain
from .plan.recipe import tool_version
from .snapshot.describing import describe
from .snapshot.files import LocalFiles, require_folder
from .stream.plain_shard import stream_plain
from .telling.errors import ConvertError, SettingsError
from .telling.notebook import one_line
from .telling.progress import Progress, Silent
from .telling.quantities import change, plural


@dataclass(frozen=True, repr=False)
class Dequantized:
    """What `dequantize` did. Bytes are those of the weights' files; `weights` are those that were FP8."""

    source: str
    output: Path
    dtype: str
    weights: int
    bytes_before: int
    bytes_after: int
    seconds: float
    resumed_shards: int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return one_line(self, self.summary)

    @property
    def summary(self) -> str:
        """What was written, in one line."""
        sizes = change(self.bytes_before, self.bytes_after)
        resumed = f", {plural(self.resumed_shards, 'shard')} resumed" if self.resumed_shards else ""
        done = f"{plural(self.weights, 'FP8 weight')} in {self.dtype}"
        return f"{self.output}: {done}, {sizes} in {self.seconds:.1f} s{resumed}"

    def to_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return {**asdict(self), "output": str(self.output), "seconds": round(self.seconds, 3)}


def dequantize(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
) -> Dequantized:
    """Write the converted snapshot in `path` (a pipeline, or one component) with plain weights into `output`.

    dtype: "bfloat16" or "float16", of the weights that were FP8; all others stay as they are. The result has no
    scales, no quantization_config and no record: diffusers and transformers load it by themselves. Where the record
    has digests, what is read is compared with them. Memory stays bounded; an interrupted run is resumed by the same
    call, and an unfinished one never looks like a snapshot. Raises ConvertError.

    Converting the result again gives the same codes and scales, if the original's weights were in this dtype (and in
    its normal range); from an FP32 original they may differ.
    """
    started = time.monotonic()
    root, folder, progress = Path(path), Path(output), progress or Silent()
    if dtype not in PLAIN_DTYPES:
        raise SettingsError(f"The dtype {dtype!r:.80} is unknown; use {' or '.join(PLAIN_DTYPES)}.")
    files, plan, record = _planned(root, dtype)
    _check_output(root, folder, plan)
    for note in plan.notes:
        progress.say(f"note: {note}")
    with open_target(folder, plan.paths, force=False) as target:
        resumed = _write(plan, files, target, _key(plan, record), progress)
    return Dequantized(
        str(root),
        folder,
        dtype,
        plan.weights,
        plan.bytes_before,
        plan.bytes_after,
        time.monotonic() - started,
        resumed,
        plan.notes,
    )


def _planned(root: Path, dtype: str) -> tuple[LocalFiles, PlainPlan, Record | None]:
    require_folder(root)
    if (root / STAGING).exists() and not (root / RECORD_FILE).exists():
        raise ConvertError(f"The conversion into {root} is unfinished; run the same fp8-convert command again.")
    record = load_record(root)
    if record is not None and (problem := check_record(root)):
        raise ConvertError(f"{root / RECORD_FILE} {problem}; `fp8-convert verify` tells more.")
    if record is not None and (found := next(check_but_shards(root, record), None)) is not None:
        raise ConvertError(
            f"{found.path} in {root} {found.problem}; `fp8-convert verify` tells more: convert or download it again."
        )
    files, notes = LocalFiles(root), tuple[str, ...]()
    if record is not None:
        files, notes = as_recorded(files, record)
    plan = plan_plain(describe(files, allow_converted=True), record, dtype)
    return files, replace(plan, notes=(*plan.notes, *notes)), record


def _check_output(root: Path, folder: Path, plan: PlainPlan) -> None:
    if folder.resolve().is_relative_to(root.resolve()):
        raise ConvertError(f"{folder} is the source or is inside it; choose another folder for the output.")
    if (folder / RECORD_FILE).exists():
        raise ConvertError(f"{folder} holds an FP8 snapshot; choose another folder for the output.")
    if not (folder / STAGING).exists() and all(_has_size(folder / path, size) for path, size in plan.sizes.items()):
        # The result has no record, so that nothing tells whether its bytes are those of this source.
        raise ConvertError(
            f"{folder} has every file of this result already, in its size; use it as it is, or remove it and run again."
        )


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _key(plan: PlainPlan, record: Record | None) -> str:
    """What a resumed run must share with the one before: source, dtype, tool, and so every output header."""
    shards = [(s.source.path, s.source.size, hashlib.sha256(s.header).hexdigest()) for s in plan.shards]
    sealed = record.record_sha256 if record is not None else None
    return hashlib.sha256(json.dumps(["dequantize", tool_version(), plan.dtype, sealed, shards]).encode()).hexdigest()


def _write(plan: PlainPlan, files: LocalFiles, target: Target, key: str, progress: Progress) -> int:
    """Write all files and let the snapshot appear; returns how many shards an earlier run had finished."""
    _check_space(plan, target)
    kept = _finished_before(plan, files, target, key)
    stats = {shard.source.path: files.open(shard.source.path).stat for shard in plan.shards}
    if target.begin(key, shards=list(stats), source_stats=stats, kept=kept.values()):
        progress.say("the unfinished output of another source, recipe or version was dropped")
    progress.start(plan.bytes_before)
    for shard in plan.shards:
        if shard.source.path not in kept:
            _write_shard(shard, plan, files, target)
        progress.advance(shard.source.size)
    progress.close()
    for path, data in plan.files.items():
        target.add(Done(path, len(data), write_small(target.staged(path), data, path)))
    for path, size in plan.sidecars.items():
        target.add(Done(path, size, write_pieces(target.staged(path), size, files.pieces(path), path)))
    for path in stats:
        files.open(path).check_unchanged()
    target.publish(plan.paths, progress.finishing)
    return len(kept)


def _finished_before(plan: PlainPlan, files: LocalFiles, target: Target, key: str) -> Mapping[str, Done]:
    """The shards that an earlier run of the same command finished, from the same source files."""
    if (earlier := target.earlier(key)) is None:
        return {}
    done = {s.source.path: earlier.done[s.source.path] for s in plan.shards if s.source.path in earlier.done}
    return {p: d for p, d in done.items() if d.source_stat == files.open(p).stat and target.recheck(d)}


def _write_shard(shard: PlainShard, plan: PlainPlan, files: LocalFiles, target: Target) -> None:
    path = shard.source.path
    source, digest = files.open(path), hashlib.sha256()
    with FileWriter(target.staged(path), shard.size, path) as writer:
        writer.append(memoryview(shard.header))
        for piece in stream_plain(shard, source, PLAIN_DTYPES[plan.dtype], digest):
            writer.append(memoryview(piece.numpy().data))
        if shard.sha256 not in (None, digest.hexdigest()):
            raise ConvertError(
                f"{path} in {plan.snapshot.label} has another sha256 than the record says; `fp8-convert verify` tells "
                "more: convert or download it again."
            )
        source.check_unchanged()
        sha256 = writer.commit()
    target.add(Done(path, shard.size, sha256, shard.source.size, digest.hexdigest(), source.stat))


def _check_space(plan: PlainPlan, target: Target) -> None:
    wanted = plan.bytes_to_write
    missing = target.missing_bytes(wanted) + SPARE_BYTES - shutil.disk_usage(target.folder).free
    if missing > 0:
        raise ConvertError(
            f"{target.folder} has not enough disk space: the plain weights take {wanted / 1e9:.2f} GB and "
            f"{missing / 1e9:.2f} GB are missing; free some space or choose another folder."
        )
