"""What a snapshot holds beside its weights: carried over if a pipeline may read it, named if it is left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pipelines import copied, saved

from fp8_convert.converter import ConvertError, convert, plan_conversion, verify


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Z-Image pipeline that the test may change."""
    return copied(saved("z_image"), tmp_path / "source")


def write(folder: Path, *paths: str, content: bytes = b"content") -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def name_component(source: Path, name: str, value: Any) -> None:
    index = json.loads((source / "model_index.json").read_text())
    index[name] = value
    (source / "model_index.json").write_text(json.dumps(index))


CARRIED = [
    "tokenizer/sentencepiece.proto",
    "tokenizer/mel_filters.npy",
    "tokenizer/stats.npz",
    "tokenizer/tokens",
    "tokenizer/chat_templates/default.jinja",
    "transformer/extra.cfg",
    "scheduler/own_scheduler.py",
    "LICENSE",
    "NOTICE.md",
]


def test_what_a_component_may_read_is_carried_over(source: Path, tmp_path: Path) -> None:
    write(source, *CARRIED)
    result = convert(source, tmp_path / "out")
    assert all((tmp_path / "out" / path).read_bytes() == b"content" for path in CARRIED)
    assert result.plan.notes == ()
    assert verify(tmp_path / "out").ok


def test_what_is_left_out_is_named(source: Path) -> None:
    write(
        source,
        "assets/a.png",
        "assets/deep/b.json",
        "whole.safetensors",
        "picture.PNG",
        "training.sh",
        content=b"x" * 1000,
    )
    write(source, "vae/diffusion_pytorch_model.bin", "text_encoder/model.fp16.safetensors", content=b"x" * 2000)
    write(
        source,
        "transformer/model.onnx",
        "transformer/model.onnx_data",
        "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
        "transformer/pytorch_model.bin.index.json",
        "transformer/sample.jpg",
    )
    write(source, ".git/config", ".gitattributes", "transformer/.cache/x.json", "tokenizer/.hidden")
    plan = plan_conversion(source)
    weights = "only the safetensors that a component loads are converted"
    assert set(plan.notes) == {
        "2 files in assets/ (2.0 kB) are left out: model_index.json does not name it",
        "2 files beside model_index.json (2.0 kB) are left out: no pipeline reads it",
        "transformer/sample.jpg (7 B) is left out: no pipeline reads it",
        f"whole.safetensors (1.0 kB) is left out: {weights}",
        f"vae/diffusion_pytorch_model.bin (2.0 kB) is left out: {weights}",
        f"text_encoder/model.fp16.safetensors (2.0 kB) is left out: {weights}",
        f"4 files in transformer/ (28 B) are left out: {weights}",
    }
    assert set(plan.sidecars) == set(plan_conversion(saved("z_image")).sidecars)


def test_many_folders_take_few_lines(source: Path) -> None:
    write(source, *(f"checkpoint-{n}/x.txt" for n in range(50)), "one\x1b[2J/x.txt")
    notes = plan_conversion(source).notes
    assert len(notes) == 4
    assert notes[-1] == "48 files in 48 other places (336 B) are left out: model_index.json does not name it"
    assert all(note.isprintable() for note in notes)


def test_weights_in_other_formats_of_a_lone_component(tmp_path: Path) -> None:
    lone = copied(saved("z_image") / "text_encoder", tmp_path / "lone")
    write(lone, "pytorch_model.bin", "figures/a.txt", "tokens", "sample.png")
    plan = plan_conversion(lone)
    assert "tokens" in plan.sidecars
    assert len(plan.notes) == 3
    assert (
        "figures/x.txt (7 B) is left out: a component's files are in its own folder".replace("x.txt", "a.txt")
        in plan.notes
    )


# Components without a folder or without weights: what from_pretrained makes of them decides


@pytest.mark.parametrize("component", ["scheduler", "tokenizer"])
def test_files_of_a_component_beside_the_model_index(source: Path, tmp_path: Path, component: str) -> None:
    """diffusers loads a component that has no folder from the pipeline's own."""
    from diffusers import DiffusionPipeline

    write(source, f"{component}/extensionless")
    for file in (source / component).iterdir():
        shutil.move(file, source / file.name)
    (source / component).rmdir()
    result = convert(source, tmp_path / "out", components=["transformer"])
    assert (
        f"{component} has no folder of its own: its files beside model_index.json are carried over" in result.plan.notes
    )
    assert (tmp_path / "out" / "extensionless").is_file()
    assert verify(tmp_path / "out").ok
    shutil.rmtree(tmp_path / "out" / "transformer")  # its FP8 weights are for our loader
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", transformer=None, text_encoder=None, vae=None)
    assert getattr(pipeline, component) is not None


def test_no_files_of_a_component_at_all(source: Path) -> None:
    shutil.rmtree(source / "scheduler")
    with pytest.raises(ConvertError, match=r"scheduler in .*no such folder"):
        plan_conversion(source)


@pytest.mark.parametrize("files", [[], ["config.json"], ["config.json", "pytorch_model.bin"]], ids=len)
def test_a_component_that_the_pipeline_does_not_take(source: Path, tmp_path: Path, files: list[str]) -> None:
    name_component(source, "safety_checker", ["stable_diffusion", "StableDiffusionSafetyChecker"])
    write(source, *(f"safety_checker/{file}" for file in files), content=b'{"architectures": ["X"]}')
    result = convert(source, tmp_path / "out", components=["transformer"])
    assert any("safety_checker" in note for note in result.plan.notes)
    assert (tmp_path / "out" / "safety_checker" / "config.json").exists() == bool(files)
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("library", ["diffusers", "transformers", "stable_diffusion", "guardrail"])
def test_a_component_with_a_config_alone(source: Path, library: str) -> None:
    """Refused where its class is known to load weights; another library's class may need none."""
    index = json.loads((source / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipeline"
    index["safety_checker"] = [library, "Checker"]
    (source / "model_index.json").write_text(json.dumps(index))
    write(source, "safety_checker/config.json", content=b'{"architectures": ["Checker"]}')
    if library == "guardrail":
        assert "safety_checker/config.json" in plan_conversion(source).sidecars
    else:
        with pytest.raises(ConvertError, match=r"safety_checker in .* has no weights; download"):
            plan_conversion(source)
