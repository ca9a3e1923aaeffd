"""How a finished snapshot appears in its folder: by renaming, what makes it loadable and the record last."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from ..format.layout import RECORD_FILE
from ..snapshot.snapshot import CONFIG, MODEL_INDEX
from ..telling.errors import ConvertError, ResumableError
from .folder import own_files
from .writing import disk_errors, sync_folder

_DEFAULT_MTIME = 315532800  # 1980-01-01, the earliest time that every archive format can hold


def constant_mtime() -> int:
    """The modification time of everything that is written: SOURCE_DATE_EPOCH in seconds, or a constant."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return _DEFAULT_MTIME
    if not text.isascii() or not text.isdigit() or len(text) > 11:
        raise ConvertError(f"SOURCE_DATE_EPOCH is {text!r:.40}, which is not a number of seconds; correct or unset it.")
    return int(text)


def publish(folder: Path, new: Path, paths: Collection[str], mtime: int, before_the_last: Callable[[], None]) -> None:
    """Rename the finished files `paths` from `new` into `folder`; drop what they replace.

    mtime: of all of them and their folders. before_the_last: called before the two renames that make the snapshot
    loadable and finished. Raises ResumableError, also for a file that somebody else has put there meanwhile.
    """
    own = own_files(folder)
    if foreign := sorted(path for path in paths if path not in own and os.path.lexists(folder / path)):
        raise ResumableError(
            f"{folder} holds {foreign[0]}, which fp8-convert did not write there; move it away and run the same "
            "command again to resume."
        )
    with disk_errors(str(folder)):
        last = [path for path in (MODEL_INDEX, CONFIG, RECORD_FILE) if path in paths]
        _remove_replaced(folder, new, own - {*paths})
        _rename(folder, new, sorted({*paths} - {*last}), mtime)
        _stamp_folders(folder, paths, mtime)
        before_the_last()
        _rename(folder, new, last, mtime)
        sync_folder(folder)


def _remove_replaced(folder: Path, new: Path, stale: set[str]) -> None:
    """Remove the files of this project that are not to stand there any more, or are about to be others."""
    # What makes the old snapshot loadable goes first; its record goes last, since it knows what else is stale.
    for path in (MODEL_INDEX, CONFIG, *sorted(stale), RECORD_FILE):
        if (new / path).exists() or path in stale:
            (folder / path).unlink(missing_ok=True)
    for parent in sorted({(folder / p).parent for p in stale}, key=lambda f: len(f.parts), reverse=True):
        _remove_empty(parent, folder)


def _rename(folder: Path, new: Path, paths: Iterable[str], mtime: int) -> None:
    for path in paths:
        if (new / path).exists():  # else renamed before an interruption
            os.utime(new / path, (mtime, mtime))
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / path, folder / path)


def _stamp_folders(folder: Path, paths: Iterable[str], mtime: int) -> None:
    """Make the renames into the subfolders safe and give these folders their constant time."""
    below = {folder / parent for p in paths for parent in Path(p).parents} - {folder}
    for parent in sorted(below, key=lambda f: len(f.parts), reverse=True):
        sync_folder(parent)
        os.utime(parent, (mtime, mtime))


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove the folder and those above it, up to `top`, as far as they are empty."""
    while folder != top:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
