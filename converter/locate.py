"""From what the user types to a described snapshot: a folder, or a Hub id that is described before it is fetched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import ConvertError
from .hub import CachedFiles, HubFiles, HubOptions, cached, download, is_offline
from .source import LocalFiles, Snapshot, describe, needed_files


@dataclass(frozen=True)
class SourceOptions(HubOptions):
    """How to find a source. `variant` takes `*.VARIANT.safetensors` where a component has them."""

    variant: str | None = None


def open_source(source: str | os.PathLike[str], options: SourceOptions) -> Snapshot:
    """Describe a snapshot to convert, from its headers: not converted yet, and all of it there. Raises ConvertError."""
    return _complete(find_snapshot(source, options), options)


def find_snapshot(source: str | os.PathLike[str], options: SourceOptions, *, allow_converted: bool = False) -> Snapshot:
    """Describe what a folder or a Hub id names. A Hub repository is not downloaded, only asked. Raises ConvertError."""
    path = local_folder(source)
    if path is not None:
        return describe(LocalFiles(path), variant=options.variant, allow_converted=allow_converted)
    repo = os.fspath(source)
    files = cached(repo, options) if is_offline(options) else HubFiles(repo, options)
    return describe(files, repo=repo, commit=files.commit, variant=options.variant, allow_converted=allow_converted)


def local_folder(source: str | os.PathLike[str]) -> Path | None:
    """The folder that a source names, None if it reads as a Hub id. Raises ConvertError for anything else."""
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


def fetch(snapshot: Snapshot, options: SourceOptions) -> Snapshot:
    """The snapshot with all its files on this machine, downloaded at its commit if they are not."""
    if not isinstance(snapshot.files, HubFiles):
        return snapshot
    files = download(snapshot.files, needed_files(snapshot))
    local = describe(files, repo=files.label, commit=files.commit, variant=options.variant)
    return _complete(local, options)


def _complete(snapshot: Snapshot, options: SourceOptions) -> Snapshot:
    """The snapshot, if what the cache should hold is there, and the variant asked for where one is."""
    if isinstance(snapshot.files, CachedFiles):
        for path in needed_files(snapshot):
            snapshot.files.local(path)  # what is missing is said now, not when it is copied
    check_variant(snapshot, options)
    return snapshot


def check_variant(snapshot: Snapshot, options: SourceOptions) -> None:
    """Raise ConvertError where a variant is asked for that no component has."""
    chosen = [PurePosixPath(s.path).name for c in snapshot.components for s in c.shards]
    if options.variant and not any(f".{options.variant}" in name for name in chosen):
        raise ConvertError(
            f"No component of {snapshot.label} has weights of the variant {options.variant!r}; correct or drop "
            "--variant."
        )
