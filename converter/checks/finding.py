"""What `verify` finds wrong."""

from __future__ import annotations

from dataclasses import dataclass

from ..telling.notebook import Brief


@dataclass(frozen=True, repr=False)
class Finding(Brief):
    """Something wrong with one file; the path "." stands for the whole snapshot."""

    path: str
    problem: str
