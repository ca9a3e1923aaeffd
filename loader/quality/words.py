"""A comparison in words: its verdict, its tables as rows of text, and the report that is printed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...converter.telling.printable import printable_lines
from ...converter.telling.quantities import byte_count, plural

if TYPE_CHECKING:
    from .compared import Comparison, Summary
    from .weight_errors import LayerError

Rows = list[list[str]]

# How far a harmless change moves pictures, by how many dB farther FP8 does: twice and ten times the squared error.
_MOVES = ((10.0, "far less"), (3.0, "less"), (0.0, "about as far"), (-math.inf, "as far or farther"))


def verdict(comparison: Comparison) -> str:
    """What the distances say. A number says how far pixels moved, not whether a picture got worse."""
    found, control = comparison.summary, comparison.control_summary
    if found is None:
        return "No picture could be compared."
    if found.psnr is None:
        return "Every picture is identical to the original's."
    fp8 = f"FP8's pictures are {found.psnr:.1f} dB from the original's in the mean, {found.worst_psnr:.1f} dB at worst."
    if comparison.control is None or control is None:
        return f"{fp8} Without a control that says little: sampling amplifies the smallest change."
    change = f"the original {comparison.control.change}"
    if control.psnr is None:
        return f"{fp8} The control says nothing: {change} gives identical pictures; choose another control."
    apart = control.psnr - found.psnr
    moves = next(words for least, words in _MOVES if apart >= least)
    times = f", so that FP8's squared error is {10 ** (apart / 10):.2g} times that" if apart > 0 else ""
    return (
        f"{fp8} A harmless change moves them {moves}: {change} is {control.psnr:.1f} dB from itself{times}. Whether "
        "that shows is for eyes to say."
    )


def distances(comparison: Comparison) -> Rows:
    """How far pictures are from the original's: a header, FP8, and the control."""
    rows = [["", "PSNR mean", "worst", "SSIM mean", "worst", "LPIPS mean", "worst", "frames", "identical"]]
    rows.append(["FP8", *_numbers(comparison.summary)])
    if comparison.control is not None and comparison.control.failed is None:
        rows.append([f"control: {comparison.control.kind}", *_numbers(comparison.control_summary)])
    return rows if any(row[5] != "-" for row in rows[1:]) else [[*row[:5], *row[7:]] for row in rows]


def costs(comparison: Comparison) -> Rows:
    """Time and memory of both pipelines: a header, FP8, the original."""
    rows = [["", "seconds a case", "seconds to load", f"peak {comparison.fp8.run.memory}"]]
    for name, ran in (("FP8", comparison.fp8), ("original", comparison.original)):
        run = ran.run
        peak = "-" if run.peak_bytes is None else byte_count(run.peak_bytes)
        rows.append([name, f"{run.seconds_per_case:.3g}", f"{run.load_seconds:.3g}", peak])
    return rows


def worst_layers(comparison: Comparison) -> Rows:
    """The layers whose weights are farthest from the original's: a header and a row each."""
    rows = [["layer", "FP8", "SQNR", "rounding gives", ""]]
    for layer in comparison.worst_layers:
        about = f"{layer.mode} {layer.scheme}" if layer.mode else "kept"
        rows.append([layer.label, about, _decibels(layer.sqnr), _decibels(layer.rounding), remark(layer)])
    return rows


def remark(layer: LayerError) -> str:
    """What is to be said of a layer's error."""
    if layer.problem is not None:
        return f"WRONG: {layer.problem}"
    return "its scale is too coarse: block scales help, or keeping it" if layer.coarse else ""


def remarks(comparison: Comparison) -> list[str]:
    """Problems, notes and verdict, a line each."""
    return [
        *(f"PROBLEM: {problem}" for problem in comparison.problems),
        *(f"note: {note}" for note in comparison.notes),
        comparison.verdict,
    ]


def report(comparison: Comparison) -> str:
    """All of it as text for a terminal."""
    one, other, sampling = comparison.fp8, comparison.original, comparison.sampling
    prompts = len({id(case.case.prompt) for case in comparison.cases})
    steps = "" if sampling.steps is None else f", {plural(sampling.steps, 'step')}"
    lines = [
        f"{one.label} against {other.label}: {plural(prompts, 'prompt')}, {plural(len(sampling.seeds), 'seed')}{steps}",
        ", ".join(f"{key} {value}" if key != "device" else value for key, value in comparison.machine.items()),
        "",
        *_table(distances(comparison)),
        "",
        *_table(costs(comparison)),
        *(["", *_table(_case_rows(comparison), left=(2,))] if len(comparison.cases) > 1 else []),
        *(["", *_table(worst_layers(comparison), left=(0, 1, 4))] if comparison.layers else []),
        "",
        *remarks(comparison),
    ]
    return printable_lines(lines)


def _case_rows(comparison: Comparison, most: int = 10) -> Rows:
    """The cases that are farthest from the original."""
    ranked = sorted(comparison.cases, key=lambda c: (not c.broken, _worst(c.summary)))
    rows = [["PSNR", "control", "farthest pictures" if len(ranked) > most else "pictures"]]
    for case in ranked[:most]:
        psnr = f"{' and '.join(case.broken)}: NaN or Inf" if case.broken else _decibels(_worst(case.summary))
        control = _decibels(_worst(case.control_summary)) if case.control else "-"
        rows.append([psnr, control, f"{case.case.label:.60}"])
    return rows


def _worst(summary: Summary | None) -> float:
    if summary is None:
        return math.nan
    return math.inf if summary.worst_psnr is None else summary.worst_psnr


def _numbers(summary: Summary | None) -> Iterator[str]:
    """The cells of a row of `distances`."""
    if summary is None:
        yield from ["-"] * 8
        return
    for psnr in (summary.psnr, summary.worst_psnr):
        yield "identical" if psnr is None else f"{psnr:.1f} dB"
    for value in (summary.ssim, summary.worst_ssim, summary.lpips, summary.worst_lpips):
        yield "-" if value is None else f"{value:.4f}"
    yield str(summary.frames)
    yield str(summary.identical)


def _decibels(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "identical" if math.isinf(value) else f"{value:.1f} dB"


def _table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows in aligned columns, those of `left` and the last to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    aligned = []
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        cells[last] = row[last] if last in left else cells[last]
        aligned.append("  " + "  ".join(cells).rstrip())
    return aligned
