"""How results show themselves at a Python prompt and in a notebook: one line, and a small HTML table.

Names in them come from files that anybody may have made: control characters and markup never get through.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields
from pathlib import Path
from typing import Any

from .printable import printable
from .quantities import plural

_LINE = 200  # characters
_FIELD = 60
_ROWS = 40


class Brief:
    """A dataclass whose repr is one short line: long fields are counted, not shown. For `dataclass(repr=False)`."""

    def __repr__(self) -> str:
        own: Any = self
        shown = ", ".join(f"{f.name}={_brief(getattr(self, f.name))}" for f in fields(own) if f.repr)
        return _cut(f"{type(self).__name__}({shown})", _LINE)


def one_line(result: object, text: str) -> str:
    """`<Class text>`, short and printable whatever is in the text."""
    return f"<{type(result).__name__} {_cut(printable(text), _LINE - 50)}>"


def html_table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    notes: Iterable[str] = (),
    *,
    most: int | None = _ROWS,
) -> str:
    """A table of escaped cells, with a caption above and notes below. most: rows that are shown, None for all."""
    body = [_row("td", row) for row in rows]
    most = len(body) if most is None else most
    more = [f"… and {len(body) - most} more"] if len(body) > most else []
    below = [*more, *notes]
    if len(below) > _ROWS:
        below = [*below[:_ROWS], f"… and {len(below) - _ROWS} more"]
    table = f"<table>{_row('th', header)}{''.join(body[:most])}</table>" if body else ""
    return f"<div><b>{escaped(caption)}</b>{table}{''.join(f'<div>{escaped(note)}</div>' for note in below)}</div>"


def _row(tag: str, cells: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escaped(cell)}</{tag}>' for cell in cells)}</tr>"


def escaped(value: object) -> str:
    """A value as text for HTML or SVG: short, printable, without markup."""
    return html.escape(_cut(printable("" if value is None else str(value)), _LINE))


def _brief(value: object) -> str:
    """A field's value where it is short, else what kind of thing it is and how many."""
    if isinstance(value, str | Path):
        text = str(value)
        return _cut(repr(text[:_FIELD] + ("…" if len(text) > _FIELD else "")), _FIELD)
    if value is None or isinstance(value, bool | int | float):
        return _cut(repr(value), _FIELD)
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping | Set | Sequence):
        plain = isinstance(value, tuple) and len(value) <= 4 and all(isinstance(v, str | int) for v in value)
        text = repr(value) if plain else ""
        return text if text and len(text) <= _FIELD else f"<{plural(len(value), 'item')}>"
    names = (getattr(value, attribute, None) for attribute in ("name", "path", "label"))
    name = next((n for n in names if isinstance(n, str)), None)
    return f"<{type(value).__name__}{f' {_brief(name)}' if name else ''}>"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
