"""The output folder: who may write it, what is already done, and how a finished snapshot appears in it.

Everything is first written below OUT/.fp8-convert/new and journalled file by file; when all of it is there the files
are renamed into OUT, the file that makes it loadable (model_index.json, or a lone component's config.json) and the
record last. So an unfinished conversion never looks like a snapshot, and the same command resumes it.

Nothing is written through a symbolic link inside OUT, and no file there is replaced but this project's: those that the
record names, or that were renamed there by the journal's digests. Files and folders get one constant modification time,
so that the same conversion gives the same archive.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from ..format.layout import RECORD_FILE, STAGING
from ..telling.errors import ConvertError, ResumableError
from .folder import LOCK_FILE, NEW, SIGNS, SOURCE, is_as_journalled, own_files, refuse_foreign, refuse_links
from .journal import Done, Journal, add_changed, add_done, begin_journal, journal_file, read_journal
from .publishing import constant_mtime, publish
from .writing import disk_errors


class Target:
    """An output folder under this process's lock. Use `open_target`; a context manager."""

    def __init__(self, folder: Path, lock: FileLock, *, created: bool, force: bool) -> None:
        self.folder = folder
        self._lock = lock
        self._turn = threading.Lock()  # of threads that journal
        self._created, self._force = created, force
        self._taken_up = False
        self._staging = folder / STAGING
        self._new = self._staging / NEW
        self._mtime = constant_mtime()
        self.done: dict[str, Done] = {}

    def __enter__(self) -> Target:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A rerun would meet the same error: nothing is left behind, but for an earlier run's work that this one did
        # not get to.
        permanent = isinstance(error, ConvertError) and not isinstance(error, ResumableError)
        if permanent and (self._taken_up or not journal_file(self.folder).exists()):
            self._discard()
        self._lock.release()
        if error is None and self._staging.exists():  # where an open lock file cannot be removed (Windows)
            self._remove_staging()

    def staged(self, path: str) -> Path:
        """Where the output file `path` is written first."""
        return self._new / path

    @property
    def sources(self) -> Path:
        """Where source shards lie while they are streamed."""
        return self._staging / SOURCE

    def earlier(self, key: str) -> Journal | None:
        """What an earlier run with the same `key` (source, recipe, tool) left, None if there was none.

        Raises ConvertError where another conversion would replace a finished snapshot without `force`.
        """
        journal = read_journal(self.folder)
        if journal is not None and journal.key == key:
            return journal
        if not self._force and (self.folder / RECORD_FILE).exists():
            raise _finished(self.folder)  # finished since we looked, or under a forced run that was interrupted
        return None

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
        before = read_journal(self.folder)
        dropped = before is not None and before.key != key
        if dropped or before is None:
            shutil.rmtree(self._new, ignore_errors=True)
        self.done = {done.path: done for done in kept}
        begin_journal(
            self.folder,
            key,
            shards=shards,
            source_stats=source_stats,
            replaces=own_files(self.folder),
            done=self.done.values(),
        )
        return dropped

    def recheck(self, done: Done) -> bool:
        """Whether a journalled file is still there with its size and digest."""
        return any(is_as_journalled(top / done.path, done) for top in (self._new, self.folder))

    def add(self, done: Done) -> None:
        """Journal a finished file."""
        with self._turn:
            self.done[done.path] = done
            add_done(self.folder, done)

    def doubt(self, source: str) -> None:
        """Journal that a source shard is not what it was taken for: what was measured in it counts no more."""
        with self._turn:
            add_changed(self.folder, source)

    def drop_sources(self) -> None:
        """Delete what an earlier, streamed run left of its source."""
        shutil.rmtree(self.sources, ignore_errors=True)

    def missing_bytes(self, needed: int) -> int:
        """How much of `needed` bytes an earlier run has not yet left below the staging folder."""
        return needed - sum(p.stat().st_size for p in self._staging.rglob("*") if p.is_file())

    def publish(self, paths: Collection[str], before_the_last: Callable[[], None]) -> None:
        """Let the finished files `paths` appear in the folder, and end the conversion. Raises ResumableError.

        before_the_last: called before the renames that make the snapshot loadable and finished.
        """
        publish(self.folder, self._new, paths, self._mtime, before_the_last)
        self._remove_staging()
        with disk_errors(str(self.folder)):
            os.utime(self.folder, (self._mtime, self._mtime))

    def _remove_staging(self) -> None:
        """Remove what a conversion left there; the signs that it was one last, and nothing that is not known."""
        for work in (self._new, self.sources):
            shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):
            for name in SIGNS:
                (self._staging / name).unlink(missing_ok=True)
            self._staging.rmdir()

    def _discard(self) -> None:
        self._remove_staging()
        if self._created:
            try:
                self.folder.rmdir()
            except OSError:
                return


def open_target(folder: Path, paths: Collection[str], *, force: bool) -> Target:
    """Create or take over the output folder and lock it, for a conversion that will write `paths` into it.

    Raises ConvertError if it is not ours to write.
    """
    if folder.exists() and not folder.is_dir():
        raise ConvertError(f"{folder} is a file; name a folder for the output.")
    created = not folder.exists()
    refuse_links(folder, {*paths, RECORD_FILE})
    refuse_foreign(folder)
    if not force and (folder / RECORD_FILE).exists() and not (folder / STAGING).exists():
        raise _finished(folder)
    try:
        (folder / STAGING).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / STAGING / LOCK_FILE)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConvertError(f"Another fp8-convert is writing {folder}; wait for it or choose another folder.") from error
    except OSError as error:
        raise ConvertError(
            f"{folder} cannot be written ({error.strerror}); choose another folder or fix its permissions."
        ) from error
    return Target(folder, lock, created=created, force=force)


def _finished(folder: Path) -> ConvertError:
    return ConvertError(f"{folder} holds a finished FP8 snapshot; pass --force to replace it.")
