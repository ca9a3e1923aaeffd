"""The output folder: who may write it, what is already done, and how a finished snapshot appears in it.

Everything is first written below OUT/.fp8-convert/new and journalled file by file; when all of it is there the files
are renamed into OUT, the file that makes it loadable (model_index.json, or a lone component's config.json) and the
record last. So an unfinished conversion never looks like a snapshot, and the same command resumes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import ConvertError, ResumableError
from .layout import RECORD_FILE
from .source import CONFIG, MODEL_INDEX
from .writing import disk_errors, file_sha256, sync_folder

STAGING = ".fp8-convert"


@dataclass(frozen=True)
class Done:
    """A finished output file. A shard's `source_*` tell what it was made from; `source_stat` only speeds resuming."""

    path: str
    size: int
    sha256: str
    source_size: int | None = None
    source_sha256: str | None = None
    source_stat: tuple[int, ...] | None = None


class Target:
    """An output folder under this process's lock. Use `open_target`; a context manager."""

    def __init__(self, folder: Path, *, created: bool, force: bool) -> None:
        self.folder = folder
        self._created, self._force = created, force
        self._taken_up = False
        self._staging = folder / STAGING
        self._new = self._staging / "new"
        self._journal = self._staging / "journal.jsonl"
        self._lock = -1
        self.done: dict[str, Done] = {}

    def __enter__(self) -> Target:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A rerun would meet the same error: nothing is left behind, but for an earlier run's work that this one did
        # not get to.
        permanent = isinstance(error, ConvertError) and not isinstance(error, ResumableError)
        if permanent and (self._taken_up or not self._journal.exists()):
            self._discard()
        if self._lock >= 0:
            os.close(self._lock)

    def staged(self, path: str) -> Path:
        """Where the output file `path` is written first."""
        return self._new / path

    @property
    def sources(self) -> Path:
        """Where source shards lie while they are streamed."""
        return self._staging / "source"

    def resume(self, key: str) -> bool:
        """Take up an earlier run with the same `key` (source, recipe, tool); returns whether there was another one.

        What it finished stands in `done`, to be checked by `recheck` before it is used. Raises ConvertError where
        anything else would replace a finished snapshot without `force`.
        """
        lines = self._journal_lines()
        same = bool(lines) and lines[0].get("key") == key
        if not same and not self._force and (self.folder / RECORD_FILE).exists():
            raise _finished(self.folder)  # finished since we looked, or under a forced run that was interrupted
        self._taken_up = True
        if same:
            for line in lines[1:]:
                stat = line.get("source_stat")
                self.done[line["path"]] = Done(**{**line, "source_stat": tuple(stat) if stat else None})
            return False
        shutil.rmtree(self._new, ignore_errors=True)
        with disk_errors(str(self._journal)):
            self._journal.write_text(json.dumps({"key": key}) + "\n")
            sync_folder(self._staging)
        return bool(lines)

    def recheck(self, path: str) -> Done | None:
        """The journalled file, if it is still there with its size and digest; else None."""
        done = self.done.get(path)
        for place in (self._new / path, self.folder / path):
            if done is None or not place.is_file() or place.stat().st_size != done.size:
                continue
            fd = os.open(place, os.O_RDONLY)
            try:
                if file_sha256(fd) == done.sha256:
                    return done
            finally:
                os.close(fd)
        self.done.pop(path, None)
        return None

    def add(self, done: Done) -> None:
        """Journal a finished file."""
        self.done[done.path] = done
        with disk_errors(str(self._journal)), open(self._journal, "a") as journal:
            journal.write(json.dumps(asdict(done)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def drop_sources(self) -> None:
        """Delete what an earlier, streamed run left of its source."""
        shutil.rmtree(self.sources, ignore_errors=True)

    def missing_bytes(self, needed: int) -> int:
        """How much of `needed` bytes an earlier run has not yet left below the staging folder."""
        return needed - sum(p.stat().st_size for p in self._staging.rglob("*") if p.is_file())

    def publish(self, paths: list[str]) -> None:
        """Rename the finished files into place, those that make the snapshot loadable last; drop what they replace.

        Raises ResumableError.
        """
        with disk_errors(str(self.folder)):
            self._publish(paths)

    def _publish(self, paths: list[str]) -> None:
        order = sorted(paths, key=lambda p: (p == RECORD_FILE, p in (MODEL_INDEX, CONFIG), p))
        stale = _recorded_files(self.folder) - set(paths)
        # What makes the old snapshot loadable goes first; its record goes last, since it knows what else is stale.
        for path in (MODEL_INDEX, CONFIG, *sorted(stale), RECORD_FILE):
            if (self._new / path).exists() or path in stale:
                (self.folder / path).unlink(missing_ok=True)
        for path in order:
            if (self._new / path).exists():
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self._new / path, self.folder / path)
        for folder in {(self.folder / p).parent for p in order}:
            sync_folder(folder)
        shutil.rmtree(self._staging, ignore_errors=True)

    def _journal_lines(self) -> list[dict[str, Any]]:
        if not self._journal.is_file():
            return []
        lines = []
        for text in self._journal.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # a line that a kill cut short: what it would have said is done again
                continue
            if isinstance(line, dict):
                lines.append(line)
        return lines

    def _discard(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._created:
            try:
                self.folder.rmdir()
            except OSError:
                return


def open_target(folder: Path, *, force: bool) -> Target:
    """Create or take over the output folder and lock it. Raises ConvertError if it is not ours to write."""
    if folder.exists() and not folder.is_dir():
        raise ConvertError(f"{folder} is a file; name a folder for the output.")
    created = not folder.exists()
    _refuse_foreign(folder, force)
    try:
        (folder / STAGING).mkdir(parents=True, exist_ok=True)
        target = Target(folder, created=created, force=force)
        lock_file = folder / STAGING / "lock"
        lock = os.open(lock_file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        raise ConvertError(
            f"{folder} cannot be written ({error.strerror}); choose another folder or mend its permissions."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.stat(lock_file)):
            raise FileExistsError  # its holder finished and removed it, and a third run has another one
    except OSError as error:
        os.close(lock)
        raise ConvertError(f"Another fp8-convert is writing {folder}; wait for it or choose another folder.") from error
    target._lock = lock
    return target


def source_stat(path: Path) -> tuple[int, ...]:
    """What tells, without reading it, that a file is the one seen before. Raises ResumableError."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ResumableError(f"{path} cannot be opened ({error.strerror}); check the path and permissions.") from error
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _refuse_foreign(folder: Path, force: bool) -> None:
    if not folder.is_dir():
        return
    present = {p.name for p in folder.iterdir()}
    if not present or STAGING in present:
        return
    if RECORD_FILE not in present:
        raise ConvertError(f"{folder} exists and is no output of fp8-convert; choose another folder or remove it.")
    if not force:
        raise _finished(folder)


def _finished(folder: Path) -> ConvertError:
    return ConvertError(f"{folder} holds a finished FP8 snapshot; pass --force to replace it.")


def _recorded_files(folder: Path) -> set[str]:
    """Files of the snapshot in the folder, as far as its record can be read, whatever version wrote it."""
    try:
        files = json.loads((folder / RECORD_FILE).read_bytes().decode())["files"]
        return {name for name in files if isinstance(name, str) and _lies_in(folder, name)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _lies_in(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())
