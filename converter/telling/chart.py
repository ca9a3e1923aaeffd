"""A chart as one <svg> element, for pages that need no network: points with titles to hover over, axes, a legend.

Names in it come from files that anybody may have made: they are escaped, and control characters never get through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .notebook import escaped

# Okabe and Ito's colours, which colour-blind readers tell apart; without the yellow, which is pale on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 48  # pixels around the axes
_LEGEND = 20  # pixels of one of its lines
_TICKS = 6  # about as many


@dataclass(frozen=True)
class Point:
    """x and y are finite. title: what is shown where the pointer rests on it."""

    x: float
    y: float
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour. line: whether they are joined, in the order given."""

    name: str
    points: Sequence[Point]
    line: bool = False


def chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    width: int = 960,
    height: int = 360,
    y_range: tuple[float, float] | None = None,
) -> str:
    """An <svg> of the series, which is as wide as its place on the page; text and axes have the page's colour.

    width, height: pixels of its coordinates. y_range: the least extent of the y axis; None fits it to the points.
    Raises ValueError for a point that is not finite.
    """
    points = [point for one in series for point in one.points]
    if not all(math.isfinite(point.x) and math.isfinite(point.y) for point in points):
        raise ValueError("a chart's points are finite")
    x = _Axis.over([p.x for p in points] or [0.0], _LEFT, width - _RIGHT)
    y = _Axis.over([*(p.y for p in points), *(y_range or ())] or [0.0], height - _BOTTOM, _TOP)
    below = height + _LEGEND * len(series)
    label = escaped(f"{y_label} over {x_label}")
    return "\n".join(
        [
            f'<svg viewBox="0 0 {width} {below}" width="100%" role="img" aria-label="{label}" '
            'font-family="sans-serif" font-size="12" fill="currentColor">',
            *_axes(x, y, x_label, y_label),
            *(
                mark
                for number, one in enumerate(series)
                for mark in _marks(one, _COLOURS[number % len(_COLOURS)], x, y)
            ),
            *_legend(series, height),
            "</svg>",
        ]
    )


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` at pixels from `start` to `stop`, with a line at every multiple of `step`."""

    low: float
    high: float
    step: float
    start: float
    stop: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, stop: float) -> _Axis:
        low, high = min(values), max(values)
        if high - low <= 1e-12 * max(abs(low), abs(high)):  # all alike
            low, high = low - 1, high + 1
        step = _round_step((high - low) / _TICKS)
        return cls(math.floor(low / step) * step, math.ceil(high / step) * step, step, start, stop)

    def at(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{self.start + share * (self.stop - self.start):.1f}"

    @property
    def ticks(self) -> Iterator[float]:
        return (self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1))


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= least * (1 - 1e-9))


def _axes(x: _Axis, y: _Axis, x_label: str, y_label: str) -> Iterator[str]:
    left, right, bottom, top = x.start, x.stop, y.start, y.stop
    for tick in y.ticks:
        yield f'<path d="M{left} {y.at(tick)}H{right}" stroke="currentColor" opacity=".2"/>'
        yield _words(left - 6, y.at(tick), "end", _number(tick))
    for tick in x.ticks:
        yield _words(x.at(tick), bottom + 14, "middle", _number(tick))
    yield f'<path d="M{left} {top}V{bottom}H{right}" stroke="currentColor" fill="none"/>'
    yield _words((left + right) / 2, bottom + 34, "middle", x_label)
    yield f'<g transform="translate(14 {(top + bottom) / 2}) rotate(-90)">{_words(0, 0, "middle", y_label)}</g>'


def _words(x: float | str, y: float | str, anchor: str, text: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" dominant-baseline="middle">{escaped(text)}</text>'


def _marks(series: Series, colour: str, x: _Axis, y: _Axis) -> Iterator[str]:
    places = [(x.at(point.x), y.at(point.y)) for point in series.points]
    if series.line and places:
        way = "L".join(f"{across} {down}" for across, down in places)
        yield f'<path d="M{way}" stroke="{colour}" fill="none"/>'
    for point, (across, down) in zip(series.points, places, strict=True):
        title = f"<title>{escaped(point.title)}</title>" if point.title else ""
        yield f'<circle cx="{across}" cy="{down}" r="3" fill="{colour}">{title}</circle>'


def _legend(series: Sequence[Series], top: int) -> Iterator[str]:
    for number, one in enumerate(series):
        down = top + _LEGEND * (number + 0.5)
        yield f'<circle cx="{_LEFT + 6}" cy="{down}" r="4" fill="{_COLOURS[number % len(_COLOURS)]}"/>'
        yield _words(_LEFT + 18, down, "start", one.name)


def _number(value: float) -> str:
    return f"{value:.6g}" if abs(value) > 1e-9 else "0"
