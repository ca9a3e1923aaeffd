"""Snapshots of every record format that was ever released still load and verify, or are refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pipelines import copied

from fp8_convert.converter import ConvertError, convert, inspect, verify
from fp8_convert.converter.format.layout import RECORD_FORMAT
from fp8_convert.converter.output.record import load_record
from fp8_convert.loader import load_component, report

RELEASED = Path(__file__).parents[2] / "released"
FORMATS = range(1, RECORD_FORMAT + 1)
MANIFEST = str(RELEASED / "tiny.toml")


def snapshot(number: int) -> Path:
    """The snapshot of a format; one that is missing is to be made with `tests/released/make.py`."""
    folder = RELEASED / f"format-{number}"
    assert (folder / "fp8_convert.json").is_file(), f"run python {RELEASED / 'make.py'}, and commit {folder}"
    return folder


def test_each_folder_has_its_format() -> None:
    assert sorted(int(p.name.partition("-")[2]) for p in RELEASED.glob("format-*")) == list(FORMATS)


@pytest.mark.parametrize("number", FORMATS)
def test_it_verifies(number: int) -> None:
    found = verify(snapshot(number))
    assert found.ok, found.findings
    assert found.files == 6


@pytest.mark.parametrize("number", FORMATS)
def test_it_is_inspected(number: int) -> None:
    found = inspect(snapshot(number))
    assert found.ok
    assert found.converted_by == "fp8-convert 0.1.0"
    counts = {c.name: sum(g.tensors for g in c.groups if g.what == "fp8") for c in found.components}
    assert counts == {"transformer": 11, "text_encoder": 4}


@pytest.mark.parametrize("number", FORMATS)
@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_it_loads(number: int, component: str) -> None:
    model = load_component(snapshot(number), component, device="cpu", verify=True)
    assert report(model).ok
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("number", FORMATS)
def test_what_the_record_tells(number: int) -> None:
    record = load_record(snapshot(number))
    assert record is not None
    assert (record.format, record.recipe.manifest, record.recipe.max_shard_size) == (number, "tiny", None)
    assert record.classes == {"transformer": "FluxTransformer2DModel", "text_encoder": "CLIPTextModel"}
    assert bool(record.components["transformer"].shared_scales) == (number > 1)


@pytest.mark.parametrize("number", FORMATS)
def test_the_weights_are_those_of_this_version(number: int) -> None:
    newest = snapshot(RECORD_FORMAT)
    for shard in sorted(newest.rglob("*.safetensors")):
        assert (snapshot(number) / shard.relative_to(newest)).read_bytes() == shard.read_bytes()


def test_an_older_format_is_not_compared_with_a_source(tmp_path: Path) -> None:
    message = r"has a record of the format 1, which cannot be compared with a source; verify it without --source, or"
    with pytest.raises(ConvertError, match=message):
        verify(snapshot(1), source=tmp_path, manifest=MANIFEST)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = copied(snapshot(RECORD_FORMAT), tmp_path / "newer")
    text = (folder / "fp8_convert.json").read_text()
    newer = RECORD_FORMAT + 1
    (folder / "fp8_convert.json").write_text(text.replace(f'"format": {RECORD_FORMAT}', f'"format": {newer}', 1))
    message = rf"fp8_convert\.json has the format {newer}, and this version reads 1 to {RECORD_FORMAT}; upgrade"
    with pytest.raises(ConvertError, match=message):
        load_component(folder, "transformer", device="cpu")
    assert [f.problem for f in verify(folder).findings] == [
        f"has the format {newer}, and this version reads 1 to {RECORD_FORMAT}"
    ]


def test_a_conversion_tells_that_the_format_is_older(tmp_path: Path) -> None:
    import runpy

    save_source = runpy.run_path(str(RELEASED / "make.py"))["save_source"]
    save_source(tmp_path / "source")
    folder = copied(snapshot(1), tmp_path / "older")
    with pytest.raises(ConvertError, match=r"made otherwise \(.*its record has the format 1, .*pass --force"):
        convert(tmp_path / "source", folder, manifest=MANIFEST)
