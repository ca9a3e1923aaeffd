"""A snapshot in a folder, of which some files lie elsewhere, such as a checkpoint in place of a component's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from .files import LocalFiles


class OverlayFiles(LocalFiles):
    """The files of `base`, and over them those of `others`, by the path that they take in the snapshot.

    digests: of the others. without: files of `base` that are not taken.
    """

    def __init__(
        self,
        base: LocalFiles,
        others: Mapping[str, Path],
        label: str,
        digests: Mapping[str, str] | None = None,
        *,
        without: Collection[str] = (),
    ) -> None:
        super().__init__(base.root)
        self.digests = {**{p: d for p, d in base.digests.items() if p not in others}, **(digests or {})}
        self.label = label
        self._base, self._others, self._without = base, dict(others), without

    def sizes(self) -> Mapping[str, int]:
        if self._listed is None:
            taken = {path: size for path, size in self._base.sizes().items() if path not in self._without}
            self._listed = {**taken, **{path: file.stat().st_size for path, file in self._others.items()}}
        return self._listed

    def local(self, path: str) -> Path:
        return self._others[path] if path in self._others else self._base.local(path)
