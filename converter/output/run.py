"""One conversion from its plan to the finished snapshot: shards, small files, record, and the last rename.

Several shards are under way at the same time, as many as `capacity` says; the end of each (sync, rename) runs beside
the conversion of others, and they are journalled in the plan's order. A source that changes meanwhile stops the run:
weights that share a scale may lie in several shards, and what was measured in one must still be what is converted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..format.layout import RECORD_FILE, RECORD_FORMAT, WEIGHT, encode_json
from ..format.record import RecordedError
from ..plan.plan import ComponentPlan, Plan, ShardPlan
from ..plan.sharding import OutputFile
from ..plan.single_file import SingleFile
from ..snapshot.files import Files, LocalFiles, SourceFile, content_sha256
from ..snapshot.hub import HubFiles
from ..snapshot.locate import fetch
from ..stream import compiled
from ..stream.component_stream import ShardStream, begin_shards
from ..stream.engine import Engine
from ..stream.supply import FolderSupply, StreamedSupply, Supply
from ..telling.errors import ConvertError, ResumableError
from ..telling.progress import Progress, TakingTurns
from .capacity import capacity
from .journal import Done, Journal, Source
from .placed import PlacedWriter
from .record import make_record
from .space import SPARE_BYTES, check_space
from .target import Target, open_target
from .under_way import UnderWay
from .work import Work
from .writing import FileWriter, sha256_at, write_pieces, write_small


def run(
    plan: Plan,
    files: Files,
    output: Path,
    work: Work,
    progress: Progress,
    *,
    spare_bytes: int = SPARE_BYTES,
) -> tuple[str, int]:
    """Convert what was planned, from the source's `files`, into `output`.

    spare_bytes: room that must be left on the disk. Returns the snapshot's digest, and how many shards an earlier run
    had finished.
    """
    device = _device(work.device)
    for note in plan.notes:
        progress.say(f"note: {note}")
    if device.type == "cpu" and not compiled.available():
        progress.say("note: fp8-convert's compiled code is missing; reinstall with a C compiler to convert faster")
    with open_target(output, plan.paths, force=work.force) as target:
        streamed = work.stream and isinstance(files, HubFiles)
        if not streamed:
            target.drop_sources()
        check_space(plan, files, target, streamed=streamed, spare_bytes=spare_bytes)
        with _supply(plan, files, target, streamed=streamed) as supply:
            kept = _take_up(plan, target, supply, progress)
            wanted = [s for s in plan.shards if s.source.path not in kept]
            at_once = capacity(work, ahead=supply.ahead)
            with Engine(device, workers=at_once.workers, shards=min(at_once.shards, max(1, len(wanted)))) as engine:
                _convert_shards(plan, wanted, target, supply, engine, TakingTurns(progress), work.read_back)
        _check_sources(plan, supply)
        digest = _finish(plan, target, supply.files, work.read_back, progress)
    return digest, len(kept)


def conversion_key(plan: Plan) -> str:
    """What a resumed run must share with the one before: source, recipe, tool, format, and so every output header."""
    parts = [RECORD_FORMAT, plan.recipe.sha256(), plan.snapshot.repo, plan.snapshot.commit]
    shards = [
        (s.source.path, s.source.size, [(f.path, hashlib.sha256(f.header).hexdigest()) for f in s.files])
        for s in plan.shards
    ]
    singles = [(f.path, hashlib.sha256(f.header).hexdigest()) for c in plan.components if c.single for f in c.files]
    return hashlib.sha256(json.dumps([parts, shards, *singles]).encode()).hexdigest()


def _supply(plan: Plan, files: Files, target: Target, *, streamed: bool) -> Supply:
    """Where the plan's shards come from; a Hub source that is not streamed is downloaded first, at its commit."""
    if not streamed:
        return FolderSupply(fetch(plan.snapshot, files))
    assert isinstance(files, HubFiles)
    return StreamedSupply(files, target.sources)


# What an earlier run finished


def _take_up(plan: Plan, target: Target, supply: Supply, progress: Progress) -> dict[str, list[Done]]:
    """Begin the journal with what an earlier run of the same conversion left, which is returned."""
    key = conversion_key(plan)
    kept = _kept_shards(plan, target, supply, target.earlier(key))
    here = {s.source.path: source for s in plan.shards if (source := supply.find(s.source)) is not None}
    if target.begin(
        key,
        shards=[f.path for f in plan.weight_files],
        source_stats={path: source.stat for path, source in here.items()},
        kept=[done for finished in kept.values() for done in finished],
    ):
        progress.say("the unfinished output of another source, recipe or version was dropped")
    return kept


