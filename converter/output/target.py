"""The output folder: who may write it, what is already done, and how a finished snapshot appears in it.

Everything is first written below OUT/.fp8-convert/new and journalled file by file; when all of it is there the files
are renamed into OUT, the file that makes it loadable (model_index.json, or a lone component's config.json) and the
record last. So an unfinished conversion never looks like a snapshot, and the same command resumes it.

Nothing is written through a symbolic link inside OUT, and no file there is replaced that neither the record nor the
journal names. Files and folders get one constant modification time, so that the same conversion gives the same archive.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..format.layout import MAX_RECORD_BYTES, RECORD_FILE, STAGING
from ..format.untrusted import parse_json, read_whole
from ..snapshot.source import CONFIG, MODEL_INDEX
from ..stream.reading import open_for_reading
from ..telling.errors import ConvertError, ResumableError
from .writing import disk_errors, file_sha256, sync_folder, write_small

_DEFAULT_MTIME = 315532800  # 1980-01-01, the earliest time that every archive format can hold


@dataclass(frozen=True)
class Done:
    """A finished output file. A shard's `source_*` tell what it was made from; `source_stat` only speeds resuming."""

    path: str
    size: int
    sha256: str
    source_size: int | None = None
    source_sha256: str | None = None
    source_stat: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Earlier:
    """What an earlier, interrupted run of the same conversion left. `done` is not yet checked against the disk.

    source_stats: of the local source shards, when that run was planned. changed: source shards that it found to be
    other ones than it had measured.
    """

    done: Mapping[str, Done]
    source_stats: Mapping[str, tuple[int, ...]]
    changed: frozenset[str]


