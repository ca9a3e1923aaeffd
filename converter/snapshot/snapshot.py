"""A described snapshot as data: components, shards, validated headers, and what is carried over beside them.

Names and sizes, and no place: where the bytes lie is known to `Files`, which goes beside it where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..format.header import Header, TensorInfo
from ..telling.notebook import Brief

MODEL_INDEX = "model_index.json"
CONFIG = "config.json"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


@dataclass(frozen=True, repr=False)
class Shard(Brief):
    """One safetensors file of a component.

    renamed: its header's tensors are other ranges of the data than the file's own, under other names; `header.raw` is
    what stands in the file.
    """

    path: str
    size: int
    header: Header
    sha256: str | None = None  # what the Hub, or the record of a finished snapshot, says of it
    renamed: bool = False


@dataclass(frozen=True, repr=False)
class Component(Brief):
    """A component with weights. A component that is its own snapshot has the name ""."""

    name: str
    library: str
    class_name: str | None
    config: Mapping[str, Any]
    stem: str
    shards: tuple[Shard, ...]
    index: str | None

    def path(self, file: str) -> str:
        return f"{self.name}/{file}" if self.name else file

    @property
    def label(self) -> str:
        """How tables and messages call the component."""
        return self.name or self.class_name or "component"

    @property
    def tensors(self) -> Iterable[TensorInfo]:
        return (tensor for shard in self.shards for tensor in shard.header.tensors)


@dataclass(frozen=True, repr=False)
class LeftOut(Brief):
    """Files of a source that are not carried over: one file, or those of a folder (a path that ends in "/")."""

    path: str
    files: int
    bytes: int
    reason: str


@dataclass(frozen=True, repr=False)
class Snapshot(Brief):
    """A described snapshot.

    base_repo, base_commit: of the Hub repository that lent an imported checkpoint all but its weights.
    sidecars: bytes of the files to carry over as they are, weights and indices excluded, by path. remarks: sentences on
    what is unusual in it, for the user. single_files: it was written for a reader of single files, without configs.
    """

    label: str
    repo: str | None
    commit: str | None
    pipeline: str | None
    components: tuple[Component, ...]
    sidecars: Mapping[str, int]
    left_out: tuple[LeftOut, ...] = ()
    remarks: tuple[str, ...] = ()
    base_repo: str | None = None
    base_commit: str | None = None
    single_files: bool = False

    @property
    def classes(self) -> dict[str, str | None]:
        """The components' classes by name."""
        return {c.name: c.class_name for c in self.components}


def needed_files(snapshot: Snapshot) -> list[str]:
    """Every file of the snapshot that a conversion reads or copies, sorted."""
    weights = [shard.path for c in snapshot.components for shard in c.shards]
    indices = [c.index for c in snapshot.components if c.index]
    return sorted({*weights, *indices, *snapshot.sidecars})
