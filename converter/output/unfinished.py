"""What an interrupted conversion left: how many of its shards are done, as the journal in its output folder tells."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..format.layout import RECORD_FILE, STAGING
from ..snapshot.source import CONFIG, MODEL_INDEX


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
    first, *rest = [*_lines(folder / STAGING / "journal.jsonl")] or [{}]
    planned = first.get("shards")
    planned = [p for p in planned if isinstance(p, str)] if isinstance(planned, list) else None
    done = {p for line in rest if isinstance(p := line.get("path"), str) and p.endswith(".safetensors")}
    return Unfinished(len(done if planned is None else done & {*planned}), None if planned is None else len(planned))


def is_published(folder: Path) -> bool:
    """Whether a finished snapshot stands in the folder, whatever lies beside it."""
    return (folder / RECORD_FILE).is_file() and any((folder / name).is_file() for name in (MODEL_INDEX, CONFIG))


def _lines(journal: Path) -> Iterator[dict[str, Any]]:
    """The journal's lines, but for what a kill cut short."""
    try:
        text = journal.read_text(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry
