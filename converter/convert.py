"""`convert`: from a source and a few options to an FP8 snapshot on disk. The table of contents of a conversion."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import native
from .errors import ConvertError, ResumableError
from .hub import HubFiles
from .layout import RECORD_FILE, Block, encode_json
from .locate import SourceOptions, fetch, open_source
from .manifest import choose_manifest, load_manifest
from .notebook import one_line
from .plan import Plan, ShardPlan, make_plan, plan_html
from .progress import Progress, Silent
from .quantities import change
from .reading import open_for_reading
from .recipe import Recipe
from .record import make_record
from .scales import read_input_scales
from .schedule import scale_domain
from .source import Snapshot
from .space import check_space
from .stream import Engine, stream_shard
from .supply import StreamedSupply, Supply
from .target import Done, Target, open_target, source_stat
from .writing import FileWriter, file_sha256, write_small

_MOST_WORKERS = 8  # by then reading and hashing are the limit


@dataclass(frozen=True, repr=False)
class Result:
    """What a conversion did. Bytes are those of the weights' files; `peak_rss` is the process's, in bytes."""

    plan: Plan
    output: Path
    bytes_before: int
    bytes_after: int
    seconds: float
    resumed_shards: int
    peak_rss: int

    def __repr__(self) -> str:
        return one_line(self, self._summary)

    def _repr_html_(self) -> str:
        return plan_html(self.plan, self._summary)

    @property
    def _summary(self) -> str:
        return f"{self.output}: {change(self.bytes_before, self.bytes_after)} in {self.seconds:.1f} s"

    @property
    def gigabytes_per_second(self) -> float:
        """Source bytes over the whole time, download included."""
        return self.bytes_before / 1e9 / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The summary for scripts; the plan's tensors are left out."""
        return {
            "output": str(self.output),
            "manifest": self.plan.recipe.manifest.name,
            "notes": list(self.plan.notes),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "seconds": round(self.seconds, 3),
            "gigabytes_per_second": round(self.gigabytes_per_second, 3),
            "resumed_shards": self.resumed_shards,
            "peak_rss": self.peak_rss,
        }


def plan_conversion(
    source: str | os.PathLike[str],
    *,
    quantization: str = "fp8",
    manifest: str | None = None,
    ignored_layers: Sequence[str] = (),
    components: Sequence[str] = (),
    compact: bool = False,
    weight_block_size: Sequence[int] | None = None,
    activation_scheme: str = "dynamic",
    input_scales: str | os.PathLike[str] | None = None,
    options: SourceOptions | None = None,
) -> Plan:
    """Plan a conversion from headers alone; a Hub id is not downloaded. Arguments are those of `convert`."""
    if quantization != "fp8":
        raise ConvertError(f"The quantization {quantization!r} is unknown; the only one is fp8.")
    snapshot = open_source(source, options or SourceOptions())
    classes = {c.name: c.class_name for c in snapshot.components}
    recipe = Recipe(
        manifest=load_manifest(manifest) if manifest else choose_manifest(snapshot.repo, snapshot.pipeline, classes),
        ignored_layers=tuple(ignored_layers),
        components=tuple(components),
        compact=compact,
        block=_block(weight_block_size),
        activation_scheme=activation_scheme,
        input_scales=read_input_scales(Path(input_scales)) if input_scales is not None else None,
    )
    return make_plan(snapshot, recipe)


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quantization: str = "fp8",
    manifest: str | None = None,
    ignored_layers: Sequence[str] = (),
    components: Sequence[str] = (),
    compact: bool = False,
    weight_block_size: Sequence[int] | None = None,
    activation_scheme: str = "dynamic",
    input_scales: str | os.PathLike[str] | None = None,
    device: str = "auto",
    workers: int | None = None,
    stream: bool = False,
    force: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Convert a diffusers snapshot into an FP8 snapshot.

    source: a folder (a pipeline, or one component) or a Hub repo id. output: the folder to create.
    manifest: a shipped manifest's name or a path to a TOML file; None chooses by repo id and class names.
    ignored_layers: patterns of DiT layers that stay in the source dtype, beside the manifest's.
    components: restricts the conversion; the other components are copied.
    compact: FP8 storage for the layers that W8A8 must skip, where the manifest names them.
    weight_block_size: (rows, columns) of a scale's block in the DiT; None is the manifest's choice (per tensor).
    activation_scheme: "dynamic", or "static" with input_scales, a safetensors file of `NAME.input_scale` scalars.
    device: "cpu", "cuda" or "auto"; the bytes are the same. workers: CPU threads for the arithmetic.
    stream: for a Hub id, download shard by shard beside the conversion and keep none; needs room for two.
    force: replace a finished FP8 snapshot. revision, token, cache_dir, local_files_only: as in huggingface_hub.
    variant: takes `*.VARIANT.safetensors` where a component has them.

    Memory stays bounded whatever the model's size. An interrupted conversion is resumed by the same call; an
    unfinished one never looks like a snapshot. Raises ConvertError with a sentence for the user.
    """
    started = time.monotonic()
    progress = progress or Silent()
    options = SourceOptions(revision, token, cache_dir, local_files_only, variant)
    plan = plan_conversion(
        source,
        quantization=quantization,
        manifest=manifest,
        ignored_layers=ignored_layers,
        components=components,
        compact=compact,
        weight_block_size=weight_block_size,
        activation_scheme=activation_scheme,
        input_scales=input_scales,
        options=options,
    )
    _check_outside(Path(output), source)
    engine = Engine(_device(device), workers=workers or min(_MOST_WORKERS, os.cpu_count() or 2))
    for note in plan.notes:
        progress.say(f"note: {note}")
    if engine.device.type == "cpu" and not native.compiled():
        progress.say("note: fp8-convert's compiled code is missing; install it anew beside a C compiler to be faster")
    with open_target(Path(output), force=force) as target:
        streamed = stream and isinstance(plan.snapshot.files, HubFiles)
        if not streamed:
            target.drop_sources()
        check_space(plan, target, options, streamed=streamed)
        if not streamed:
            plan = _downloaded(plan, options)
        if target.resume(_key(plan)):
            progress.say("the unfinished output of another source, recipe or version was dropped")
        resumed = _convert_shards(plan, target, engine, progress)
        _finish(plan, target)
    return Result(
        plan,
        Path(output),
        plan.bytes_to_read,
        sum(s.size for s in plan.shards),
        time.monotonic() - started,
        resumed,
        peak_rss(),
    )


def peak_rss() -> int:
    """The process's peak resident memory in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _convert_shards(plan: Plan, target: Target, engine: Engine, progress: Progress) -> int:
    """Convert every shard that an earlier run has not finished; returns how many were kept."""
    progress.start(plan.bytes_to_read + plan.bytes_read_twice)
    wanted = [s for s in plan.shards if not ((done := target.recheck(s.path)) and _same_source(s, done))]
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
            written = _write_shard(shard, target, engine, known, plan.input_scales, progress)
            # The end of one shard is synced and read back while the next is converted.
            before, commit = commit, commits.submit(_commit, written, target, supply)
            if before is not None:
                before.result()
        if commit is not None:
            commit.result()
    progress.close()
    return len(plan.shards) - len(wanted)


def _supply(plan: Plan, target: Target, wanted: Sequence[ShardPlan]) -> Supply:
    """Shards that are here, or those of a Hub repository that was only described."""
    files = plan.snapshot.files
    return StreamedSupply(files, target.sources, wanted) if isinstance(files, HubFiles) else Supply()


@dataclass(frozen=True)
class _Written:
    """A shard of which every byte was written; it counts once its writer has committed it."""

    shard: ShardPlan
    writer: FileWriter
    source_sha256: str
    source_stat: tuple[int, ...]


