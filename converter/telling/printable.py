"""Text that may be shown: names in it come from files that anybody may have made.

Control characters would reach the terminal, and half a surrogate pair could not be written at all.
"""

from collections.abc import Iterable


def printable(text: str) -> str:
    """Text in one line, a blank for what moves a terminal's cursor or breaks the line."""
    return "".join(c if c.isprintable() else " " for c in text)


def printable_lines(lines: Iterable[str]) -> str:
    """Lines as one text, each printable."""
    return "\n".join(map(printable, lines))
