"""The tables of the documents, from what the benchmarks found on one kind of device: writes them between their marks.

    python benchmarks/tables.py

A table called NAME stands between `<!-- table: NAME -->` and `<!-- end of table -->`. Its rows are those of
results/BENCHMARK-DEVICE*.json, the later file's where two have the same; a table without results is left as it is.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
MODELS = {
    "qwen-4": "Qwen-Image, 4 blocks, 4096 + 256 tokens",
    "qwen-4-small": "Qwen-Image, 4 blocks, 1024 + 64 tokens",
    "qwen-60": "Qwen-Image, 60 blocks, 4096 + 256 tokens",
    "z-image": "Z-Image, the whole DiT, 4096 + 160 tokens",
    "wan-1": "Wan2.2, 1 block, 32,760 tokens",
    "wan-2": "Wan2.2, 2 blocks, 32,760 tokens",
    "wan": "Wan2.2, one transformer, 32,760 tokens",
}
MODES = ("eager", "compiled")
RECORDED_MODES = ("eager", "recorded", "compiled", "both")  # of BF16 and of what is ours
PEERS = {"layerwise casting": ("eager",), "torchao": MODES, "SDNQ": MODES}
Row = dict[str, Any]


def rows_of(benchmark: str, device: str) -> list[Row]:
    files = sorted(RESULTS.glob(f"{benchmark}-{device}*.json"), key=lambda file: (len(file.name), file.name))
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---").replace("|--- |", "|---|")


def number(row: Row | None, key: str, digits: int = 2) -> str:
    """The row's number; "failed" where the row says so, "–" where there is none."""
    if row is None:
        return "–"
    if "failed" in row:
        return "failed"
    return f"{row[key]:.{digits}f}" if row.get(key) is not None else "–"


def found(rows: Sequence[Row], **wanted: Any) -> Row | None:
    """The last of the rows that has these values; else the last that failed before it had all of them."""
    exact = [row for row in rows if wanted.items() <= row.items()]
    failed = [row for row in rows if "failed" in row and all(row.get(k, v) == v for k, v in wanted.items())]
    return (exact or failed or [None])[-1]


def _shapes(rows: Iterable[Row]) -> dict[str, Row]:
    return {row["shape"]: row for row in rows if row["part"] == "linear" and "ms" in row}


def _sizes(row: Row) -> str:
    return f"{row['m']} × {row['k']} × {row['n']}"


def linear(rows: list[Row]) -> str:
    columns = {
        "BF16": "bf16",
        "W8A8": "w8a8",
        "W8A8 compiled": "w8a8 compiled",
        "scales of rows": "w8a8 channel",
        "128×128 blocks": "w8a8 block",
        "storage": "storage",
        "torchao": "torchao",
        "torchao compiled": "torchao compiled",
        "SDNQ": "SDNQ",
    }
    failed = {(row.get("shape"), row.get("peer")): row for row in rows if "failed" in row}
    tried = {key for row in _shapes(rows).values() for key in row["ms"]} | {peer for _, peer in failed}
    columns = {title: key for title, key in columns.items() if key in tried}
    lines = []
    for shape, row in _shapes(rows).items():
        cells = [number(failed.get((shape, key), row["ms"]), key, 3) for key in columns.values()]
        lines.append([_sizes(row), *cells, f"{row['share']:.2f}"])
    return table(["tokens × K × N", *columns, "share of the ceiling"], lines)


def static(rows: list[Row]) -> str:
    keys = ("bf16", "w8a8", "w8a8 static")
    measured = [row for row in _shapes(rows).values() if row["m"] >= 256]
    lines = [[_sizes(row), *(number(row["ms"], key, 3) for key in keys)] for row in measured]
    return table(["tokens × K × N", "BF16", "dynamic", "static"], lines)


def group(rows: list[Row]) -> str:
    kinds = ("bf16", "single", "shared")
    lines = [
        [str(row["m"]), *(number(row["ms"], k, 3) for k in kinds), *(number(row["us"], k, 0) for k in kinds)]
        for row in rows
        if row["part"] == "group" and "ms" in row
    ]
    titles = ("BF16", "W8A8 one by one", "W8A8 as loaded")
    return table(["tokens", *(f"{t}, ms" for t in titles), *(f"{t}, host µs" for t in titles)], lines)


