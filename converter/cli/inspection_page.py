"""An inspection as one HTML page that needs no network: a plot of the layers' SQNR, and tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..telling.chart import Point, Series, chart
from ..telling.notebook import escaped, html_table
from .render import ERROR_COLUMNS, NO_ERRORS, error_row

if TYPE_CHECKING:
    from ..inspection import Inspection

_STYLE = """
body { font: 14px sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; margin: .5em 0 2em }
th, td { border-bottom: 1px solid #ddd; padding: .2em .6em; text-align: left; font-variant-numeric: tabular-nums }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } th, td { border-color: #444 } }
"""


def inspection_page(inspection: Inspection) -> str:
    """The page: what `inspect` tells, layers by SQNR in a plot, and all of them in a table, the worst first."""
    layers = inspection.worst()
    table = html_table("Layers, the worst first", ERROR_COLUMNS, [error_row(*layer) for layer in layers], most=None)
    title = escaped(inspection.title)
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{_STYLE}</style></head>",
            f"<body><h1>{title}</h1>",
            *([_plot(inspection), table] if layers else [f"<p>{escaped(NO_ERRORS)}</p>"]),
            inspection._repr_html_(),
            "</body></html>\n",
        ]
    )


def _plot(inspection: Inspection) -> str:
    series = [*_series(inspection)]
    unseen = sum(layer.error.row_sqnr_db is None for _, layer in inspection.worst())
    note = f"<p>{unseen} layers miss nothing, and are not in the plot.</p>" if unseen else ""
    return chart(series, x_label="layer", y_label="SQNR by row in dB", y_range=(20, 40)) + note


def _series(inspection: Inspection) -> Iterator[Series]:
    """A series for each component, one behind the other, in the order of its layers."""
    number = 0
    for component in inspection.components:
        points = []
        for layer in component.errors:
            number += 1
            if (sqnr := layer.error.row_sqnr_db) is not None:
                points.append(Point(number, sqnr, f"{component.name} {layer.module}: {sqnr:.2f} dB".strip()))
        if points:
            yield Series(component.name or "component", points)