def _kept_shards(plan: Plan, target: Target, supply: Supply, earlier: Journal | None) -> dict[str, list[Done]]:
    """The finished files of every source shard that need not be converted again, by the shard's path.

    A shard whose weights share scales with those of a shard that has changed is done again, since its scales came from
    both.
    """
    if earlier is None:
        return {}
    kept: dict[str, list[Done]] = {}
    for component in plan.components:
        if component.single is not None and (whole := _kept_single(component, target, supply, earlier)) is not None:
            kept |= {shard.source.path: [whole] for shard in component.shards}
    stale: set[tuple[str, str]] = set()
    for shard in (s for c in plan.components if c.single is None for s in c.shards):
        source = supply.find(shard.source)
        files = [earlier.done.get(file.path) for file in shard.files]
        finished = [done for done in files if done is not None and target.recheck(done)]
        if len(finished) == len(shard.files) and all(_same_source(shard, source, _source(done)) for done in finished):
            kept[shard.source.path] = [replace(done, source_stat=source.stat if source else None) for done in finished]
        elif not _untouched(shard, source, earlier):
            stale |= {(shard.component, group) for group in shard.schedule.measured}
    for shard in plan.shards:
        if stale & {(shard.component, group) for group in shard.schedule.measured}:
            kept.pop(shard.source.path, None)
    return kept


def _kept_single(component: ComponentPlan, target: Target, supply: Supply, earlier: Journal) -> Done | None:
    """The component's one file, if an earlier run finished it from the shards as they are now."""
    done = earlier.done.get(component.files[0].path)
    if done is None or not target.recheck(done):
        return None
    read = {source.path: source for source in (_source(done, component.shards[0].source.path), *done.others)}
    for shard in component.shards:
        before = read.get(shard.source.path)
        if before is None or not _same_source(shard, supply.find(shard.source), before):
            return None
    carried = [extra.file for extra in (component.single.extras if component.single else ()) if extra.file]
    if any(path not in read or read[path].sha256 != content_sha256(supply.files, path) for path in carried):
        return None
    return done


def _source(done: Done, path: str = "") -> Source:
    """What the finished file says of the first source shard that it was made from."""
    return Source(path, done.source_size or 0, done.source_sha256 or "", done.source_stat)


def _same_source(shard: ShardPlan, source: SourceFile | None, before: Source) -> bool:
    """Whether a finished file was made from the source as it is now; `before` is what it says of it."""
    if shard.source.sha256 is not None:  # the Hub's word for it, at a fixed commit
        return shard.source.sha256 == before.sha256
    if source is None:  # a Hub's file without a digest: the commit is the same
        return True
    if source.stat == before.stat:
        return True
    return sha256_at(source.path, source.where) == before.sha256


def _untouched(shard: ShardPlan, source: SourceFile | None, earlier: Journal) -> bool:
    """Whether a shard that is not kept is, as its source goes, still the one that the earlier run may have measured."""
    if shard.source.path in earlier.changed:
        return False
    if source is None:  # streamed from a fixed commit
        return True
    return earlier.source_stats.get(shard.source.path) == source.stat


def _check_sources(plan: Plan, supply: Supply) -> None:
    """Raise ResumableError where a source shard on this machine is no longer the one that was planned."""
    for shard in plan.shards:
        if (source := supply.find(shard.source)) is not None:
            source.check_unchanged()


# Shards


def _convert_shards(
    plan: Plan,
    wanted: Sequence[ShardPlan],
    target: Target,
    supply: Supply,
    engine: Engine,
    progress: Progress,
    read_back: bool,
) -> None:
    """Convert the wanted shards; the others were finished by an earlier run."""
    progress.start(plan.bytes_to_read + plan.bytes_read_twice)
    progress.advance(sum(s.source.size for s in plan.shards) - sum(s.source.size for s in wanted))
    supply.want([s.source for s in wanted])

    def streams(component: ComponentPlan) -> Iterator[ShardStream]:
        mine = [s for s in wanted if s.component == component.source.name]
        return begin_shards(
            component, supply, engine, shards=mine, hashed=True, with_errors=True, on_measured=progress.advance
        )

    with ThreadPoolExecutor(engine.shards, "fp8-commit") as commits:

        def write(stream: ShardStream, check: Callable[[], None]) -> _Written:
            with contextlib.closing(stream.chunks):
                return _write_shard(stream, target, supply, commits, progress, read_back, check)

        shards = UnderWay(
            engine.shards,
            write,
            lambda written: _journal(written, target, supply),
            unfinished=2 * engine.shards if supply.ahead else 1,
        )
        shards.run(stream for c in plan.components if c.single is None for stream in streams(c))
    for component in plan.components:
        if component.single is not None and any(s.component == component.source.name for s in wanted):
            _write_single(component.single, streams(component), target, supply, progress)
    progress.close()


@dataclass(frozen=True)
class _Written:
    """A shard of which every byte was written; it counts once its files are committed and journalled."""

    shard: ShardPlan
    source: SourceFile
    files: Sequence[tuple[OutputFile, Future[str]]]
    source_sha256: str
    errors: Mapping[str, RecordedError]