def host(rows: list[Row]) -> str:
    measured = [row for row in rows if row["part"] == "host" and "us" in row]
    kinds = {"BF16": "bf16", "W8A8": "w8a8", "128×128 blocks": "w8a8 block", "storage": "storage"}
    lines = [[f"{row['dimensions']}-d", *(number(row["us"], kind, 0) for kind in kinds.values())] for row in measured]
    return table(["input", *kinds], lines)


def _cases(rows: list[Row]) -> Iterable[tuple[str, str]]:
    """Models with the rules that they were made FP8 by."""
    asked = {(row["case"], row["rule"]) for row in rows if row.get("what") == "ours"}
    rules = list(dict.fromkeys(row["rule"] for row in rows if row.get("what") == "ours"))
    return [(case, rule) for case in MODELS for rule in rules if (case, rule) in asked]


def transformer(rows: list[Row]) -> str:
    peers = {peer: modes for peer, modes in PEERS.items() if any(row.get("what") == peer for row in rows)}
    lines = []
    for case, rule in _cases(rows):
        of_case = [row for row in rows if row.get("case") == case]
        last = [r for c, r in _cases(rows) if c == case and r != "--compact"][-1]
        line = [_title(case, rule), *_of_modes(of_case, rule, MODES)]
        for peer, modes in peers.items():  # which were given the layers of one rule
            line += [number(found(of_case, what=peer, mode=m), "ms", 1) if rule == last else "" for m in modes]
        lines.append(line)
    titles = [f"{what} {mode}" for what in ("BF16", "FP8") for mode in MODES]
    return table(["", *titles, *(f"{peer} {mode}" for peer, modes in peers.items() for mode in modes)], lines)


def recorded(rows: list[Row]) -> str:
    lines = []
    for case, rule in _cases(rows):
        of_case = [row for row in rows if row.get("case") == case]
        lines.append([_title(case, rule), *_of_modes(of_case, rule, RECORDED_MODES)])
    return table(["", *(f"{what} {mode}" for what in ("BF16", "FP8") for mode in RECORDED_MODES)], lines)


def _of_modes(rows: list[Row], rule: str, modes: Sequence[str]) -> list[str]:
    """Milliseconds of BF16 in each mode, then of what is ours by `rule`."""
    cells = [number(found(rows, what="bf16", mode=mode), "ms", 1) for mode in modes]
    return cells + [number(found(rows, what="ours", rule=rule, mode=mode), "ms", 1) for mode in modes]


def saving(rows: list[Row]) -> str:
    lines = []
    for case, rule in _cases(rows):
        of_case = [row for row in rows if row.get("case") == case]
        bf16 = found(of_case, what="bf16", mode="eager")
        eager, compiled = (found(of_case, what="ours", rule=rule, mode=mode) for mode in MODES)
        realised = [number(eager, "saving_ms"), number(eager, "realised"), number(compiled, "realised")]
        pairs = [number(row, key, 1) for key in ("busy_ms", "resident_gb", "peak_gb") for row in (bf16, eager)]
        lines.append([_title(case, rule), *realised, *pairs])
    head = ["possible saving, ms", "realised eager", "realised compiled"]
    head += [f"{what}, {kind}" for what in ("GPU busy, ms", "resident GB", "peak GB") for kind in ("BF16", "FP8")]
    return table(["", *head], lines)


def _title(case: str, rule: str) -> str:
    return MODELS[case] if rule == "default" else f"{MODELS[case]}, {f'`{rule}`' if rule[0] == '-' else rule}"


def text_encoder(rows: list[Row]) -> str:
    peers = [what for what in dict.fromkeys(row["what"] for row in rows) if what not in ("bf16", "ours")]
    lines = []
    for mode in MODES:
        for tokens in dict.fromkeys(row["tokens"] for row in rows if "tokens" in row):
            bf16, ours = (found(rows, what=what, mode=mode, tokens=tokens) for what in ("bf16", "ours"))
            line = [f"{tokens}, {mode}", number(bf16, "ms"), number(ours, "ms")]
            line += [number(ours, "ratio"), number(ours, "busy_ratio")]
            lines.append(line + [number(found(rows, what=p, mode=mode, tokens=tokens), "ratio") for p in peers])
    eager = [found(rows, what=what, mode="eager") for what in ("bf16", "ours", *peers)]
    memory = [number(row, "resident_gb", 1) for row in eager]
    lines.append(["weights, GB", memory[0], memory[1], "", "", *memory[2:]])
    return table(
        ["tokens", "BF16, ms", "FP8, ms", "to BF16", "GPU busy, to BF16", *(f"{peer}, to BF16" for peer in peers)],
        lines,
    )