class Target:
    """An output folder under this process's lock. Use `open_target`; a context manager."""

    def __init__(self, folder: Path, lock: FileLock, *, created: bool, force: bool) -> None:
        self.folder = folder
        self._lock = lock
        self._created, self._force = created, force
        self._taken_up = False
        self._staging = folder / STAGING
        self._new = self._staging / "new"
        self._journal = self._staging / "journal.jsonl"
        self._mtime = _mtime()
        self.done: dict[str, Done] = {}

    def __enter__(self) -> Target:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A rerun would meet the same error: nothing is left behind, but for an earlier run's work that this one did
        # not get to.
        permanent = isinstance(error, ConvertError) and not isinstance(error, ResumableError)
        if permanent and (self._taken_up or not self._journal.exists()):
            self._discard()
        self._lock.release()
        if error is None and self._staging.exists():  # where an open lock file cannot be removed (Windows)
            shutil.rmtree(self._staging, ignore_errors=True)

    def staged(self, path: str) -> Path:
        """Where the output file `path` is written first."""
        return self._new / path

    @property
    def sources(self) -> Path:
        """Where source shards lie while they are streamed."""
        return self._staging / "source"

    def earlier(self, key: str) -> Earlier | None:
        """What an earlier run with the same `key` (source, recipe, tool) left, None if there was none.

        Raises ConvertError where another conversion would replace a finished snapshot without `force`.
        """
        header, *lines = _journal_lines(self._journal) or [{}]
        if header.get("key") != key:
            if not self._force and (self.folder / RECORD_FILE).exists():
                raise _finished(self.folder)  # finished since we looked, or under a forced run that was interrupted
            return None
        done = {entry.path: entry for line in lines if (entry := _done_from(line)) is not None}
        changed = frozenset(str(line["changed"]) for line in lines if "changed" in line)
        return Earlier(done, {p: tuple(s) for p, s in header.get("source_stats", {}).items()}, changed)

    def begin(
        self,
        key: str,
        *,
        shards: Collection[str],
        source_stats: Mapping[str, tuple[int, ...]],
        kept: Iterable[Done] = (),
    ) -> bool:
        """Start a journal for this run, which takes over `kept` of the earlier one; returns whether it dropped one.

        shards: the output shards to come, for whoever looks at the unfinished folder.
        """
        self._taken_up = True
        before = _journal_lines(self._journal)
        dropped = bool(before) and before[0].get("key") != key
        if dropped or not before:
            shutil.rmtree(self._new, ignore_errors=True)
        header = {
            "key": key,
            "shards": list(shards),
            "source_stats": dict(source_stats),
            "replaces": sorted(_ours(self.folder)),  # files in OUT that are this project's to replace or remove
        }
        self.done = {done.path: done for done in kept}
        lines = [header, *map(asdict, self.done.values())]
        write_small(self._journal, "".join(json.dumps(line) + "\n" for line in lines).encode(), str(self._journal))
        return dropped

    def recheck(self, done: Done) -> bool:
        """Whether a journalled file is still there with its size and digest."""
        for place in (self._new / done.path, self.folder / done.path):
            if not place.is_file() or place.stat().st_size != done.size:
                continue
            fd = open_for_reading(place, done.path)
            try:
                if file_sha256(fd) == done.sha256:
                    return True
            finally:
                os.close(fd)
        return False

    def add(self, done: Done) -> None:
        """Journal a finished file."""
        self.done[done.path] = done
        self._append(asdict(done))

    def doubt(self, source: str) -> None:
        """Journal that a source shard is not what it was taken for: what was measured in it counts no more."""
        self._append({"changed": source})

    def drop_sources(self) -> None:
        """Delete what an earlier, streamed run left of its source."""
        shutil.rmtree(self.sources, ignore_errors=True)

    def missing_bytes(self, needed: int) -> int:
        """How much of `needed` bytes an earlier run has not yet left below the staging folder."""
        return needed - sum(p.stat().st_size for p in self._staging.rglob("*") if p.is_file())

    def publish(self, paths: list[str], before_the_last: Callable[[], None]) -> None:
        """Rename the finished files into place, those that make the snapshot loadable last; drop what they replace.

        before_the_last: called before the two renames that make the snapshot loadable and finished. Raises
        ResumableError.
        """
        with disk_errors(str(self.folder)):
            self._publish(paths, before_the_last)

    def _publish(self, paths: list[str], before_the_last: Callable[[], None]) -> None:
        last = [path for path in (MODEL_INDEX, CONFIG, RECORD_FILE) if path in paths]
        stale = _ours(self.folder) - set(paths) - {RECORD_FILE}
        # What makes the old snapshot loadable goes first; its record goes last, since it knows what else is stale.
        for path in (MODEL_INDEX, CONFIG, *sorted(stale), RECORD_FILE):
            if (self._new / path).exists() or path in stale:
                (self.folder / path).unlink(missing_ok=True)
        for folder in sorted({(self.folder / p).parent for p in stale}, key=lambda f: len(f.parts), reverse=True):
            _remove_empty(folder, self.folder)
        self._rename(sorted({*paths} - {*last}))
        self._stamp_folders(paths)
        before_the_last()
        self._rename(last)
        sync_folder(self.folder)
        shutil.rmtree(self._staging, ignore_errors=True)
        os.utime(self.folder, (self._mtime, self._mtime))

    def _rename(self, paths: Iterable[str]) -> None:
        for path in paths:
            if (self._new / path).exists():  # else renamed before an interruption
                os.utime(self._new / path, (self._mtime, self._mtime))
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self._new / path, self.folder / path)

    def _stamp_folders(self, paths: Iterable[str]) -> None:
        """Make the renames into the subfolders safe and give these folders their constant time."""
        below = {self.folder / parent for p in paths for parent in Path(p).parents} - {self.folder}
        for folder in sorted(below, key=lambda f: len(f.parts), reverse=True):
            sync_folder(folder)
            os.utime(folder, (self._mtime, self._mtime))

    def _append(self, line: Mapping[str, Any]) -> None:
        with disk_errors(str(self._journal)), open(self._journal, "a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _discard(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._created:
            try:
                self.folder.rmdir()
            except OSError:
                return


def journalled_key(folder: Path) -> str | None:
    """The key of the conversion that an interruption left in the folder, None if there is none."""
    lines = _journal_lines(folder / STAGING / "journal.jsonl")
    return lines[0].get("key") if lines else None


def open_target(folder: Path, paths: Collection[str], *, force: bool) -> Target:
    """Create or take over the output folder and lock it, for a conversion that will write `paths` into it.

    Raises ConvertError if it is not ours to write.
    """
    if folder.exists() and not folder.is_dir():
        raise ConvertError(f"{folder} is a file; name a folder for the output.")
    created = not folder.exists()
    _refuse_links(folder, {*paths, RECORD_FILE})
    _refuse_foreign(folder)
    if not force and (folder / RECORD_FILE).exists() and not (folder / STAGING).exists():
        raise _finished(folder)
    try:
        (folder / STAGING).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / STAGING / "lock")
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConvertError(f"Another fp8-convert is writing {folder}; wait for it or choose another folder.") from error
    except OSError as error:
        raise ConvertError(
            f"{folder} cannot be written ({error.strerror}); choose another folder or fix its permissions."
        ) from error
    return Target(folder, lock, created=created, force=force)


