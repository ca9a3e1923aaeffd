"""The benchmarks' tables in the documents are their results', and what they measure is what loading makes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import saved

from fp8_convert.converter import convert
from fp8_convert.loader import load_component

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
NAMES = ("tables", "recording", "timing", "gpu_models")


@pytest.fixture(name="module")
def _module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a benchmark's module, and forgets it afterwards: the names are common ones."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in NAMES:
        sys.modules.pop(name, None)


def test_tables_in_documents_are_their_results(module: Any) -> None:
    tables = module("tables")
    marked = {}
    for document in tables.DOCUMENTS:
        for _, name, text, _ in tables.MARKED.findall(document.read_text()):
            marked[name] = text
            expected = tables.rendered(name)
            assert expected in (None, text), f"{name} in {document.name}: run python benchmarks/tables.py"
    assert set(marked) == set(tables.TABLES)
    assert "| 4352 × 3072 × 12288 |" in marked["static"]  # some are held, not all are None
    assert tables.rendered("static") == marked["static"]


def test_words_say_what_their_tables_say(module: Any) -> None:
    tables = module("tables")

    def percent(device: str, what: str, mode: str, than: str, of: str, cases: str = "") -> tuple[int, int]:
        """How much longer `what` takes in `mode` than `of` in `than`, percent: the least and the most of all rows."""
        rows = [row for row in tables.rows_of("transformer", device) if row.get("case", "").startswith(cases)]
        found = []
        for row in rows:
            if row.get("what") == what and row["mode"] == mode:
                wanted = {"case": row["case"], "what": of, "mode": than}
                wanted |= {"rule": row["rule"]} if of == "ours" else {}
                found.append(100 * (row["ms"] / tables.found(rows, **wanted)["ms"] - 1))
        return round(min(found)), round(max(found))

    def words(path: str) -> str:
        return " ".join((ROOT / path).read_text().split())

    low, high = percent("h200", "ours", "compiled", "compiled", "bf16")
    assert f"Compiled, FP8 takes {-high} to {-low}% less time than compiled BF16" in words("README.md")
    low, high = percent("h200", "ours", "eager", "eager", "bf16")
    assert f"eager, from {high}% more to {-low}% less" in words("README.md")
    low, high = percent("h100", "ours", "compiled", "compiled", "bf16", "qwen-4")
    said = f"up to {percent('h100', 'ours', 'eager', 'eager', 'bf16', 'qwen-4')[1]}% longer than BF16 eager"
    assert f"{said}, and {-high} to {-low}% less compiled" in words("README.md")
    assert percent("h100", "ours", "compiled", "compiled", "bf16")[1] < 0, "faster than BF16 in every row"
    low, high = percent("h200", "ours", "recorded", "eager", "ours")
    most = percent("h200", "ours", "both", "compiled", "ours")[1]
    assert f"took from {-low}% less to {high}% more, compiled code up to {most}% more" in words("docs/loading.md")


def recorded(tables: Any, folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"rows": rows}))
    tables.RESULTS = folder


def test_a_table_of_transformers(module: Any, tmp_path: Path) -> None:
    tables = module("tables")
    case = {"case": "wan-1", "mode": "eager"}
    ours = {**case, "what": "ours", "rule": "default", "saving_ms": 2.0, "realised": 0.75, "ms": 8.5}
    rows = [
        {**case, "what": "bf16", "ms": 10.0, "busy_ms": 9.0},
        {**ours, "busy_ms": 8.0, "resident_gb": 0.5},
        {**ours, "mode": "compiled", "failed": "TimeoutError: not done"},
        {**ours, "mode": "both", "ms": 7.5},
        {"case": "wan-1", "what": "torchao", "failed": "ImportError"},
        {"case": "wan-1", "failed": "whatever came last"},
    ]
    recorded(tables, tmp_path, "transformer-h200-wan", *rows)
    (line,) = tables.rendered("transformer").splitlines()[2:]
    cells = "10.0 | failed | 8.5 | failed | failed | failed"
    assert line == f"| Wan2.2, 1 block, 32,760 tokens | {cells} |"
    (line,) = tables.rendered("recorded").splitlines()[2:]
    assert line.endswith("| 10.0 | failed | failed | failed | 8.5 | failed | failed | 7.5 |")
    assert tables.rendered("recorded_h100") is None  # another device's rows are not taken
    (line,) = tables.rendered("saving").splitlines()[2:]
    assert line.endswith("| 2.00 | 0.75 | failed | 9.0 | 8.0 | – | 0.5 | – | – |")


def test_documents_are_written_anew(module: Any, tmp_path: Path) -> None:
    tables = module("tables")
    row = {"part": "host", "dimensions": 2, "us": {"bf16": 18.2, "w8a8": 27.4}}
    recorded(tables, tmp_path, "linear-h100", row)
    text = "a\n<!-- table: host -->\nold\n<!-- end of table -->\n<!-- table: vae -->\nkept\n<!-- end of table -->\nb\n"
    found = tables.with_tables(text)
    assert "| 2-d | 18 | 27 | – | – |\n<!-- end" in found
    assert "old" not in found
    assert "kept" in found


def test_a_row_is_on_disk_before_the_next_one(module: Any, tmp_path: Path) -> None:
    recording = module("recording").Recording(tmp_path / "found.json")
    recording.add(case="one", ms=1.0)
    with recording.failing(case="two"):
        assert json.loads((tmp_path / "found.json").read_text())["rows"] == [{"case": "one", "ms": 1.0}]
        raise RuntimeError("no such kernel\nand more")
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert rows[1:] == [{"case": "two", "failed": "RuntimeError: no such kernel"}]


def test_a_row_is_completed_later(module: Any, tmp_path: Path) -> None:
    recording = module("recording").Recording(tmp_path / "found.json")
    for rule in ("one", "two"):
        recording.add(what="ours", rule=rule, mode="eager", ms=1.0)
    recording.add(what="ours", rule="one", failed="TimeoutError: not done")
    recording.complete({"what": "ours", "rule": "one"}, busy_ms=0.5)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row.get("busy_ms") for row in rows] == [0.5, None, None]
    with pytest.raises(KeyError, match="three"):
        recording.complete({"rule": "three"}, busy_ms=0.5)


def test_a_command_is_kept_without_its_folder(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/load.py", "--repeats", "5", "--json", str(tmp_path / "found.json")])
    command = module("recording").Recording(tmp_path / "found.json").found["command"]
    assert command == "python benchmarks/load.py --repeats 5 --json found.json"


def test_nothing_is_timed_after_a_profile(module: Any) -> None:
    timing = module("timing")
    with suppress(Exception):  # without a GPU
        timing.kernel_times(lambda: None)
    for timed in (timing.median, timing.host_microseconds):
        with pytest.raises(RuntimeError, match="profile"):
            timed(lambda: None)


@pytest.mark.parametrize(
    ("model", "manifest", "component"),
    [
        ("qwen_image", "qwen-image", "transformer"),
        ("qwen_image", "qwen-image", "text_encoder"),
        ("qwen_image", "qwen-image", "vae"),
        ("z_image", "z-image", "transformer"),
    ],
)
def test_what_is_measured_is_what_is_loaded(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, manifest: str, component: str
) -> None:
    """The layers, codes and scales that the benchmarks make of a model are those of its converted snapshot."""
    gpu_models = module("gpu_models")
    monkeypatch.setattr(gpu_models, "DEVICE", torch.device("cpu"))
    pipe = DiffusionPipeline.from_pretrained(saved(model), dtype=torch.bfloat16)
    made = getattr(pipe, component)
    for name, parameter in made.named_parameters():
        if "to_k." in name:
            parameter.data *= 3  # so that the scales of a group are not alike by themselves
    pipe.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "fp8")
    loaded = load_component(tmp_path / "fp8", component, device="cpu")
    gpu_models.make_fp8(made, gpu_models.decisions(made, manifest, component, type(made).__name__))
    expected, found = loaded.state_dict(), made.state_dict()
    assert found.keys() == expected.keys()
    assert any(tensor.dtype == torch.int8 for tensor in found.values())
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
