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
    """Describe a snapshot from its headers. A Hub repository is not downloaded, only asked. Raises ConvertError."""
    path = local_folder(source)
    if path is not None:
        return _with_variant(describe(LocalFiles(path), variant=options.variant), options)
    text = os.fspath(source)
    if is_offline(options):
        return _described(cached(text, options), options)
    files = HubFiles(text, options)
    return _with_variant(describe(files, repo=text, commit=files.commit, variant=options.variant), options)


def local_folder(source: str | os.PathLike[str]) -> Path | None:
    """The folder that a source names, None if it reads as a Hub id. Raises ConvertError for anything else."""
    text = os.fspath(source)
    path = Path(text)
    if path.is_dir():
        return path
    if path.exists():
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
    return _described(download(snapshot.files, needed_files(snapshot)), options)


def _described(files: CachedFiles, options: SourceOptions) -> Snapshot:
    snapshot = describe(files, repo=files.label, commit=files.commit, variant=options.variant)
    for path in needed_files(snapshot):
        files.local(path)  # what is missing is said now, not when it is copied
    return _with_variant(snapshot, options)


def _with_variant(snapshot: Snapshot, options: SourceOptions) -> Snapshot:
    """The snapshot, if some component has weights of the variant asked for, where one is."""
    chosen = [PurePosixPath(s.path).name for c in snapshot.components for s in c.shards]
    if options.variant and not any(f".{options.variant}" in name for name in chosen):
        raise ConvertError(
            f"No component of {snapshot.label} has weights of the variant {options.variant!r}; correct or drop "
            "--variant."
        )
    return snapshot
