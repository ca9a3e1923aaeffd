"""A converted folder of single files, described: its record says which file is which component's.

There is no config to read, and names are those of the models' first releases.
"""

from __future__ import annotations

from ..format.layout import MAX_RECORD_BYTES, RECORD_FILE
from ..format.record import read_record
from ..telling.errors import ConvertError
from .files import Files
from .snapshot import Component, Shard, Snapshot


def describe_single_files(files: Files) -> Snapshot:
    """The components that the record names, each with its file. Raises ConvertError, also for a file that is absent."""
    record = read_record(files.read(RECORD_FILE, MAX_RECORD_BYTES), RECORD_FILE)
    sizes = files.sizes()
    found: dict[str, list[Shard]] = {}
    for path, shard in record.shards.items():
        if shard.component is None:
            raise ConvertError(f"{files.label} lacks the model index or config that its record names; convert again.")
        if path not in sizes:
            raise ConvertError(f"{files.label} lacks {path}; convert it again.")
        found.setdefault(shard.component, []).append(Shard(path, sizes[path], files.header(path), files.sha256(path)))
    components = tuple(
        Component(name, "", entry.class_, {}, "", tuple(found.get(name, ())), None)
        for name, entry in record.components.items()
    )
    return Snapshot(files.label, files.repo, files.commit, record.source.pipeline, components, {}, single_files=True)
