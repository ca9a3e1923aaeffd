"""Plans, inspections and results as text for a terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..targets.choosing import TARGETS, described
from ..telling.printable import printable_lines
from ..telling.quantities import byte_count, change, parameter_count, plural, share

if TYPE_CHECKING:  # only what is rendered has been imported
    from ..checks.weight_errors import LayerError
    from ..conversion import Result
    from ..inspection import Inspection
    from ..plan.manifest import Manifest
    from ..plan.manifest_check import ManifestCheck
    from ..plan.matching import Match
    from ..plan.plan import Plan
    from ..pushing import Push
    from ..verification import Verification

NO_ERRORS = (
    "no errors of weights: the record has none, since nothing was converted here, its codes were imported, or an older "
    "version wrote it"
)
ERROR_COLUMNS = (
    "component", "layer", "SQNR by row", "SQNR", "worst row", "saturated", "subnormal", "vanished", "shape", "as",
)  # fmt: skip
_WORTH_SAYING = 0.05  # of the bytes: what --compact must save to be mentioned


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is, None for a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def render_plan(plan: Plan, width: int | None = None) -> str:
    """A table per component: what becomes FP8, what is kept and why, bytes before and after.

    width: columns to fit into; None for one line per row. The same holds for the other tables.
    """
    from ..plan.showing import rows

    lines = [plan.title]
    for component in plan.components:
        before, after = component.weight_bytes
        lines += ["", f"{component.source.label} ({component.source.class_name}): {change(before, after)}"]
        table = [["decision", "kind", "tensors", "params", "before", "after", "rule", "why"]]
        for row in rows(component):
            decision = f"fp8 {row.mode} {row.scheme}" if row.mode else row.otherwise
            sizes = [byte_count(size) for size in (row.bytes_before, row.bytes_after)]
            numbers = [str(row.count), parameter_count(row.params), *sizes]
            table.append([decision, row.kind or "-", *numbers, row.rule, row.why])
        lines += _table(table, right=(2, 3, 4, 5), width=width, words=2)
    lines += [f"note: {note}" for note in plan.notes]
    lines += ["", described(plan.recipe.reader)]
    lines += [f"total: {plan.sizes} in {plural(len(plan.weight_files), 'file')}"]
    before, after = plan.bytes_to_read, plan.weight_bytes
    if plan.compact_saves > _WORTH_SAYING * after:
        lines.append(
            f"--compact would store the ignored DiT layers in FP8 too: {change(before, after - plan.compact_saves)}"
        )
    if plan.bytes_read_twice:
        lines.append(f"{byte_count(plan.bytes_read_twice)} are read twice: their fusion groups are measured first")
    return printable_lines(lines)


def render_inspection(inspection: Inspection, width: int | None = None, worst: int = 0) -> str:
    """A table per component: FP8, scales and what is kept, by module kind; then what is wrong with it.

    worst: how many of the layers are to follow whose codes miss most.
    """
    lines = [inspection.title]
    if inspection.source:
        lines.append(f"source: {inspection.source}")
    if inspection.target in TARGETS:
        lines.append(described(TARGETS[inspection.target]))
    lines += [f"merged: {lora}" for lora in inspection.merged_loras]
    for component in inspection.components:
        method = component.quant_method and f"quant_method {component.quant_method}"
        about = ", ".join(filter(None, (component.class_name, method)))
        name = component.name or "component"
        lines += ["", f"{name}{f' ({about})' if about else ''}: {byte_count(component.bytes)}"]
        table = [["what", "kind", "dtype", "tensors", "params", "bytes", "why"]]
        for group in component.groups:
            what = " ".join(filter(None, (group.what, group.mode, group.scheme)))
            numbers = [str(group.tensors), parameter_count(group.params), byte_count(group.bytes)]
            table.append([what, group.kind or "-", group.dtype, *numbers, group.why])
        lines += _table(table, right=(3, 4, 5), width=width, words=1)
        lines += [f"PROBLEM: {problem}" for problem in component.problems]
    if worst:
        rows = [error_row(component, layer) for component, layer in inspection.worst(worst)]
        lines += ["", "the worst layers:" if rows else NO_ERRORS]
        lines += _table([[*ERROR_COLUMNS], *rows], right=(2, 3, 4, 5, 6, 7), width=width, words=2) if rows else []
    return printable_lines(lines)


def error_row(component: str, layer: LayerError) -> list[str]:
    """The cells of a layer, below ERROR_COLUMNS."""
    error = layer.error
    shape = "x".join(map(str, layer.shape)) if layer.shape is not None else "-"
    return [
        component or "component",
        layer.module,
        *(("exact" if value is None else f"{value:.2f} dB") for value in (error.row_sqnr_db, error.sqnr_db)),
        f"{100 * error.row_error:.2f}%",
        *(share(count, error.weights) for count in (error.saturated, error.subnormal, error.vanished)),
        shape,
        " ".join(filter(None, (layer.mode, layer.scheme))) or "-",
    ]


def render_result(result: Result) -> str:
    """The summary of a finished conversion in one line, and who reads its output in another."""
    sizes = change(result.bytes_before, result.bytes_after)
    if result.already_done:
        return f"already done: {result.output}, {sizes}, snapshot {result.snapshot_sha256[:12]}"
    details = [f"{result.gigabytes_per_second:.2f} GB/s"]
    if result.peak_rss is not None:
        details.append(f"peak RSS {result.peak_rss / 2**20:.0f} MiB")
    if result.resumed_shards:
        details.append(f"{plural(result.resumed_shards, 'shard')} resumed")
    wrote = f"wrote {result.output}: {sizes} in {result.seconds:.1f} s ({', '.join(details)})"
    return f"{wrote}\n{described(result.plan.recipe.reader)}"


def render_verification(verification: Verification) -> str:
    """The findings, one a line, and a verdict."""
    lines = [f"{f.path}: {f.problem}" for f in verification.findings]
    lines += [f"note: {note}" for note in verification.notes]
    return printable_lines([*lines, verification.verdict])


def render_push(push: Push) -> str:
    """What was pushed, one line; of a dry run also every file and the card."""
    if push.commit is not None:
        return printable_lines([push.summary])
    table = [["file", "bytes"], *([path, byte_count(size)] for path, size in push.files.items())]
    return printable_lines([*push.card.splitlines(), "", *_table(table, right=(1,), width=None, words=0), push.summary])


def render_manifests(manifests: Sequence[Manifest], width: int | None = None) -> str:
    """The shipped manifests, what chooses each, and what its rules rest on."""
    from ..plan.evidence import evidence

    table = [["name", "for", "chosen by", "evidence"]]
    for manifest in manifests:
        chosen = ", ".join((*manifest.repos, *manifest.pipelines)) or "anything else"
        table.append([manifest.name, manifest.description, chosen, str(evidence(manifest))])
    return "\n".join(_table(table, right=(), width=width, words=3))


def render_manifest_check(check: ManifestCheck, width: int | None = None) -> str:
    """A table per component table of the manifest: what each entry matches, and what matches nothing."""
    lines = [f"{check.manifest} against {check.source}"]
    by_table: dict[str, list[Match]] = {}
    for match in check.matches:
        by_table.setdefault(match.table, []).append(match)
    for name, matches in by_table.items():
        applied = ", ".join(matches[0].examples) or "no component"
        lines += ["", f"components.{name} applies to {applied}"]
        table = [["section", "matches", "", "entry", "examples"]]
        table += [[m.section, str(m.count), _mark(m), m.entry, ", ".join(m.examples)] for m in matches if m.section]
        if len(table) > 1 and matches[0].count:
            lines += _table(table, right=(1,), width=width, words=2)
    lines.append("")
    lines += [f"{name} is not checked: {problem}" for name, problem in check.unchecked.items()]
    lines += [f"no table names {name}: it is kept" for name in check.unnamed]
    lines += [f"PROBLEM: {m.place}: {m.problem}" for m in check.matches if m.problem]
    wrong = sum(1 for m in check.matches if m.problem)
    lines.append("ok" if check.ok else plural(wrong + len(check.unchecked), "problem"))
    return printable_lines(lines)


def _mark(match: Match) -> str:
    if match.problem:
        return "PROBLEM"
    return "" if match.count or match.section == "classes" else "optional"


def _table(table: list[list[str]], right: tuple[int, ...], *, width: int | None, words: int) -> list[str]:
    """Rows in aligned columns, those of `right` to the right.

    Where they do not fit into `width`, the last `words` columns go below their row, wrapped.
    """
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    beside = len(widths)
    if width is not None and sum(widths) + 2 * len(widths) > width:
        beside -= words
    lines = []
    for row in table:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells[:beside]).rstrip())
        if width is not None and (below := ": ".join(filter(None, row[beside:]))):
            lines += textwrap.wrap(
                below,
                width,
                initial_indent=" " * 6,
                subsequent_indent=" " * 8,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines
