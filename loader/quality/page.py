"""A comparison as one HTML page that needs nothing but itself: pictures, flicker view, charts and tables.

Everything is inline, and the page's own policy forbids it any connection. Names in it come from files that anybody may
have made: all of them are escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...converter.format.untrusted import check_regular, check_text
from ...converter.output.writing import write_small
from ...converter.telling.chart import Point, Series, chart
from ...converter.telling.errors import ConvertError, ResumableError
from ...converter.telling.notebook import escaped
from . import words
from .page_parts import SCRIPT, STYLE

if TYPE_CHECKING:
    from .compared import ComparedCase, Comparison

AMPLIFIED = 16  # times the difference is shown
_MARK = '<meta name="generator" content="fp8-convert compare">'
_MARK_WITHIN = 2000  # bytes
_BESIDE, _LARGE = 256, 512  # pixels: how wide pictures are side by side, and at least in the large view
_BROKEN = (1.0, 0.0, 1.0)  # what NaN and Inf are shown as
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class View:
    """A case to look at: its worst frame, float32 [H, W, C], by whose it is; the original's first, then FP8's."""

    case: ComparedCase
    frames: Mapping[str, Tensor]


@dataclass(frozen=True)
class Page:
    """The file of a page that may be written."""

    path: Path

    def write(self, found: Comparison, views: Sequence[View]) -> None:
        """Write the page whole or not at all. Raises ConvertError where the disk is full or fails."""
        try:
            write_small(self.path, rendered(found, views).encode(), self.path.name)
        except ResumableError as error:
            cause = getattr(error.__cause__, "strerror", None)
            if cause is None:
                raise
            raise ConvertError(
                f"The page {self.path} cannot be written ({cause}); free some space or choose another file, and run "
                "again."
            ) from error


def open_page(path: str | os.PathLike[str], *, force: bool) -> Page:
    """The page at a path, checked before there is anything to write. Raises ConvertError where a file is there that
    is no such page, unless it is to be replaced by force."""
    check_text(path, "The page's path")
    page = Page(Path(path))
    check_regular(page.path, str(page.path))
    folder = next(parent for parent in page.path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConvertError(f"No page can be written into {folder}; choose another file, or fix its permissions.")
    if not page.path.exists() or force:
        return page
    try:
        with open(page.path, "rb") as file:
            ours = _MARK.encode() in file.read(_MARK_WITHIN)
    except OSError as error:
        raise ConvertError(f"{page.path} cannot be read ({error.strerror}); choose another file.") from error
    if not ours:
        raise ConvertError(f"{page.path} exists and is no page of compare; choose another file, or pass force.")
    return page


def rendered(found: Comparison, views: Sequence[View]) -> str:
    """The page's HTML."""
    title = escaped(f"{found.fp8.label} against {found.original.label}")
    body = [
        f"<h1>{title}</h1>",
        f'<p class="verdict">{html.escape(found.verdict)}</p>',
        *_list("problems", found.problems),
        *_section("Pictures", _pictures(found, views)),
        *_section("Distances", _distances(found)),
        *_section("Layers", _layers(found)),
        *_section("Time and memory", _table(words.costs(found))),
        *_section("How this was made", _made(found)),
    ]
    head = f'<meta charset="utf-8">{_MARK}<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    head += f'<meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
    inside = "\n".join([*body, f"<script>{SCRIPT}</script>"])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{inside}\n</body></html>\n'


def _pictures(found: Comparison, views: Sequence[View]) -> Iterator[str]:
    if not views:
        return
    left = len(found.cases) - len(views)
    more = f" The other {left} are closer to the original, and not shown." if left else ""
    yield (
        f"<p>The worst frame of each case, the farthest from the original first.{more} In the large view, the keys 1 "
        "to 4 and the arrows choose a picture, the space bar swaps original and FP8, and F flickers.</p>"
    )
    for view in views:
        yield from _case(view)