def _write_shard(
    stream: ShardStream,
    target: Target,
    supply: Supply,
    commits: Executor,
    progress: Progress,
    read_back: bool,
    check: Callable[[], None],
) -> _Written:
    """check: raises where the run is to stop."""
    shard, chunks = stream.plan, stream.chunks
    files: list[tuple[OutputFile, Future[str]]] = []
    written = reported = 0
    for file in shard.files:
        with contextlib.ExitStack() as on_error:
            writer = FileWriter(target.staged(file.path), file.size, file.path, read_back=read_back)
            on_error.enter_context(writer)
            writer.append(memoryview(file.header))
            left = file.stop - file.start
            while left:
                check()
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
                _check_read(stream, target, supply)
            files.append((file, commits.submit(_commit, writer)))
            on_error.pop_all()
    progress.advance(shard.source.size - reported)
    return _Written(shard, stream.source, files, stream.sha256, stream.errors)


def _write_single(
    single: SingleFile, streams: Iterator[ShardStream], target: Target, supply: Supply, progress: Progress
) -> None:
    """Write every shard of a component into its one file, which counts once it is whole."""
    file = single.file
    sources: list[Source] = []
    carried: list[Source] = []
    errors: dict[str, RecordedError] = {}
    with PlacedWriter(target.staged(file.path), file.size, file.path) as writer:
        writer.write(memoryview(file.header), 0)
        for extra in single.extras:
            if extra.file is not None:
                position, digest = len(file.header) + single.start_of(extra), hashlib.sha256()
                for piece in supply.files.pieces(extra.file):
                    writer.write(memoryview(piece), position)
                    position += len(piece)
                    digest.update(piece)
                carried.append(Source(extra.file, extra.nbytes, digest.hexdigest()))
        for stream in streams:
            shard, outputs = stream.plan.source, stream.plan.schedule.outputs
            written = reported = 0
            with contextlib.closing(stream.chunks) as chunks:
                for chunk in chunks:
                    place = len(file.header) + single.places[chunk.name] + chunk.offset
                    writer.write(chunk.data.cpu().numpy().data, place)
                    written += chunk.data.numel()
                    share = shard.size * written // max(1, outputs[-1].end)
                    progress.advance(share - reported)
                    reported = share
            progress.advance(shard.size - reported)
            _check_read(stream, target, supply)
            sources.append(Source(shard.path, shard.size, stream.sha256, stream.source.stat))
            errors |= stream.errors
            supply.done(shard)  # a file that is interrupted begins anew, and fetches it again
        sha256 = writer.commit()
    first, *others = (*sources, *carried)
    target.add(Done(file.path, file.size, sha256, first.size, first.sha256, first.stat, tuple(others), errors))


def _check_read(stream: ShardStream, target: Target, supply: Supply) -> None:
    """Raise ResumableError where the source that was read is not the one that was planned."""
    planned = stream.plan.source
    if planned.sha256 not in (None, stream.sha256):
        target.doubt(planned.path)
        if isinstance(supply.files, LocalFiles) and planned.path in supply.files.digests:
            raise ConvertError(
                f"{planned.path} has another sha256 than the record of its snapshot says; download or convert it again."
            )
        advice = supply.discard(planned)
        raise ResumableError(f"{planned.path} differs from the Hub's digest, so its download is corrupt; {advice}.")
    stream.source.check_unchanged()


def _commit(writer: FileWriter) -> str:
    """Make a written file safe; returns its sha256."""
    with writer:
        return writer.commit()


def _journal(written: _Written, target: Target, supply: Supply) -> None:
    """Journal a shard whose files are safe; its source is needed no more."""
    source = written.source
    size = written.shard.source.size
    for file, sha256 in written.files:
        names = (output.name.removesuffix(WEIGHT) for output in file.outputs)
        errors = {name: written.errors[name] for name in names if name in written.errors}
        target.add(Done(file.path, file.size, sha256.result(), size, written.source_sha256, source.stat, errors=errors))
    supply.done(written.shard.source)


# The end


def _finish(plan: Plan, target: Target, files: Files, read_back: bool, progress: Progress) -> str:
    """Write the small files and the record, and let the snapshot appear; returns its digest."""
    for path, data in plan.files.items():
        target.add(Done(path, len(data), write_small(target.staged(path), data, path, read_back=read_back)))
    for path, size in plan.sidecars.items():
        sha256 = write_pieces(target.staged(path), size, files.pieces(path), path, read_back=read_back)
        target.add(Done(path, size, sha256))
    record = make_record(plan, {path: target.done[path] for path in plan.paths})
    write_small(target.staged(RECORD_FILE), encode_json(record.to_json()), RECORD_FILE, read_back=read_back)
    target.publish([*plan.paths, RECORD_FILE], progress.finishing)
    return record.record_sha256


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConvertError("No CUDA device was found; use --device cpu, which gives the same bytes.")
    return torch.device(name)
