"""A report in other forms than print: short for a prompt, a table for a notebook, everything for scripts."""

import dataclasses
import json
from html.parser import HTMLParser

import pipelines
import pytest
import torch
from runs import converted
from torch import nn
from transformers import Qwen3Model

from fp8_convert.converter.snapshot.building import quiet_libraries
from fp8_convert.loader import Report, load_pipeline, report
from fp8_convert.loader.report import ComponentReport

BAD = ComponentReport(
    "<vae>", "A&B", "cpu", "torch.bfloat16", {"storage": 2}, {"storage": 1}, ("layers.<0>",), ("other",), 10, 20, {}
)


def test_a_prompt_shows_one_short_line() -> None:
    told = report(load_pipeline(converted("z_image"), device="cpu"))
    assert repr(told) == (
        "<Report of ZImagePipeline: every promised module is FP8 (text_encoder 10/10 storage, transformer 28/28 w8a8)>"
    )
    assert repr(Report("P", (BAD,), {})) == "<Report of P: SOME PROMISED MODULES ARE NOT FP8 (<vae> 1/2 storage)>"
    assert repr(report(nn.Linear(1, 1))) == "<Report of Linear: every promised module is FP8>"


class Table(HTMLParser):
    """The texts of a table's cells by row, and whatever other tags there are."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("tr", "caption"):
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows[-1]:
            self.rows[-1][-1] += data
        else:
            self.rows[-1].append(data)


def test_a_notebook_shows_an_escaped_table() -> None:
    table = Table(Report("<script>P</script>", (BAD, dataclasses.replace(BAD, name="x")), {})._repr_html_())
    assert table.tags == {"table", "caption", "tr", "th", "td"}
    assert table.rows == [
        ["<script>P</script>: SOME PROMISED MODULES ARE NOT FP8"],
        ["component", "FP8 modules", "GB at rest", "GB in BF16", "device", "dtype", "remarks"],
        ["<vae>", "1/2 storage", "0.000", "0.000", "cpu", "bfloat16", "NOT FP8: layers.<0>; unexpectedly FP8: other"],
        ["x", "1/2 storage", "0.000", "0.000", "cpu", "bfloat16", "NOT FP8: layers.<0>; unexpectedly FP8: other"],
    ]


def test_scripts_get_everything() -> None:
    told = report(load_pipeline(converted("z_image"), device="cpu"))
    data = json.loads(json.dumps(told.to_json()))
    assert data == told.to_json()
    assert (data["ok"], data["pipeline"], data["versions"]) == (True, "ZImagePipeline", dict(told.versions))
    assert [c["name"] for c in data["components"]] == [c.name for c in told.components]
    for part, component in zip(data["components"], told.components, strict=True):
        assert set(part) == {"ok", *(f.name for f in dataclasses.fields(component))}
    transformer = next(c for c in data["components"] if c["name"] == "transformer")
    assert transformer["expected"] == transformer["installed"] == {"w8a8": 28}
    assert transformer["backends"] == {"dequantize: the CPU has no FP8 matrix units": 28}
    assert json.loads(json.dumps(Report("P", (BAD,), {}).to_json())) == {
        "ok": False,
        "pipeline": "P",
        "versions": {},
        "high_precision_steps": None,
        "components": [
            {
                "ok": False, "name": "<vae>", "class_name": "A&B", "device": "cpu", "dtype": "torch.bfloat16",
                "expected": {"storage": 2}, "installed": {"storage": 1}, "missing": ["layers.<0>"], "extra": ["other"],
                "bytes_at_rest": 10, "bytes_in_bf16": 20, "backends": {}, "notes": [],
            }
        ],
    }  # fmt: skip


def test_printing_stays_as_it_is() -> None:
    model = nn.Linear(2, 2, dtype=torch.bfloat16)
    lines = str(dataclasses.replace(report(model), versions={"torch": "2"})).splitlines()
    assert lines == [
        "Linear (torch 2)",
        "component                       FP8 modules  GB at rest  GB in BF16  device, dtype",
        "Linear                                 none       0.000       0.000  cpu, bfloat16",
        "all                                               0.000       0.000  every promised module is FP8",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers dequantises where there is no GPU")
def test_a_text_encoder_that_transformers_dequantised_is_named() -> None:
    """Loaded by transformers alone and passed in, it is BF16, and nothing else of it tells."""
    folder = converted("z_image") / "text_encoder"
    with quiet_libraries():
        encoder = Qwen3Model.from_pretrained(folder, dtype=torch.bfloat16)
    assert encoder.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    told = report(load_pipeline(converted("z_image"), device="cpu", text_encoder=encoder))
    says = "transformers dequantised its FP8 weights to bfloat16 while loading; load_pipeline keeps them FP8"
    assert {c.name: c.notes for c in told.components} == {"text_encoder": (says,), "transformer": (), "vae": ()}
    assert says in str(told)
    assert says in told._repr_html_()
    assert [says] in [component["notes"] for component in told.to_json()["components"]]


def test_a_text_encoder_that_was_never_fp8_has_no_note() -> None:
    with quiet_libraries():
        encoder = Qwen3Model.from_pretrained(pipelines.saved("z_image") / "text_encoder", dtype=torch.bfloat16)
    assert report(encoder).components[0].notes == ()


def test_linears_that_share_their_input_are_counted() -> None:
    pipe = load_pipeline(converted("z_image"), device="cpu", backend="scaled_mm")
    (notes,) = [c.notes for c in report(pipe).components if c.name == "transformer"]
    assert notes == ("20 linears share their quantised input with those beside them, in 8 groups",)
    dequantising = load_pipeline(converted("z_image"), device="cpu")
    assert not any(c.notes for c in report(dequantising).components)


@pytest.mark.gpu
def test_linears_that_multiply_their_codes_are_counted() -> None:
    pipe = load_pipeline(converted("z_image"), device="cuda")
    notes = {c.name: c.notes for c in report(pipe).components}
    assert notes["transformer"][0] == (
        "28 w8a8 linears multiply up to 32 tokens with their codes, without quantising them"
    )
    assert notes["text_encoder"] == (
        "10 storage linears multiply up to 256 tokens with their codes, without quantising them",
    )
    forced = load_pipeline(converted("z_image"), device="cuda", backend="scaled_mm")
    assert not any("w8a8" in note for c in report(forced).components for note in c.notes)
