"""The errors of weights, from a conversion to the record and to who looks at it."""

from __future__ import annotations

import errno
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pipelines import copied, saved
from safetensors.torch import load_file, save_file

from fp8_convert.converter import convert, import_checkpoint, inspect, verify
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.cli.inspection_page import inspection_page
from fp8_convert.converter.output import writing
from fp8_convert.converter.output.record import load_record

DIT = "transformer/diffusion_pytorch_model.safetensors"
OUTLIER = "layers.0.attention.to_out.0"
SCALED = "layers.1.attention.to_out.0"
RELEASED = Path(__file__).parents[1] / "released"


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A source whose DiT is changed."""
    source = copied(saved("z_image"), folder)
    tensors = load_file(source / DIT)
    change(tensors)
    save_file(tensors, source / DIT, metadata={"format": "pt"})
    return source


def plant(tensors: dict[str, torch.Tensor]) -> None:
    """One huge outlier in a layer, and a layer that is another one's weights times a constant."""
    tensors[f"{SCALED}.weight"] = tensors[f"{OUTLIER}.weight"] * 2.0**-6
    tensors[f"{OUTLIER}.weight"][3, 5] = 1e5


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("planted")
    source = changed(folder / "source", plant)
    convert(source, folder / "out")
    return source, folder / "out"


def errors(folder: Path) -> dict[str, dict[str, Any]]:
    components = json.loads((folder / "fp8_convert.json").read_text())["components"]
    return {name: component["errors"] for name, component in components.items()}


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    return result.exit_code, result.output


# The record


def test_every_fp8_module_has_one(planted: tuple[Path, Path]) -> None:
    record = load_record(planted[1])
    assert record is not None
    for component in record.components.values():
        assert len(component.errors) == sum(component.fp8_modules.values())
        assert list(component.errors) == sorted(component.errors)
        for error in component.errors.values():
            assert error.sqnr_db is not None
    assert verify(planted[1], source=planted[0]).ok


