"""What an output folder already contains: nothing that is not this project's is replaced, and no link is followed."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from ..format.layout import MAX_RECORD_BYTES, RECORD_FILE, STAGING
from ..format.untrusted import parse_json, read_whole
from ..telling.errors import ConvertError
from .journal import JOURNAL_FILE, Done, read_journal
from .writing import file_sha256, temporary_name

# What a conversion has in the staging folder: files that are a sign of one, and folders of finished files and of source
# shards that are streamed.
LOCK_FILE = "lock"
SIGNS = (temporary_name(JOURNAL_FILE), JOURNAL_FILE, LOCK_FILE)
NEW, SOURCE = "new", "source"


def refuse_links(folder: Path, paths: Collection[str]) -> None:
    """Raise ConvertError where writing `paths` would follow a link out of the folder, or meet something else."""
    parents = {parent.as_posix() for path in paths for parent in Path(path).parents} - {"."}
    for name in (STAGING, *sorted(parents)):
        mode = _mode(folder / name)
        if mode is not None and stat.S_ISLNK(mode):
            raise ConvertError(f"{folder / name} is a symbolic link, and nothing is written through one; remove it.")
        if mode is not None and not stat.S_ISDIR(mode):
            raise ConvertError(f"{folder / name} is not a folder, and the output needs one there; remove it.")
    for path in sorted(paths):
        mode = _mode(folder / path)
        if mode is not None and stat.S_ISDIR(mode):
            raise ConvertError(f"{folder / path} is a folder, and a file of the output goes there; remove it.")
    for where, folders, names in os.walk(folder / STAGING):
        for name in (*folders, *names):
            if Path(where, name).is_symlink():
                raise ConvertError(f"{Path(where, name)} is a symbolic link; remove the folder {folder / STAGING}.")


def refuse_foreign(folder: Path) -> None:
    """Raise ConvertError for files in the folder that are not this project's, by its record and its journal."""
    present = {*_files(folder)}
    foreign = [*sorted(present - own_files(folder)), *sorted(_foreign_staged(folder))]
    if not foreign:
        return
    if RECORD_FILE in present and _recorded(folder) is None:
        raise ConvertError(
            f"{folder / RECORD_FILE} is damaged, so that fp8-convert's files cannot be told from others; remove the "
            "folder, or choose another folder."
        )
    if RECORD_FILE not in present and not (folder / STAGING).exists():
        raise ConvertError(
            f"{folder} exists, and no record there says that it is fp8-convert's; choose another folder or remove it."
        )
    more = f" and {len(foreign) - 1} other files" if len(foreign) > 1 else ""
    raise ConvertError(
        f"{folder} holds {foreign[0]}{more}, which fp8-convert did not write there; move what you need away, or choose "
        "another folder."
    )


def own_files(folder: Path) -> set[str]:
    """Files in the folder that are this project's, as its record and its journal tell, whatever version wrote them.

    That a file is journalled says that it was staged. It is in the folder only if it was renamed there, so that its
    bytes decide: else it is somebody else's, of the same name.
    """
    journal, recorded = read_journal(folder), _recorded(folder) or set()
    replaces, done = (journal.replaces, journal.done) if journal else (frozenset(), {})

    def is_own(path: str) -> bool:
        if path == RECORD_FILE or path in replaces:
            return True
        return is_as_journalled(folder / path, done[path]) if path in done else path in recorded

    return {path for path in _files(folder) if is_own(path)}


def is_as_journalled(file: Path, done: Done) -> bool:
    """Whether a file, and no link, has the size and digest that the journal states."""
    try:
        about = file.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size != done.size:
            return False
        with open(file, "rb", buffering=0) as opened:
            return file_sha256(opened.fileno()) == done.sha256
    except OSError:
        return False


def _recorded(folder: Path) -> set[str] | None:
    """The files that the folder's record names, None where there is no record that says."""
    try:
        return {*parse_json(read_whole(folder / RECORD_FILE, RECORD_FILE, MAX_RECORD_BYTES))["files"]}
    except (ConvertError, ValueError, KeyError, TypeError):
        return None


def _foreign_staged(folder: Path) -> Iterator[str]:
    """Files below the staging folder that no conversion left there; without a lock or a journal all of them."""
    staging = folder / STAGING
    known = {*SIGNS, NEW, SOURCE} if any((staging / name).is_file() for name in SIGNS) else set()
    for where, folders, names in os.walk(staging):
        below = Path(where).relative_to(staging)
        if below == Path():
            folders[:] = [name for name in folders if name not in known]
            names = [name for name in names if name not in known]
        yield from ((Path(STAGING) / below / name).as_posix() for name in names)


def _files(folder: Path) -> Iterator[str]:
    """Every file in the folder by its path below it, links included and never followed; the staging folder left out."""
    for where, folders, names in os.walk(folder):
        below = Path(where).relative_to(folder)
        if below == Path():
            folders[:] = [name for name in folders if name != STAGING]
        for name in (*names, *(f for f in folders if Path(where, f).is_symlink())):
            yield (below / name).as_posix()


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except OSError:
        return None
