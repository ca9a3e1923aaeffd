"""A chart is well-formed SVG whose marks lie where its numbers say, whatever is in names."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from fp8_convert.converter.telling.chart import Point, Series, chart


def drawn(*series: Series, y_range: tuple[float, float] | None = None) -> ElementTree.Element:
    return ElementTree.fromstring(chart(series, x_label="layer", y_label="dB", y_range=y_range))


def circles(svg: ElementTree.Element) -> list[tuple[float, float, str]]:
    """Marks with a title: pixels and title."""
    return [
        (float(c.get("cx", "")), float(c.get("cy", "")), title)
        for c in svg.iter("circle")
        if (title := c.findtext("title")) is not None
    ]


def test_points_lie_in_the_axes_in_proportion() -> None:
    svg = drawn(Series("a", [Point(0, 10, "left"), Point(5, 15, "middle"), Point(10, 20, "right")]))
    (x0, y0, _), (x1, y1, _), (x2, y2, _) = circles(svg)
    assert x0 < x1 < x2
    assert y0 > y1 > y2  # up is more
    assert math.isclose(x1, (x0 + x2) / 2)
    assert math.isclose(y1, (y0 + y2) / 2)
    _, _, width, height = map(float, str(svg.get("viewBox")).split())
    assert x0 > 0
    assert x2 < width
    assert 0 < y2 < y0 < height


def test_labels_ticks_and_legend_are_there() -> None:
    svg = drawn(Series("transformer", [Point(0, 30.5)]), Series("vae", [Point(1, 32.5)]))
    texts = [t.text for t in svg.iter("text")]
    assert {"layer", "dB", "transformer", "vae", "31"} <= {*texts}
    colours = {c.get("fill") for c in svg.iter("circle")}
    assert len(colours) == 2


def test_a_line_joins_the_points_in_order() -> None:
    (path,) = [
        p.get("d", "") for p in drawn(Series("a", [Point(0, 1), Point(1, 2)], line=True)).iter("path")
        if p.get("stroke") != "currentColor"
    ]  # fmt: skip
    assert path.count("L") == 1
    assert path.startswith("M")


@pytest.mark.parametrize(
    "values", [[], [3.0], [3.0, 3.0], [0.0, 0.0], [-1e-7, 1e-7], [1e9, 1e9 + 1]], ids=lambda values: f"{len(values)}"
)
def test_any_values(values: list[float]) -> None:
    svg = drawn(Series("a", [Point(i, y, "t") for i, y in enumerate(values)]))
    assert len(circles(svg)) == len(values)


def test_the_axis_can_be_longer_than_the_points() -> None:
    texts = {t.text for t in drawn(Series("a", [Point(0, 31)]), y_range=(0, 40)).iter("text")}
    assert {"0", "40"} <= texts


def test_names_are_text_and_nothing_else() -> None:
    hostile = '</svg><script>alert("1")</script>\x1b\n'
    svg = drawn(Series(hostile, [Point(0, 1, hostile)]))
    assert not list(svg.iter("script"))
    (mark,) = circles(svg)
    assert mark[2] == '</svg><script>alert("1")</script>  '


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        drawn(Series("a", [Point(0, bad)]))
