"""From what the user types to a described snapshot: a folder, or a Hub id that is described before it is fetched.

The Hub's client is imported only where a Hub id asks for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..format.untrusted import check_text
from ..telling.errors import ConvertError
from .access import HubAccess
from .source import Files, LocalFiles, Snapshot, describe, needed_files


def open_source(source: str | os.PathLike[str], options: HubAccess) -> Snapshot:
    """Describe a snapshot to convert, from its headers: not converted yet, and all of it there. Raises ConvertError."""
    return describe_source(open_files(source, options), options)


def open_files(source: str | os.PathLike[str], options: HubAccess) -> Files:
    """The files of a folder, or those of a Hub id at the commit that it has now; none is read. Raises ConvertError."""
    path = local_folder(source)
    if path is not None:
        return LocalFiles(path)
    from .hub import HubFiles, cached, is_offline

    repo = os.fspath(source)
    return cached(repo, options) if is_offline(options) else HubFiles(repo, options)


def describe_source(files: Files, options: HubAccess) -> Snapshot:
    """Describe files to convert, as `open_source` does."""
    return _complete(describe(files, variant=options.variant), options)


def find_snapshot(source: str | os.PathLike[str], options: HubAccess, *, allow_converted: bool = False) -> Snapshot:
    """Describe what a folder or a Hub id names. A Hub repository is not downloaded, only asked. Raises ConvertError."""
    files = open_files(source, options)
    return describe(files, variant=options.variant, allow_converted=allow_converted)


def local_folder(source: str | os.PathLike[str]) -> Path | None:
    """The folder that a source names, None if it reads as a Hub id. Raises ConvertError for anything else."""
    check_text(source, "The source")
    text = os.fspath(source)
    path = Path(text)
    if os.path.isdir(text):
        return path
    if os.path.exists(text):
        raise ConvertError(f"{path} is a file; give the snapshot's folder, or a component's folder.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith((".", "/", "~")):
        raise ConvertError(
            f"The folder {text} does not exist; check the path, or give a Hub id such as Qwen/Qwen-Image."
        )
    return None


def fetch(snapshot: Snapshot, also: Iterable[str] = ()) -> Snapshot:
    """The same snapshot with all its files on this machine, downloaded at its commit if they are not; `also` these.

    Raises ConvertError for a download that is not whole.
    """
    if not snapshot.files.remote:
        return snapshot
    from .hub import HubFiles, download

    assert isinstance(snapshot.files, HubFiles)
    files = download(snapshot.files, sorted({*needed_files(snapshot), *also}))
    for component in snapshot.components:
        for shard in component.shards:
            files.header(shard.path)  # a file that was cut short is refused now, not after hours
    return replace(snapshot, files=files)


def _complete(snapshot: Snapshot, options: HubAccess) -> Snapshot:
    """The snapshot, if what the cache should hold is there, and the variant asked for where one is."""
    for path in needed_files(snapshot):
        snapshot.files.local(path)  # what is missing is said now, not when it is copied
    check_variant(snapshot, options)
    return snapshot


def check_variant(snapshot: Snapshot, options: HubAccess) -> None:
    """Raise ConvertError where a variant is asked for that no component has."""
    chosen = [PurePosixPath(s.path).name for c in snapshot.components for s in c.shards]
    if options.variant and not any(f".{options.variant}" in name for name in chosen):
        raise ConvertError(
            f"No component of {snapshot.label} has weights of the variant {options.variant!r}; correct or drop "
            "--variant."
        )