def vae(rows: list[Row]) -> str:
    keys = {"ms": 1, "ratio": 3, "resident_gb": 2, "peak_gb": 2}
    lines = [[row["case"], row["what"], *(number(row, key, digits) for key, digits in keys.items())] for row in rows]
    return table(["", "weights", "ms", "to BF16", "resident GB", "peak GB"], lines)


def load(rows: list[Row]) -> str:
    names = {"load_component": "`load_component`, converted", "converting": "`load_component`, converting BF16"}
    parts = {"transformer": "DiT", "text_encoder": "text encoder"}
    keys = {"file_gb": 2, "seconds": 2, "gb_per_s": 1, "gpu_gb": 1, "peak_over_final_mib": 0}
    lines = [
        [parts[row["part"]], names.get(row["what"], f"{row['what']}, {row['file'].upper()}")]
        + [number(row, key, digits) for key, digits in keys.items()]
        for row in rows
        if "what" in row
    ]
    return table(["", "read by", "file GB", "seconds", "GB/s", "GPU GB", "MiB more while loading"], lines)


def parallel(rows: list[Row]) -> str:
    measured = [row for row in rows if "ms" in row]
    lines = []
    for case, way in dict.fromkeys((row["case"], row["way"]) for row in measured):
        of_way = [row for row in measured if (row["case"], row["way"]) == (case, way)]
        bf16, ours = ([row for row in of_way if row["what"] == what] for what in ("bf16", "ours"))
        times = [_range([row["ms"] for row in of if row["mode"] == m]) for of in (bf16, ours) for m in MODES]
        eager = [found(of, mode="eager") for of in (bf16, ours)]
        memory = [number(row, key) for key in ("resident_gb", "peak_gb") for row in eager]
        lines.append([f"{MODELS[case]}: {way}", *times, number(eager[1], "to_one", 4), *memory])
    titles = [f"{what} {mode}, ms" for what in ("BF16", "FP8") for mode in MODES]
    titles += ["FP8 to one GPU"]
    titles += [f"{what}, {kind}" for what in ("resident GB", "peak GB") for kind in ("BF16", "FP8")]
    return table(["", *titles], lines)


def _range(values: Sequence[float]) -> str:
    """One number where all are within 5%, otherwise the least and the largest; "–" where there is none."""
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{values[-1]:.1f}" if high < 1.05 * low else f"{low:.1f} to {high:.1f}"


TABLES: dict[str, tuple[Callable[[list[Row]], str], str, str]] = {  # how, of which benchmark, on which device
    "linear": (linear, "linear", "h100"),
    "static": (static, "linear", "h100"),
    "group": (group, "linear", "h100"),
    "host": (host, "linear", "h100"),
    "transformer": (transformer, "transformer", "h200"),
    "recorded": (recorded, "transformer", "h200"),
    "recorded_h100": (recorded, "transformer", "h100"),
    "saving": (saving, "transformer", "h200"),
    "text_encoder": (text_encoder, "text_encoder", "h200"),
    "vae": (vae, "vae", "h100"),
    "load": (load, "load", "h100"),
    "parallel": (parallel, "parallel", "h200"),
}


def rendered(name: str) -> str | None:
    """The table in Markdown; None where there are no results for it."""
    render, benchmark, device = TABLES[name]
    rows = rows_of(benchmark, device)
    text = render(rows) if rows else ""
    return text if text.count("\n") > 2 else None


def with_tables(text: str) -> str:
    """A document with its tables as the results give them."""

    def anew(match: re.Match[str]) -> str:
        head, name, old, end = match.groups()
        return head + (rendered(name) or old) + end

    return MARKED.sub(anew, text)


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        document.write_text(with_tables(text))
        for _, name, _, _ in MARKED.findall(text):
            print(f"{document.relative_to(ROOT)}: {name}{'' if rendered(name) else ' has no results'}")


if __name__ == "__main__":
    main()
