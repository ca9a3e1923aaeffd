"""From what the user types to a described snapshot: a folder, or a Hub id that is described before it is fetched."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import ConvertError
from .hub import HubFiles, HubOptions, cached, download, is_offline
from .source import LocalFiles, Shard, Snapshot, describe, needed_files


@dataclass(frozen=True)
class SourceOptions(HubOptions):
    """How to find a source. `variant` takes `*.VARIANT.safetensors` where a component has them."""

    variant: str | None = None


def open_source(source: str | os.PathLike[str], options: SourceOptions) -> Snapshot:
    """Describe a snapshot from its headers. A Hub repository is not downloaded, only asked. Raises ConvertError."""
    text = os.fspath(source)
    path = Path(text)
    if path.is_dir():
        return describe(LocalFiles(path), variant=options.variant)
    if path.exists():
        raise ConvertError(f"{path} is a file; give the snapshot's folder, or a component's folder.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) or text.startswith((".", "/", "~")):
        raise ConvertError(
            f"The folder {text} does not exist; check the path, or give a Hub id such as Qwen/Qwen-Image."
        )
    if is_offline(options):
        folder = cached(text, options)
        return describe(LocalFiles(folder), repo=text, commit=_commit_of(folder), variant=options.variant)
    files = HubFiles(text, options)
    return describe(files, repo=text, commit=files.commit, variant=options.variant)


def fetch(snapshot: Snapshot, options: SourceOptions) -> Snapshot:
    """The snapshot with all its files on this machine, downloaded at its commit if they are not."""
    if all(shard.local is not None for c in snapshot.components for shard in c.shards):
        return snapshot
    assert snapshot.repo is not None
    assert snapshot.commit is not None
    folder = download(snapshot.repo, snapshot.commit, needed_files(snapshot), options)
    local = describe(LocalFiles(folder), repo=snapshot.repo, commit=snapshot.commit, variant=options.variant)
    digests = {shard.path: shard.sha256 for c in snapshot.components for shard in c.shards}

    def expected(shard: Shard) -> Shard:
        return replace(shard, sha256=digests.get(shard.path))

    components = tuple(replace(c, shards=tuple(expected(s) for s in c.shards)) for c in local.components)
    # The label stays the repository's: a message about a cache folder would help nobody.
    return replace(local, label=snapshot.label, components=components)


def _commit_of(folder: Path) -> str | None:
    """The commit of a Hub cache folder, which is its name."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None
