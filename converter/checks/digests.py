"""Do all files of a converted snapshot have the record's sizes and digests, and is nothing else there?"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from ..format import layout
from ..format.header import read_header
from ..format.record import Record, RecordedFile
from ..format.untrusted import parse_json, read_whole
from ..output.writing import file_sha256
from ..snapshot.files import LocalFiles
from ..snapshot.overlay import OverlayFiles
from ..telling.errors import ConvertError
from ..telling.progress import Progress
from ..telling.quantities import plural
from .finding import Finding

_OF_THE_HUB = (".gitattributes",)  # beside every repository's files


def check_files(root: Path, record: Record, progress: Progress) -> Iterator[Finding]:
    """Sizes and digests of all that the record lists, and files that it does not list."""
    places = {name: place(root, record, name) for name in record.files}
    for name, entry in record.files.items():
        if problem := damage(root / places[name], entry):
            yield Finding(places[name], problem)
        progress.advance(entry.size)
    own_card = {layout.CARD} if has_own_card(root, record) else set()
    yield from _unlisted(root, {*places.values(), layout.RECORD_FILE, *own_card, *_OF_THE_HUB})


def check_but_shards(root: Path, record: Record) -> Iterator[Finding]:
    """The same for whoever hashes the shards while it reads them: of these, only that they are there, and whole."""
    for name, entry in record.files.items():
        where = place(root, record, name)
        file = root / where
        if name in record.shards and file.is_file() and file.stat().st_size == entry.size:
            continue
        if problem := damage(file, entry):
            yield Finding(where, problem)


def place(root: Path, record: Record, name: str) -> str:
    """Where a file that the record lists lies: a push moves the source's card, for a card of the snapshot's own."""
    moved = name == layout.CARD and layout.SOURCE_CARD not in record.files and (root / layout.SOURCE_CARD).is_file()
    return layout.SOURCE_CARD if moved else name


def has_own_card(root: Path, record: Record) -> bool:
    """Whether README.md was written for the snapshot, by a push: the record knows nothing of it."""
    moved = place(root, record, layout.CARD) != layout.CARD
    return (moved or layout.CARD not in record.files) and (root / layout.CARD).is_file()


def as_recorded(files: LocalFiles, record: Record) -> tuple[LocalFiles, tuple[str, ...]]:
    """The files as they were before a push: the source's card in its place, and none of the snapshot's own.

    With a note where a card is left out.
    """
    root, others, without = files.root, dict[str, Path](), set[str]()
    notes: tuple[str, ...] = ()
    if has_own_card(root, record):
        without.add(layout.CARD)
        notes = (f"{layout.CARD} is left out: it presents the FP8 snapshot",)
    if layout.CARD in record.files and (moved := place(root, record, layout.CARD)) != layout.CARD:
        others[layout.CARD] = files.local(moved)
        without.add(moved)
        notes = tuple(f"{note}, and the source's card takes its place" for note in notes)
    return (OverlayFiles(files, others, files.label, without=without) if without else files), notes


def _unlisted(root: Path, listed: Collection[str]) -> Iterator[Finding]:
    """Every file that is not listed, dot files included; a folder without any listed file is one finding."""
    folders = {parent.as_posix() for path in listed for parent in PurePosixPath(path).parents}
    seen: set[tuple[int, int]] = set()
    for where, below, names in os.walk(root, followlinks=True):  # a reader follows links too
        here = Path(where).relative_to(root).as_posix()
        about = os.stat(where)
        if (about.st_dev, about.st_ino) in seen:  # a link to a folder that was looked at
            below.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        prefix = "" if here == "." else f"{here}/"
        for name in sorted(names):
            if prefix + name not in listed:
                yield Finding(prefix + name, "is not in the record")
        for name in sorted(below):
            if prefix + name == ".cache" and os.listdir(Path(where, name)) == ["huggingface"]:  # of a download
                below.remove(name)
            elif prefix + name not in folders:
                below.remove(name)
                if count := sum(len(files) for _, _, files in os.walk(Path(where, name))):
                    yield Finding(
                        f"{prefix}{name}/",
                        f"is not in the record ({plural(count, 'file')})" + _next_step(prefix + name),
                    )
        below.sort()


def _next_step(folder: str) -> str:
    """What to do about a folder that is not in the record, after its finding."""
    return ": a conversion was interrupted, run its command again" if folder == layout.STAGING else ""


def damage(file: Path, entry: RecordedFile) -> str | None:
    """How a file differs from its entry in the record, None if it does not."""
    try:
        if not file.is_file():
            return "is missing"
        with open(file, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != entry.size:
                return f"has {size} bytes instead of {entry.size}"
            if file_sha256(opened.fileno()) == entry.sha256:
                return None
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    unreadable = _unreadable(file)
    return "has another sha256 than the record says" + (f": {unreadable}" if unreadable else "")


def _unreadable(file: Path) -> str | None:
    """Why a damaged file cannot be parsed, None if it can."""
    try:
        if file.suffix == ".safetensors":
            read_header(file, "it")
        elif file.suffix == ".json":
            parse_json(read_whole(file, "it", layout.MAX_RECORD_BYTES))
    except ConvertError as error:
        return str(error)
    except ValueError as error:
        return f"it {error}"
    return None
