"""One conversion from its plan to the finished snapshot: shards, small files, record, and the last rename.

Shards are written one after the other; the end of each (sync, read back, rename, journal) runs beside the next one's
conversion. A source that changes meanwhile stops the run: weights that share a scale may lie in several shards, and
what was measured in one must still be what is converted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..format.layout import RECORD_FILE, encode_json
from ..plan.plan import Plan, ShardPlan, make_plan
from ..plan.schedule import scale_domain
from ..plan.sharding import OutputFile
from ..snapshot.access import HubAccess
from ..snapshot.hub import HubFiles
from ..snapshot.locate import fetch
from ..snapshot.source import file_stat
from ..stream import compiled
from ..stream.reading import open_for_reading
from ..stream.shard_stream import Engine, stream_shard
from ..stream.supply import StreamedSupply, Supply
from ..telling.errors import ConvertError, ResumableError
from ..telling.progress import Progress
from .record import make_record
from .space import check_space
from .target import Done, Earlier, Target, open_target
from .work import Work
from .writing import FileWriter, file_sha256, write_pieces, write_small

_MOST_WORKERS = 8  # by then reading and hashing are the limit


def run(
    plan: Plan,
    output: Path,
    work: Work,
    access: HubAccess,
    progress: Progress,
) -> tuple[Plan, str, int]:
    """Convert what was planned into `output`; arguments are those of `convert`.

    Returns the plan over local files, the snapshot's digest, and how many shards an earlier run had finished.
    """
    engine = Engine(_device(work.device), workers=work.workers or min(_MOST_WORKERS, os.cpu_count() or 2))
    for note in plan.notes:
        progress.say(f"note: {note}")
    if engine.device.type == "cpu" and not compiled.available():
        progress.say("note: fp8-convert's compiled code is missing; reinstall with a C compiler to convert faster")
    with open_target(output, plan.paths, force=work.force) as target:
        streamed = work.stream and isinstance(plan.snapshot.files, HubFiles)
        if not streamed:
            target.drop_sources()
        check_space(plan, target, access, streamed=streamed)
        if not streamed:
            plan = _downloaded(plan, access)
        key = conversion_key(plan)
        kept = _kept_shards(plan, target, target.earlier(key))
        if target.begin(
            key,
            shards=[f.path for f in plan.weight_files],
            source_stats={s.source.path: s.source.stat for s in plan.shards if s.source.stat is not None},
            kept=[done for finished in kept.values() for done in finished],
        ):
            progress.say("the unfinished output of another source, recipe or version was dropped")
        _convert_shards(plan, [s for s in plan.shards if s.source.path not in kept], target, engine, progress)
        _check_sources(plan)
        digest = _finish(plan, target, progress)
    return plan, digest, len(kept)


def conversion_key(plan: Plan) -> str:
    """What a resumed run must share with the one before: source, recipe, tool, and so every output header."""
    parts = [plan.recipe.sha256(), plan.snapshot.repo, plan.snapshot.commit]
    shards = [
        (s.source.path, s.source.size, [(f.path, hashlib.sha256(f.header).hexdigest()) for f in s.files])
        for s in plan.shards
    ]
    return hashlib.sha256(json.dumps([parts, shards]).encode()).hexdigest()


def _downloaded(plan: Plan, access: HubAccess) -> Plan:
    """The same plan over local files: a Hub source is downloaded at the commit that was planned."""
    snapshot = fetch(plan.snapshot, access)
    return plan if snapshot is plan.snapshot else make_plan(snapshot, plan.recipe)


# What an earlier run finished


def _kept_shards(plan: Plan, target: Target, earlier: Earlier | None) -> dict[str, list[Done]]:
    """The finished files of every source shard that need not be converted again, by the shard's path.

    A shard whose weights share scales with those of a shard that has changed is done again, since its scales came from
    both.
    """
    if earlier is None:
        return {}
    kept: dict[str, list[Done]] = {}
    stale: set[tuple[str, str]] = set()
    for shard in plan.shards:
        files = [earlier.done.get(file.path) for file in shard.files]
        finished = [done for done in files if done is not None and target.recheck(done)]
        if len(finished) == len(shard.files) and all(_same_source(shard, done) for done in finished):
            kept[shard.source.path] = [replace(done, source_stat=shard.source.stat) for done in finished]
        elif not _untouched(shard, earlier):
            stale |= {(shard.component, group) for group in shard.schedule.measured}
    for shard in plan.shards:
        if stale & {(shard.component, group) for group in shard.schedule.measured}:
            kept.pop(shard.source.path, None)
    return kept


def _same_source(shard: ShardPlan, done: Done) -> bool:
    """Whether the finished file was made from the source as it is now."""
    if shard.source.sha256 is not None:  # the Hub's word for it, at a fixed commit
        return shard.source.sha256 == done.source_sha256
    if shard.source.local is None:  # a Hub's file without a digest: the commit is the same
        return True
    if shard.source.stat == done.source_stat:
        return True
    fd = open_for_reading(shard.source.local, shard.source.path)
    try:
        return file_sha256(fd) == done.source_sha256
    finally:
        os.close(fd)


def _untouched(shard: ShardPlan, earlier: Earlier) -> bool:
    """Whether a shard that is not kept is, as its source goes, still the one that the earlier run may have measured."""
    if shard.source.path in earlier.changed:
        return False
    if shard.source.stat is None:  # streamed from a fixed commit
        return True
    return earlier.source_stats.get(shard.source.path) == shard.source.stat


def _check_sources(plan: Plan) -> None:
    """Raise ResumableError where a local source shard is no longer the one that was planned."""
    for shard in plan.shards:
        if shard.source.local is not None and file_stat(shard.source.local) != shard.source.stat:
            raise _changed(shard)


def _changed(shard: ShardPlan) -> ResumableError:
    return ResumableError(f"{shard.source.path} changed while it was read; run again.")


# Shards


def _convert_shards(
    plan: Plan, wanted: Sequence[ShardPlan], target: Target, engine: Engine, progress: Progress
) -> None:
    """Convert the wanted shards; the others were finished by an earlier run."""
    progress.start(plan.bytes_to_read + plan.bytes_read_twice)
    progress.advance(sum(s.source.size for s in plan.shards) - sum(s.source.size for s in wanted))
    amaxes: dict[str, dict[str, float]] = {}  # by component: transformer_2 has the names of transformer
    with engine, _supply(plan, target, wanted) as supply, ThreadPoolExecutor(1, "fp8-commit") as commits:
        commit: Future[None] | None = None
        for planned in wanted:
            if commit is not None and not supply.ahead:
                commit.result()
            shard = supply.take(planned)
            known = amaxes.setdefault(shard.component, {})
            missing = [group for group in shard.schedule.measured if group not in known]
            if missing:
                siblings = [s for s in plan.shards if s.component == shard.component]
                known |= supply.measure(siblings, missing, engine)
                progress.advance(_bytes_of(siblings, missing))
            written = _write_shard(shard, target, engine, commits, known, plan.input_scales, progress)
            # The end of one shard is synced and read back while the next is converted.
            before, commit = commit, commits.submit(_journal, written, target, supply)
            if before is not None:
                before.result()
        if commit is not None:
            commit.result()
    progress.close()


def _supply(plan: Plan, target: Target, wanted: Sequence[ShardPlan]) -> Supply:
    """Shards that are here, or those of a Hub repository that was only described."""
    files = plan.snapshot.files
    return StreamedSupply(files, target.sources, wanted) if isinstance(files, HubFiles) else Supply()


@dataclass(frozen=True)
class _Written:
    """A shard of which every byte was written; it counts once its files are committed and journalled."""

    shard: ShardPlan
    files: Sequence[tuple[OutputFile, Future[str]]]
    source_sha256: str


def _write_shard(
    shard: ShardPlan,
    target: Target,
    engine: Engine,
    commits: Executor,
    amaxes: Mapping[str, float],
    input_scales: Mapping[str, float],
    progress: Progress,
) -> _Written:
    hasher = hashlib.sha256()
    files: list[tuple[OutputFile, Future[str]]] = []
    written = reported = 0
    chunks = stream_shard(shard, engine, amaxes=amaxes, input_scales=input_scales, hasher=hasher)
    with contextlib.closing(chunks):
        for file in shard.files:
            with contextlib.ExitStack() as on_error:
                writer = on_error.enter_context(FileWriter(target.staged(file.path), file.size, file.path))
                writer.append(memoryview(file.header))
                left = file.stop - file.start
                while left:
                    chunk = next(chunks)
                    writer.append(chunk.data.cpu().numpy().data)
                    left -= chunk.data.numel()
                    written += chunk.data.numel()
                    share = shard.source.size * written // max(1, shard.size)
                    progress.advance(share - reported)
                    reported = share
                if file is shard.files[-1]:
                    if any(chunk.data.numel() for chunk in chunks):  # also reads what is left to hash
                        raise AssertionError(f"{shard.source.path} gives more than was planned")
                    _check_read(shard, hasher.hexdigest(), target)
                files.append((file, commits.submit(_commit, writer)))
                on_error.pop_all()
    progress.advance(shard.source.size - reported)
    return _Written(shard, files, hasher.hexdigest())


def _check_read(shard: ShardPlan, sha256: str, target: Target) -> None:
    """Raise ResumableError where the source that was read is not the one that was planned."""
    source = shard.source
    assert source.local is not None
    if source.sha256 not in (None, sha256):
        target.doubt(source.path)
        advice = f"delete {source.local.resolve()} and run again"
        if source.local.resolve().is_relative_to(target.sources.resolve()):
            source.local.unlink()
            advice = "run the same command again to fetch it anew"
        raise ResumableError(f"{source.path} differs from the Hub's digest, so its download is corrupt; {advice}.")
    if source.stat is not None and file_stat(source.local) != source.stat:
        raise _changed(shard)


def _commit(writer: FileWriter) -> str:
    """Make a written file safe; returns its sha256."""
    with writer:
        return writer.commit()


def _journal(written: _Written, target: Target, supply: Supply) -> None:
    """Journal a shard whose files are safe; its source is needed no more."""
    source = written.shard.source
    for file, sha256 in written.files:
        target.add(Done(file.path, file.size, sha256.result(), source.size, written.source_sha256, source.stat))
    supply.finished(written.shard)


# The end


def _finish(plan: Plan, target: Target, progress: Progress) -> str:
    """Write the small files and the record, and let the snapshot appear; returns its digest."""
    for path, data in plan.files.items():
        target.add(Done(path, len(data), write_small(target.staged(path), data, path)))
    for path in plan.sidecars:
        size, pieces = plan.snapshot.files.sizes()[path], plan.snapshot.files.pieces(path)
        target.add(Done(path, size, write_pieces(target.staged(path), size, pieces, path)))
    record = make_record(plan, {path: target.done[path] for path in plan.paths})
    write_small(target.staged(RECORD_FILE), encode_json(record.to_json()), RECORD_FILE)
    target.publish([*plan.paths, RECORD_FILE], progress.finishing)
    return record.record_sha256


def _bytes_of(shards: Sequence[ShardPlan], domains: Sequence[str]) -> int:
    return sum(t.info.nbytes for s in shards for t in s.tensors if scale_domain(t) in domains)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConvertError("No CUDA device was found; use --device cpu, which gives the same bytes.")
    return torch.device(name)
