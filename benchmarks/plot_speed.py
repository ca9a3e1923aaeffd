"""Bars from results of `transformer.py`: python benchmarks/plot_speed.py OUT.png [CASE...] (needs matplotlib)."""

import sys
from pathlib import Path

from tables import MODELS, TABLES, Row, rows_of

COLOURS = {"bf16": "#9aa0a6", "ours": "#1a73e8"}


def bars(rows: list[Row], case: str) -> list[tuple[str, float, str]]:
    """(label, milliseconds, colour) of every form of one model that was measured."""
    found = {}
    for row in rows:
        if row.get("case") == case and "ms" in row:
            rule = row.get("rule", "default")
            name = {"bf16": "BF16", "ours": "fp8-convert"}.get(row["what"], row["what"])
            label = f"{name}{'' if rule == 'default' else f', {rule}'}, {row['mode']}"
            found[label] = row["ms"], COLOURS.get(row["what"], "#dadce0")
    return [(label, ms, colour) for label, (ms, colour) in found.items()]


def plot(path: Path, cases: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, benchmark, device = TABLES["transformer"]  # the bars are the table's
    rows = rows_of(benchmark, device)
    measured = {case: bars(rows, case) for case in cases if bars(rows, case)}
    if not measured:
        raise SystemExit(f"benchmarks/results has no {benchmark}-{device}*.json with these cases")
    sizes = [len(found) for found in measured.values()]
    figure, parts = pyplot.subplots(len(sizes), squeeze=False, height_ratios=sizes, figsize=(8, 0.3 * sum(sizes) + 1))
    for axes, (case, found) in zip(parts[:, 0], measured.items(), strict=True):
        labels, ms, colours = zip(*reversed(found), strict=True)
        axes.bar_label(axes.barh(labels, ms, color=colours), fmt="%.1f ms", padding=3)
        axes.set_title(MODELS[case], loc="left", fontsize=10)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), sys.argv[2:] or list(MODELS))
