"""ComfyUI's files of the shipped models at their published sizes: planned from headers, with every name mapped."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_manifests_full_size import PUBLISHED, save_pipeline

from fp8_convert.converter.conversion import plan_conversion
from fp8_convert.converter.telling.quantities import byte_count

PAGE = Path(__file__).parents[3] / "docs" / "serving" / "comfyui.md"
MODELS = ("qwen-image", "qwen-image-edit", "qwen-image-layered", "wan2.2", "z-image")


def documented() -> dict[str, list[str]]:
    """{model: [DiT, with --compact, text encoder]} as the page's table of bytes has it."""
    table = PAGE.read_text().partition("| model | DiT | with `--compact`")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {model: sizes for model, *sizes in rows}


def sizes(folder: Path, *, compact: bool) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for file in plan_conversion(folder, target="comfyui", compact=compact).weight_files:
        found.setdefault(file.path.partition("/")[0], []).append(byte_count(file.size))
    return {kind: f"{len(files)} x {files[0]}" if len(files) > 1 else files[0] for kind, files in found.items()}


@pytest.mark.parametrize("model", MODELS)
def test_sizes_are_those_of_the_page(tmp_path: Path, model: str) -> None:
    save_pipeline(model, tmp_path / model, PUBLISHED)

    plain, compact = sizes(tmp_path / model, compact=False), sizes(tmp_path / model, compact=True)

    dits = plain["diffusion_models"], compact["diffusion_models"]
    assert [*dits, plain.get("text_encoders", "")] == documented()[model]


def test_the_page_has_every_model() -> None:
    assert set(documented()) == {*MODELS}
