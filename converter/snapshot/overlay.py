"""A snapshot in a folder, of which some files lie elsewhere: a checkpoint of one component in place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .files import LocalFiles


class OverlayFiles(LocalFiles):
    """The files of `base`, and over them those of `others`, by the path that they take in the snapshot.

    digests: of the others.
    """

    def __init__(
        self, base: LocalFiles, others: Mapping[str, Path], label: str, digests: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(base.root)
        self.digests = {**{p: d for p, d in base.digests.items() if p not in others}, **(digests or {})}
        self.label = label
        self._others = dict(others)

    def sizes(self) -> Mapping[str, int]:
        if self._listed is None:
            self._listed = {**super().sizes(), **{path: file.stat().st_size for path, file in self._others.items()}}
        return self._listed

    def local(self, path: str) -> Path:
        return self._others[path] if path in self._others else super().local(path)