def _case(view: View) -> Iterator[str]:
    case, original = view.case, view.frames["original"]
    frame = f", frame {case.worst_frame + 1} of {len(case.fp8)}" if len(case.fp8) > 1 else ""
    shown = {**view.frames, f"difference of FP8, {AMPLIFIED} times": _difference(view.frames["FP8"], original)}
    label = escaped(f"{case.case.label}{frame}")
    width = max(_LARGE, original.shape[1])
    yield f'<article class="case"><h3>{label}</h3><p>{html.escape(_about(case))}</p><div class="views">'
    for name, picture in shown.items():
        image = f'<img src="{_data_uri(picture)}" alt="{name}: {label}" width="{_BESIDE}">'
        yield f"<figure>{image}<figcaption>{name}</figcaption></figure>"
    yield f'</div><div class="stage" tabindex="0" aria-label="large view of {label}"><img alt="" width="{width}"></div>'
    yield "<p>"
    for number, name in enumerate(shown, 1):
        yield f'<button type="button" class="show" aria-pressed="false">{number} {name}</button>'
    yield '<button type="button" class="flicker" aria-pressed="false">F flicker</button></p></article>'


def _about(case: ComparedCase) -> str:
    if case.broken:
        return f"NaN or Inf (magenta) in {' and '.join(case.broken)}"
    parts = []
    for name, distances in (("FP8", case.fp8), ("control", case.control)):
        if distances and (d := distances[case.worst_frame]) is not None:
            measures = [f"{m} {v:.4f}" for m, v in (("SSIM", d.ssim), ("LPIPS", d.lpips)) if v is not None]
            psnr = "identical to the original" if d.identical else f"{d.psnr:.1f} dB"
            parts.append(f"{name} {', '.join([psnr, *measures])}")
    return "; ".join(parts)


def _distances(found: Comparison) -> Iterator[str]:
    yield from _table(words.distances(found))
    series = []
    for name in ("FP8", "control"):
        points = [
            Point(float(number), d.psnr, f"{case.case.label:.60}, frame {i + 1}: {d.psnr:.1f} dB")
            for number, case in enumerate(found.cases, 1)
            for i, d in enumerate(case.fp8 if name == "FP8" else case.control)
            if d is not None and not d.identical
        ]
        series += [Series(name, points)] if points else []
    if series:
        yield chart(series, x_label="case", y_label="PSNR in dB")


def _layers(found: Comparison) -> Iterator[str]:
    if not found.layers:
        return
    by_component: dict[str, list[Point]] = {}
    for number, layer in enumerate(found.layers, 1):
        if layer.mode is not None and abs(layer.sqnr) < 1000:  # neither infinite nor NaN
            point = Point(float(number), layer.sqnr, f"{layer.label}: {layer.sqnr:.1f} dB")
            by_component.setdefault(layer.component, []).append(point)
    if by_component:
        series = [Series(name, points) for name, points in by_component.items()]
        yield chart(series, x_label="layer, in the order of the files", y_label="SQNR of its weight in dB")
    yield from _table(words.worst_layers(found))


def _made(found: Comparison) -> Iterator[str]:
    yield from _list("notes", found.notes)
    sampling = {key: value for key, value in vars(found.sampling).items() if value not in (None, {})}
    sampling["extra"] = sorted(found.sampling.extra)
    facts = {
        "FP8": {"from": found.fp8.label, "commit": found.fp8.commit, "recipe": found.fp8.recipe},
        "original": {"from": found.original.label, "commit": found.original.commit},
        "sampling": sampling,
        "machine": dict(found.machine),
        "FP8 linears run": dict(found.fp8.run.products),
    }
    yield f"<pre>{html.escape(json.dumps(facts, indent=2, default=str))}</pre>"


def _section(title: str, parts: Iterator[str]) -> Iterator[str]:
    body = list(parts)
    if body:
        yield f"<section><h2>{title}</h2>"
        yield from body
        yield "</section>"


def _table(rows: words.Rows) -> Iterator[str]:
    head, *body = rows
    yield f"<table><tr>{''.join(f'<th>{escaped(cell)}</th>' for cell in head)}</tr>"
    for row in body:
        yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
    yield "</table>"


def _list(kind: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield f'<ul class="{kind}">{"".join(f"<li>{html.escape(line)}</li>" for line in lines)}</ul>'


def _difference(picture: Tensor, original: Tensor) -> Tensor:
    """What differs, amplified, without alpha; NaN where one of the two is no number."""
    return (picture[..., :3] - original[..., :3]).abs() * AMPLIFIED


def _data_uri(picture: Tensor) -> str:
    """A PNG of a frame, float32 [H, W, C]; what is no number is magenta."""
    from PIL import Image

    finite = picture.isfinite().all(-1, keepdim=True)
    colours = torch.tensor([*_BROKEN, 1.0])[: picture.shape[-1]]
    pixels = torch.where(finite, picture, colours).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    data = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
