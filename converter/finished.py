"""Is a finished snapshot what a conversion would give? Then the command that is run again has nothing to do."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .format import layout
from .format.reader import as_json, read_value
from .format.record import Record, RecordedLora
from .output.folder import refuse_foreign
from .output.writing import sha256_at
from .plan.plan import Plan
from .plan.recipe import tool_version
from .snapshot.files import Files, content_sha256
from .telling.errors import ConvertError
from .telling.progress import Progress
from .verification import verify


def check_finished(record: Record, plan: Plan, files: Files, folder: Path, *, check: bool, progress: Progress) -> None:
    """Raise ConvertError unless the snapshot in `folder`, whose record is given, is what `plan` would write.

    files: the source's. A Hub source is the same at the same commit; a local one is read and its digests are compared.
    Of the output, files and sizes are looked at; with `check` every digest too, and files that are not this project's.
    """
    differences = [*_recipe_differences(record, plan), *_source_differences(record, plan, files, progress)]
    if differences := differences or [*_small_file_differences(record, plan, files)]:
        raise ConvertError(
            f"{folder} holds a finished FP8 snapshot made otherwise ({'; '.join(differences[:3])}); pass --force to "
            "replace it, or choose another folder."
        )
    if check:
        refuse_foreign(folder)
    damage = [path for path, entry in record.files.items() if _size(folder / path) != entry.size]
    if not damage and check:
        damage = [finding.path for finding in verify(folder, progress=progress).findings]
    if damage:
        refuse_foreign(folder)  # or --force would, and only then
        raise ConvertError(
            f"{folder} holds the finished snapshot, but it is damaged: {damage[0]} is not as it was written; run "
            "`fp8-convert verify` to see all, or pass --force to convert again."
        )


def _recipe_differences(record: Record, plan: Plan) -> Iterator[str]:
    if record.tool_version != tool_version():
        yield f"by version {record.tool_version:.20}, and this is {tool_version()}"
    if record.format != layout.RECORD_FORMAT:
        yield f"its record has the format {record.format}, and this version writes {layout.RECORD_FORMAT}"
    recorded = as_json(record.recipe)
    for key, value in plan.recipe.to_json().items():
        stated = recorded.get(key)
        if stated != value and key == "merged_loras":
            now = read_value(tuple[RecordedLora, ...], value, "the LoRAs")
            yield f"it was made with {_listed(record.recipe.merged_loras)}, and now it is {_listed(now)}"
        elif stated != value:
            yield f"{key} was {stated!r:.80} and is now {value!r:.80}"


def _listed(loras: Iterable[RecordedLora]) -> str:
    return ", ".join(map(str, loras)) or "no LoRA"


def _source_differences(record: Record, plan: Plan, files: Files, progress: Progress) -> Iterator[str]:
    snapshot, source = plan.snapshot, record.source
    for key, value in (("repo", snapshot.repo), ("commit", snapshot.commit), ("pipeline", snapshot.pipeline)):
        if (was := getattr(source, key)) != value:
            yield f"its source's {key} was {was!s:.80} and is now {value!s:.80}"
            return
    sizes = {shard.source.path: shard.source.size for shard in plan.shards}
    sizes |= {e.file: e.nbytes for c in plan.components if c.single for e in c.single.extras if e.file}
    stated = {path: part for entry in record.shards.values() for path, part in entry.sources.items()}
    for path in sorted(stated.keys() ^ sizes.keys()):
        yield f"its source {'had' if path in stated else 'had no'} {path}"
    if snapshot.commit is not None:
        return  # a commit does not change
    progress.start(plan.bytes_to_read)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "fp8-hash") as threads:
        both = sorted(stated.keys() & sizes.keys())
        for path, sha256 in zip(both, threads.map(lambda path: _sha256(files, path), both), strict=True):
            progress.advance(sizes[path])
            if sha256 != stated[path].source_sha256:
                yield f"its source's {path} has changed"
    progress.close()


def _small_file_differences(record: Record, plan: Plan, files: Files) -> Iterator[str]:
    """Of all but shards, for the same recipe and shards, of which configs and indices are made."""
    if plan.snapshot.commit is not None:
        return
    stated = {path: entry for path, entry in record.files.items() if path not in record.shards}
    for path in sorted(stated.keys() ^ {*plan.files, *plan.sidecars}):
        yield f"its source {'had' if path in stated else 'had no'} {path}"
    for path, entry in stated.items():
        if path in plan.files and hashlib.sha256(plan.files[path]).hexdigest() != entry.sha256:
            yield f"its source gives another {path} now"
        elif path in plan.sidecars and content_sha256(files, path) != entry.sha256:
            yield f"its source's {path} has changed"


def _sha256(files: Files, path: str) -> str:
    local = files.local(path)
    assert local is not None
    return sha256_at(local, path)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
