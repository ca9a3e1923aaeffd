"""Quantities as people read them: bytes, parameters, and how one number became another."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def byte_count(count: int) -> str:
    """`512 B`, `1.5 kB`, `57.70 GB`."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def change(before: int, after: int) -> str:
    """`57.70 GB -> 29.10 GB (50.4%)`."""
    share = f" ({100 * after / before:.1f}%)" if before else ""
    return f"{byte_count(before)} -> {byte_count(after)}{share}"


def parameter_count(params: int) -> str:
    """`12.3M`; small numbers as they are."""
    return f"{params / 1e6:.1f}M" if params >= 1e5 else str(params)


def share(part: int, whole: int) -> str:
    """`12%`, `0.034%`; `0` for none."""
    return f"{100 * part / whole:.2g}%" if part and whole else "0"
