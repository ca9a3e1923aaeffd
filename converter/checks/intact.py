"""Is a finished snapshot what was written? Asked before another one is made of it; shards are compared later."""

from __future__ import annotations

from pathlib import Path

from ..format import layout
from ..format.record import Record, read_record, record_problem
from ..output.writing import sha256_at
from ..snapshot.files import Files, LocalFiles
from ..telling.errors import ConvertError
from .digests import damage, place


def read_intact(files: Files) -> Record | None:
    """The record of a finished snapshot; None for other snapshots. Its shards' digests go to `files`.

    The record and, in a folder, all small files that it lists are compared with what was written. Raises ConvertError.
    """
    if layout.RECORD_FILE not in files.sizes():
        return None
    raw, where = files.read(layout.RECORD_FILE, layout.MAX_RECORD_BYTES), f"{layout.RECORD_FILE} of {files.label}"
    record = read_record(raw, where)
    if problem := record_problem(raw, where):
        raise ConvertError(f"{where} {problem}; download or convert it again.")
    if isinstance(files, LocalFiles):
        for name, entry in record.files.items():
            if name not in record.shards:
                file = place(files.root, record, name)
                if problem := damage(files.root / file, entry):
                    raise ConvertError(f"{file} of {files.label} {problem}; download or convert it again.")
        files.digests = {path: shard.sha256 for path, shard in record.shards.items()}
    return record


def check_recorded(file: Path) -> None:
    """Raise ConvertError where a file of a finished snapshot, in its folder or one below, is not as it was written."""
    for root in file.absolute().parents[:2]:
        if (root / layout.RECORD_FILE).is_file():
            record = read_intact(LocalFiles(root))
            assert record is not None
            entry = record.shards.get(file.absolute().relative_to(root).as_posix())
            if entry is not None and sha256_at(file, str(file)) != entry.sha256:
                raise ConvertError(
                    f"{file} has another sha256 than {root / layout.RECORD_FILE} says; download or convert it again."
                )
            return
