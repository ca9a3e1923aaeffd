"""From what the user types to files and to a described snapshot; a Hub id is described before it is fetched.

The Hub's client is imported only where a Hub id asks for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..format.untrusted import check_text
from ..telling.errors import ConvertError
from .access import HubAccess
from .describing import describe
from .files import Files, LocalFiles
from .snapshot import Snapshot, needed_files


def open_files(source: str | os.PathLike[str], options: HubAccess) -> Files:
    """The files of a folder, or those of a Hub id at the commit that it has now; none is read. Raises ConvertError."""
    path = local_folder(source)
    if path is not None:
        return LocalFiles(path)
    from .hub import HubFiles, cached, is_offline

    repo = os.fspath(source)
    return cached(repo, options) if is_offline(options) else HubFiles(repo, options)


def describe_source(files: Files, options: HubAccess) -> Snapshot:
    """Describe files to convert, from their headers: not converted yet, and all of them there. Raises ConvertError."""
    snapshot = describe(files, variant=options.variant)
    for path in needed_files(snapshot):
        files.local(path)  # what the cache lacks is said now, not when it is copied
    check_variant(snapshot, options)
    return snapshot


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


def fetch(snapshot: Snapshot, files: Files, also: Iterable[str] = ()) -> LocalFiles:
    """The snapshot's files on this machine, downloaded at its commit if they are not here; `also` these.

    Raises ConvertError for a download that is not whole.
    """
    if isinstance(files, LocalFiles):
        return files
    from .hub import HubFiles, download

    assert isinstance(files, HubFiles)
    here = download(files, sorted({*needed_files(snapshot), *also}))
    for component in snapshot.components:
        for shard in component.shards:
            here.header(shard.path)  # a file that was cut short is refused now, not after hours
    return here


def check_variant(snapshot: Snapshot, options: HubAccess) -> None:
    """Raise ConvertError where a variant is asked for that no component has."""
    chosen = [PurePosixPath(s.path).name for c in snapshot.components for s in c.shards]
    if options.variant and not any(f".{options.variant}" in name for name in chosen):
        raise ConvertError(
            f"No component of {snapshot.label} has weights of the variant {options.variant!r}; correct or drop "
            "--variant."
        )
