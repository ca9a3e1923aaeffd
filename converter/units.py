"""How messages write numbers of bytes."""

from __future__ import annotations


def bytes_text(count: int) -> str:
    """Such as "1.44 GB"."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