def _write_shard(
    shard: ShardPlan,
    target: Target,
    engine: Engine,
    amaxes: Mapping[str, float],
    input_scales: Mapping[str, float],
    progress: Progress,
) -> _Written:
    assert shard.source.local is not None
    stat = source_stat(shard.source.local)
    hasher = hashlib.sha256()
    reported = 0
    with contextlib.ExitStack() as on_error:
        writer = on_error.enter_context(FileWriter(target.staged(shard.path), shard.size, shard.path))
        writer.append(memoryview(shard.header))
        written = len(shard.header)
        for chunk in stream_shard(shard, engine, amaxes=amaxes, input_scales=input_scales, hasher=hasher):
            writer.append(chunk.data.cpu().numpy().data)
            written += chunk.data.numel()
            share = shard.source.size * written // max(1, shard.size)
            progress.advance(share - reported)
            reported = share
        source_sha256 = hasher.hexdigest()
        if shard.source.sha256 not in (None, source_sha256):
            advice = f"delete {shard.source.local.resolve()} and run again"
            if shard.source.local.resolve().is_relative_to(target.sources.resolve()):
                shard.source.local.unlink()
                advice = "run the same command again to fetch it anew"
            raise ResumableError(
                f"{shard.source.path} differs from the Hub's digest, so its download is corrupt; {advice}."
            )
        if source_stat(shard.source.local) != stat:
            raise ResumableError(f"{shard.source.path} changed while it was read; run again.")
        progress.advance(shard.source.size - reported)
        on_error.pop_all()
    return _Written(shard, writer, source_sha256, stat)


def _commit(written: _Written, target: Target, supply: Supply) -> None:
    """Make a written shard safe and journal it; its source is needed no more."""
    shard = written.shard
    with written.writer as writer:
        sha256 = writer.commit()
    size, digest, stat = shard.source.size, written.source_sha256, written.source_stat
    target.add(Done(shard.path, shard.size, sha256, size, digest, stat))
    supply.finished(shard)


def _finish(plan: Plan, target: Target) -> None:
    """Write the small files and the record, and let the snapshot appear."""
    for path, data in plan.files.items():
        target.add(Done(path, len(data), write_small(target.staged(path), data, path)))
    for path in plan.sidecars:
        data = plan.snapshot.files.read(path)
        target.add(Done(path, len(data), write_small(target.staged(path), data, path)))
    files = {*(s.path for s in plan.shards), *plan.files, *plan.sidecars}
    record = encode_json(make_record(plan, {p: d for p, d in target.done.items() if p in files}))
    write_small(target.staged(RECORD_FILE), record, RECORD_FILE)
    target.publish([*files, RECORD_FILE])


def _downloaded(plan: Plan, options: SourceOptions) -> Plan:
    """The same plan over local files: a Hub source is downloaded at the commit that was planned."""
    snapshot: Snapshot = fetch(plan.snapshot, options)
    return plan if snapshot is plan.snapshot else make_plan(snapshot, plan.recipe)


def _key(plan: Plan) -> str:
    """What a resumed run must share with the one before: source, recipe, tool, and so every output header."""
    parts = [plan.recipe.sha256(), plan.snapshot.repo, plan.snapshot.commit]
    shards = [(s.source.path, s.source.size, s.path, hashlib.sha256(s.header).hexdigest()) for s in plan.shards]
    return hashlib.sha256(json.dumps([parts, shards]).encode()).hexdigest()


def _same_source(shard: ShardPlan, done: Done) -> bool:
    """Whether the finished shard was made from the source as it is now."""
    if shard.source.sha256 is not None:  # the Hub's word for it, at a fixed commit
        return shard.source.sha256 == done.source_sha256
    if shard.source.local is None:  # a Hub's file without a digest: the commit is the same
        return True
    if source_stat(shard.source.local) == done.source_stat:
        return True
    fd = open_for_reading(shard.source.local, shard.source.path)
    try:
        return file_sha256(fd) == done.source_sha256
    finally:
        os.close(fd)


def _check_outside(output: Path, source: str | os.PathLike[str]) -> None:
    if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
        raise ConvertError(f"{output} is the source or lies inside it; choose another folder for the output.")


def _bytes_of(shards: Sequence[ShardPlan], domains: Sequence[str]) -> int:
    return sum(t.info.nbytes for s in shards for t in s.tensors if scale_domain(t) in domains)


def _block(size: Sequence[int] | None) -> Block | None:
    if size is None:
        return None
    if len(size) != 2 or not all(isinstance(n, int) for n in size):
        raise ConvertError(f"The block size {list(size)} must be two numbers, such as 128 128.")
    return size[0], size[1]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ConvertError(f"The device {name!r} is unknown; use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConvertError("No CUDA device was found; use --device cpu, which gives the same bytes.")
    return torch.device(name)
