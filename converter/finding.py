"""What `verify` finds wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Something wrong with one file; the path "." stands for the whole snapshot."""

    path: str
    problem: str
