"""A bar chart from the JSON of `convert.py`: python benchmarks/plot.py RESULT.json OUT.png (needs matplotlib)."""

import json
import sys
from pathlib import Path
from typing import Any

LABELS = {
    "ours": "fp8-convert",
    "unmeasured": "the same, no errors of weights",
    "read_back": "the same, read back",
    "limit": "the same, conversion off",
    "naive": "naive script",
}


def plot_conversion(result: dict[str, Any], path: Path) -> None:
    """Seconds of every tool on the first source, per-tensor scales, cold and warm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = result["cases"][0]["source"]
    chosen = [c for c in result["cases"] if c["source"] == first and c["scheme"] == "tensor"]
    tools = list(dict.fromkeys(map(_tool, chosen)))
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(tools) + 1.2))
    for offset, cache in ((0.2, "cold"), (-0.2, "warm")):
        seconds = {_tool(c): c["median"]["seconds"] for c in chosen if c["cache"] == cache}
        if not seconds:
            continue
        places = [len(tools) - tools.index(tool) + offset for tool in seconds]
        bars = axes.barh(places, list(seconds.values()), 0.38, label=f"{cache} page cache")
        axes.bar_label(bars, fmt="%.1f s", padding=3)
    axes.set_yticks([len(tools) - i for i in range(len(tools))], tools)
    axes.set_xlabel(f"seconds for {result['source_bytes'][first] / 1e9:.1f} GB {first.upper()}, fsync included")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _tool(case: dict[str, Any]) -> str:
    shards = f", {case['shards']} shards" if case.get("shards") else ""
    return f"{LABELS.get(case['tool'], case['tool'])} ({case['device']}{shards})"


if __name__ == "__main__":
    plot_conversion(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
