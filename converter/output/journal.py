"""The journal of a conversion that is under way: what an interrupted one has finished, for whoever resumes or lists it.

JSON lines in OUT/.fp8-convert/journal.jsonl: the first about the run, then one for each finished file (`Done`), and one
for each source shard that was found to have changed. Whatever version wrote it, and wherever a kill cut it short, what
can be understood counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..format.layout import STAGING
from ..format.reader import read_value
from ..format.record import RecordedError
from .writing import disk_errors, write_small

JOURNAL_FILE = "journal.jsonl"


class Source(NamedTuple):
    """A source shard that was read; `stat` only speeds resuming."""

    path: str
    size: int
    sha256: str
    stat: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Done:
    """A finished output file. A shard's `source_*` tell what it was made from; `source_stat` only speeds resuming.

    others: the source shards beside that one, of a file that several make. errors: what its codes miss, by module.
    """

    path: str
    size: int
    sha256: str
    source_size: int | None = None
    source_sha256: str | None = None
    source_stat: tuple[int, ...] | None = None
    others: tuple[Source, ...] = ()
    errors: Mapping[str, RecordedError] = field(default_factory=dict)


@dataclass(frozen=True)
class Journal:
    """What an earlier, interrupted run left. `done` is not yet checked against the disk.

    key: of its source, recipe and tool. shards: output shards to come, None where an older version did not say.
    source_stats: of the local source shards, when that run was planned. replaces: files that stood in the folder before
    and are this project's. changed: source shards that were found to be other ones than were measured. paths: every
    file that a line names.
    """

    key: str | None
    shards: tuple[str, ...] | None
    source_stats: Mapping[str, tuple[int, ...]]
    replaces: frozenset[str]
    done: Mapping[str, Done]
    changed: frozenset[str]
    paths: frozenset[str]


def journal_file(folder: Path) -> Path:
    """Where the journal of an output folder lies."""
    return folder / STAGING / JOURNAL_FILE


def read_journal(folder: Path) -> Journal | None:
    """The journal of an output folder, None where there is none."""
    lines = [*_lines(journal_file(folder))]
    if not lines:
        return None
    header, *entries = lines
    shards, stats, replaces = header.get("shards"), header.get("source_stats"), header.get("replaces")
    return Journal(
        key=key if isinstance(key := header.get("key"), str) else None,
        shards=tuple(_texts(shards)) if isinstance(shards, list) else None,
        source_stats={p: tuple(s) for p, s in stats.items() if isinstance(s, list)} if isinstance(stats, dict) else {},
        replaces=frozenset(_texts(replaces)),
        done={done.path: done for entry in entries if (done := _done(entry)) is not None},
        changed=frozenset(_texts([entry.get("changed") for entry in entries])),
        paths=frozenset(_texts([entry.get("path") for entry in entries])),
    )


def journalled_key(folder: Path) -> str | None:
    """The key of the conversion that an interruption left in the folder, None if there is none."""
    journal = read_journal(folder)
    return journal.key if journal else None


def begin_journal(
    folder: Path,
    key: str,
    *,
    shards: Collection[str],
    source_stats: Mapping[str, tuple[int, ...]],
    replaces: Collection[str],
    done: Iterable[Done],
) -> None:
    """Write a journal anew; the arguments are the fields of `Journal`. Raises ResumableError."""
    header = {"key": key, "shards": [*shards], "source_stats": {**source_stats}, "replaces": sorted(replaces)}
    lines = [header, *map(asdict, done)]
    file = journal_file(folder)
    write_small(file, "".join(json.dumps(line) + "\n" for line in lines).encode(), str(file))


def add_done(folder: Path, done: Done) -> None:
    """Journal a finished file. Raises ResumableError."""
    _append(journal_file(folder), asdict(done))


def add_changed(folder: Path, source: str) -> None:
    """Journal that a source shard is not what it was taken for: what was measured in it counts no more."""
    _append(journal_file(folder), {"changed": source})


def _append(file: Path, line: Mapping[str, Any]) -> None:
    with disk_errors(str(file)), open(file, "a") as journal:
        journal.write(json.dumps(line) + "\n")
        journal.flush()
        os.fsync(journal.fileno())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that can be understood: what one that a kill cut short would have said is done again."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry


def _done(entry: Mapping[str, Any]) -> Done | None:
    """The finished file that a line tells of, None for any other line."""
    stated = entry.get("source_stat")
    try:
        others = tuple(_source(*values) for values in entry.get("others", ()))
        errors = read_value(Mapping[str, RecordedError], entry.get("errors", {}), "errors")
        done = Done(**{**entry, "source_stat": tuple(stated) if stated else None, "others": others, "errors": errors})
    except (TypeError, ValueError):
        return None
    return done if isinstance(done.path, str) else None


def _source(path: str, size: int, sha256: str, stat: list[int] | None) -> Source:
    return Source(path, size, sha256, tuple(stat) if stat else None)


def _texts(values: Any) -> Iterator[str]:
    return (value for value in values if isinstance(value, str)) if isinstance(values, list) else iter(())
