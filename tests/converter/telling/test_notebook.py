"""How results show themselves in Python: short, printable and escaped, whatever stands in a snapshot's files."""

from __future__ import annotations

import dataclasses
import html.parser
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pipelines import copied, saved
from safetensors.torch import load_file, save_file

from fp8_convert.converter import convert, inspect, plan_conversion, verify
from fp8_convert.converter.checks.finding import Finding
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.converter.telling.notebook import html_table
from fp8_convert.converter.verification import Verification
from fp8_convert.loader.report import ComponentReport, Report

HOSTILE = "<script>alert(1)</script>\x1b[2J\n" + "x" * 500
MARKUP = {"div", "b", "table", "tr", "th", "td"}


class Tags(html.parser.HTMLParser):
    """Fails for anything but the plain tags of a table."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in MARKUP
        assert not attributes


def reachable(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """Every dataclass instance in a result, itself included."""
    if id(value) in seen or isinstance(value, str | bytes):
        return
    seen[id(value)] = value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from reachable(item, seen)
    elif dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from reachable(getattr(value, field.name), seen)


def assert_shown_well(result: Any) -> None:
    for part in reachable(result, {}):
        assert len(repr(part)) <= 400, repr(part)[:500]
        assert repr(part).isprintable()
    table = result._repr_html_()
    assert len(table) < 40_000
    assert table.isprintable()
    Tags().feed(table)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in which every name that its files may choose is long and means harm."""
    folder = copied(saved("z_image"), tmp_path_factory.mktemp("notebook") / "source <b>\x1b[2J")
    for path, change in (
        ("model_index.json", {"_class_name": HOSTILE}),
        ("vae/config.json", {"_class_name": HOSTILE, HOSTILE: HOSTILE}),
    ):
        document = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps({**document, **change}))
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({f"{name}{HOSTILE}": t for name, t in load_file(file).items()}, file, {HOSTILE: HOSTILE * 100})
    return folder


@pytest.fixture(scope="module")
def results(hostile: Path) -> list[Any]:
    output = hostile.parent / "out <i>"
    result = convert(hostile, output)
    bad = Verification(str(output), 1, 1, HOSTILE, tuple(Finding(HOSTILE, HOSTILE) for _ in range(100)))
    return [plan_conversion(hostile), result, inspect(hostile), inspect(output), verify(output), bad]


def test_every_repr_is_short_and_every_table_is_escaped(results: list[Any]) -> None:
    for result in results:
        assert_shown_well(result)
        assert len(repr(result)) < 200


def test_one_line_says_what_one_wants_to_know(tmp_path: Path) -> None:
    source = saved("z_image")
    assert repr(plan_conversion(source)).startswith(f"<Plan {source} (ZImagePipeline), manifest z-image: 10.4 MB -> 7.")
    result = convert(source, tmp_path / "out")
    assert repr(result).startswith(f"<Result {tmp_path / 'out'}: 10.4 MB -> 7.0 MB (67.4%) in ")
    assert repr(verify(tmp_path / "out")).startswith(f"<Verification {tmp_path / 'out'}: ok (")
    inspection = inspect(tmp_path / "out")
    fp8 = sum(g.tensors for c in inspection.components for g in c.groups if g.what == "fp8")
    assert repr(inspection).startswith(f"<Inspection {tmp_path / 'out'}: fp8-convert ")
    assert repr(inspection).endswith(f"; {fp8} FP8 weights, 0 problems>")


def test_tables_hold_what_the_terminal_shows(tmp_path: Path) -> None:
    result = convert(saved("z_image"), tmp_path / "out")
    for table in (plan_conversion(saved("z_image"))._repr_html_(), result._repr_html_()):
        assert "<td>transformer</td><td>ZImageTransformer2DModel</td><td>28</td><td>45</td>" in table
        assert "<td>6.0 MB</td>" in table
    table = inspect(tmp_path / "out")._repr_html_()
    assert "<td>fp8 w8a8 tensor</td><td>Linear</td><td>F8_E4M3</td><td>28</td>" in table
    (tmp_path / "out" / "model_index.json").write_text("{}")
    assert "<td>model_index.json</td><td>has 2 bytes instead of" in verify(tmp_path / "out")._repr_html_()


def test_raw_bytes_and_secrets_are_not_shown() -> None:
    plan = plan_conversion(saved("z_image"))
    shard = plan.shards[0]
    assert f"raw=<{len(shard.source.header.raw)} bytes>" in repr(shard.source.header)
    assert f"header=<{len(shard.files[0].header)} bytes>" in repr(shard.files[0])
    assert "hf_secret" not in repr(HubAccess(token="hf_secret"))


def test_a_report_is_one_line_until_it_is_printed() -> None:
    names = tuple(f"{HOSTILE}{n}" for n in range(100))
    part = ComponentReport(HOSTILE, HOSTILE, "cpu", "x", {}, {}, names, names, 1, 1, {HOSTILE: 1})
    report = Report("ZImagePipeline", (part,), {})
    assert repr(report) == "<Report of ZImagePipeline: SOME PROMISED MODULES ARE NOT FP8>"
    assert str(report).startswith("ZImagePipeline ()\n")
    assert all(len(repr(r)) < 400 and repr(r).isprintable() for r in (part, report))


def test_long_tables_are_cut() -> None:
    table = html_table("many", ["n"], [(n,) for n in range(1000)], [f"note {n}" for n in range(1000)])
    assert table.count("<tr>") == 41
    assert "… and 960 more" in table
    assert table.count("note ") == 39
    assert len(table) < 5000
