"""What an interrupted conversion left: how many of its shards are done, as the journal in its output folder tells."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..format.layout import RECORD_FILE, STAGING
from ..snapshot.snapshot import CONFIG, MODEL_INDEX
from ..targets.comfyui import DIFFUSION_MODELS, TEXT_ENCODERS
from .journal import read_journal


@dataclass(frozen=True)
class Unfinished:
    """Shards that are done, and how many there will be, where the journal says so."""

    done: int
    shards: int | None

    def __str__(self) -> str:
        count = f"{self.done} of {self.shards} shards" if self.shards is not None else f"{self.done} shards so far"
        return f"unfinished, {count}"


def find_unfinished(folder: Path) -> Unfinished | None:
    """The conversion into `folder` that has not come to its end, None if there is none."""
    if not os.path.isdir(folder / STAGING):
        return None
    journal = read_journal(folder)
    if journal is None:
        return Unfinished(0, None)
    done = {path for path in journal.paths if path.endswith(".safetensors")}
    if journal.shards is None:
        return Unfinished(len(done), None)
    return Unfinished(len(done & {*journal.shards}), len(journal.shards))


def is_published(folder: Path) -> bool:
    """Whether a finished snapshot is in the folder, whatever else is there."""
    return (folder / RECORD_FILE).is_file() and (
        any((folder / name).is_file() for name in (MODEL_INDEX, CONFIG))
        or any((folder / name).is_dir() for name in (DIFFUSION_MODELS, TEXT_ENCODERS))
    )