def test_device_threads_and_files_do_not_matter(planted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = planted
    convert(source, tmp_path / "out", workers=7, max_shard_size="200KB")
    assert errors(tmp_path / "out") == errors(out)


def test_an_interrupted_conversion_has_those_of_its_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = copied(saved("z_image", max_shard_size="300KB"), tmp_path / "source")
    convert(source, tmp_path / "whole")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    committed: list[str] = []
    commit = writing.FileWriter.commit

    def commit_some(self: writing.FileWriter) -> str:
        committed.append(self.label)
        if len(committed) > 5:
            raise full
        return commit(self)

    with monkeypatch.context() as broken:
        broken.setattr(writing.FileWriter, "commit", commit_some)
        with pytest.raises(OSError, match="No space"):
            convert(source, tmp_path / "out")
    assert convert(source, tmp_path / "out").resumed_shards
    assert (tmp_path / "out/fp8_convert.json").read_bytes() == (tmp_path / "whole/fp8_convert.json").read_bytes()


def test_merged_weights_are_what_is_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = saved("z_image")
    weight = load_file(source / DIT)[f"{OUTLIER}.weight"]
    a, b = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    b[0] *= 1e5
    prefix = f"transformer.{OUTLIER}"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, tmp_path / "lora.safetensors")
    convert(source, tmp_path / "merged", merge_lora=[str(tmp_path / "lora.safetensors")], components=["transformer"])

    def fuse(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{OUTLIER}.weight"] += (b.bfloat16().double() @ a.bfloat16().double()).bfloat16()

    convert(changed(tmp_path / "fused-source", fuse), tmp_path / "fused", components=["transformer"])
    merged, fused = errors(tmp_path / "merged")["transformer"], errors(tmp_path / "fused")["transformer"]
    assert merged[OUTLIER]["vanished"] == fused[OUTLIER]["vanished"] > 1000
    assert merged[OUTLIER]["row_sqnr_db"] == pytest.approx(fused[OUTLIER]["row_sqnr_db"], abs=0.02)


def test_codes_that_were_imported_have_none(tmp_path: Path) -> None:
    convert(saved("z_image"), tmp_path / "comfyui", target="comfyui", components=["transformer"])
    (file,) = (tmp_path / "comfyui").rglob("*.safetensors")
    assert errors(tmp_path / "comfyui")["transformer"]
    import_checkpoint(file, tmp_path / "out", base=saved("z_image"))
    assert not any(errors(tmp_path / "out").values())
    assert verify(tmp_path / "out").ok
    code, output = run("inspect", tmp_path / "out", "--worst", 3)
    assert code == 0
    assert "no errors of weights: the record has none" in output


def test_a_folder_for_comfyui_has_them_of_the_source_s_modules(tmp_path: Path) -> None:
    convert(saved("z_image"), tmp_path / "native")
    convert(saved("z_image"), tmp_path / "comfyui", target="comfyui")
    native, comfyui = errors(tmp_path / "native"), errors(tmp_path / "comfyui")
    assert comfyui["transformer"] == native["transformer"]
    assert verify(tmp_path / "comfyui", source=saved("z_image")).ok
    (layer,) = (e for _, e in inspect(tmp_path / "comfyui").worst() if e.module == OUTLIER)
    assert (layer.scheme, layer.shape) == ("tensor", (256, 256))
    (joined,) = (e for _, e in inspect(tmp_path / "comfyui").worst() if e.module == "layers.0.attention.to_q")
    assert (joined.scheme, joined.shape) == ("tensor", None)


# Looking at it


def test_an_outlier_is_found_and_a_scaled_copy_is_not(planted: tuple[Path, Path]) -> None:
    ranked = inspect(planted[1]).worst()
    (component, worst), *_ = ranked
    assert (component, worst.module) == ("transformer", OUTLIER)
    assert worst.error.vanished / worst.error.weights > 0.2
    assert worst.error.row_sqnr_db is not None
    assert worst.error.row_sqnr_db < 20
    assert worst.error.sqnr_db is not None
    assert worst.error.sqnr_db > 60  # the outlier is all of the signal: why layers are not ranked by it
    (scaled,) = (layer for _, layer in ranked if layer.module == SCALED)
    assert scaled.error.vanished < 0.01 * scaled.error.weights
    assert scaled.error.sqnr_db == pytest.approx(31.5, abs=0.5)


def test_the_command_line(planted: tuple[Path, Path]) -> None:
    code, output = run("inspect", planted[1], "--worst", 2)
    assert code == 0
    *_, title, header, first, second = output.splitlines()
    assert title == "the worst layers:"
    assert header.split()[:2] == ["component", "layer"]
    assert first.split()[:2] == ["transformer", OUTLIER]
    assert first.split()[-3:] == ["256x256", "w8a8", "tensor"]
    assert second
    assert "the worst layers" not in run("inspect", planted[1])[1]
    code, output = run("inspect", planted[1], "--json")
    (layer,) = (e for c in json.loads(output)["components"] for e in c["errors"] if e["module"] == OUTLIER)
    assert layer["error"] == errors(planted[1])["transformer"][OUTLIER]
    assert (layer["shape"], layer["mode"], layer["scheme"]) == ([256, 256], "w8a8", "tensor")


def test_layers_are_in_the_order_of_their_numbers() -> None:
    """As a plot has them: `blocks.10` behind `blocks.2`."""
    from fp8_convert.converter.checks.weight_errors import _in_order

    names = ["b.10.x", "b.2.x", "b.2.10", "b.2.9", "a", "b"]
    assert sorted(names, key=_in_order) == ["a", "b", "b.2.9", "b.2.10", "b.2.x", "b.10.x"]


def test_the_page(planted: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    assert run("inspect", planted[1], "--html", page)[0] == 0
    text = page.read_text()
    svg = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    titles = [t.text or "" for t in svg.iter("title")]
    layers = inspect(planted[1]).worst()
    assert len(titles) == len(layers)
    assert any(t.startswith(f"transformer {OUTLIER}: ") for t in titles)
    assert {"SQNR by row in dB", "layer", "transformer", "text_encoder"} <= {t.text for t in svg.iter("text")}
    assert text.index(f"<td>{OUTLIER}</td>") < text.index(f"<td>{SCALED}</td>")
    assert text.count("<td>transformer</td>") >= len([name for name, _ in layers if name == "transformer"])
    for outside in ("http:", "https:", "src=", "href=", "<script", "@import", "url("):
        assert outside not in text


def test_the_page_of_an_older_snapshot() -> None:
    page = inspection_page(inspect(RELEASED / "format-3"))
    assert "no errors of weights" in page
    assert "<svg" not in page


def test_a_page_that_cannot_be_written(planted: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = run("inspect", planted[1], "--html", tmp_path / "file" / "page.html")
    assert code == 1
    assert "page.html" in output