def _refuse_links(folder: Path, paths: Collection[str]) -> None:
    """Raise ConvertError where writing `paths` would follow a link out of the folder, or meet something else."""
    parents = {parent.as_posix() for path in paths for parent in Path(path).parents} - {"."}
    for name in (STAGING, *sorted(parents)):
        mode = _mode(folder / name)
        if mode is not None and stat.S_ISLNK(mode):
            raise ConvertError(f"{folder / name} is a symbolic link, and nothing is written through one; remove it.")
        if mode is not None and not stat.S_ISDIR(mode):
            raise ConvertError(f"{folder / name} is no folder, and the output needs one there; remove it.")
    for path in sorted(paths):
        mode = _mode(folder / path)
        if mode is not None and stat.S_ISDIR(mode):
            raise ConvertError(f"{folder / path} is a folder, and a file of the output goes there; remove it.")
    for where, folders, names in os.walk(folder / STAGING):
        for name in (*folders, *names):
            if Path(where, name).is_symlink():
                raise ConvertError(f"{Path(where, name)} is a symbolic link; remove the folder {folder / STAGING}.")


def _refuse_foreign(folder: Path) -> None:
    """Raise ConvertError for files in the folder that neither its record nor its journal names."""
    present = {*_files(folder)}
    foreign = sorted(present - _ours(folder))
    if not foreign:
        return
    if RECORD_FILE in present and _recorded(folder) is None:
        raise ConvertError(
            f"{folder / RECORD_FILE} is damaged, so that fp8-convert's files cannot be told from others; remove the "
            "folder, or choose another folder."
        )
    if RECORD_FILE not in present and not (folder / STAGING).exists():
        raise ConvertError(f"{folder} exists and is no output of fp8-convert; choose another folder or remove it.")
    more = f" and {len(foreign) - 1} other files" if len(foreign) > 1 else ""
    raise ConvertError(
        f"{folder} holds {foreign[0]}{more}, which fp8-convert did not write there; move what you need away, or choose "
        "another folder."
    )


def _ours(folder: Path) -> set[str]:
    """Files in the folder that its record or its journal names, whatever version wrote them."""
    header, *lines = _journal_lines(folder / STAGING / "journal.jsonl") or [{}]
    replaces = header.get("replaces")
    replaced = {str(path) for path in replaces} if isinstance(replaces, list) else set()
    named = {RECORD_FILE, *(_recorded(folder) or ()), *replaced, *(str(line.get("path")) for line in lines)}
    return named & {*_files(folder)}


def _recorded(folder: Path) -> set[str] | None:
    """The files that the folder's record names, None where there is no record that says."""
    try:
        return {*parse_json(read_whole(folder / RECORD_FILE, RECORD_FILE, MAX_RECORD_BYTES))["files"]}
    except (ConvertError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> Iterator[str]:
    """Every file in the folder by its path below it, links included and never followed; the staging folder left out."""
    for where, folders, names in os.walk(folder):
        below = Path(where).relative_to(folder)
        if below == Path():
            folders[:] = [name for name in folders if name != STAGING]
        for name in (*names, *(f for f in folders if Path(where, f).is_symlink())):
            yield (below / name).as_posix()


def _journal_lines(journal: Path) -> list[dict[str, Any]]:
    if not journal.is_file():
        return []
    lines = []
    for text in journal.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # a line that a kill cut short: what it would have said is done again
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _done_from(line: Mapping[str, Any]) -> Done | None:
    """The finished file that a line of the journal tells of, None for any other line."""
    stated = line.get("source_stat")
    try:
        return Done(**{**line, "source_stat": tuple(stated) if stated else None})
    except TypeError:
        return None


def _finished(folder: Path) -> ConvertError:
    return ConvertError(f"{folder} holds a finished FP8 snapshot; pass --force to replace it.")


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except OSError:
        return None


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove the folder and those above it, up to `top`, as far as they are empty."""
    while folder != top:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _mtime() -> int:
    """The modification time of everything that is written: SOURCE_DATE_EPOCH in seconds, or a constant."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return _DEFAULT_MTIME
    if not text.isascii() or not text.isdigit() or len(text) > 11:
        raise ConvertError(f"SOURCE_DATE_EPOCH is {text!r:.40}, which is no number of seconds; correct or unset it.")
    return int(text)
