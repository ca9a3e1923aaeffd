"""docs/lora.md tells the truth: its commands and its Python run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import running_hub
from loras import bare_pipeline, linears, pairs, prefixed, write
from pipelines import saved

from fp8_convert.converter import inspect
from fp8_convert.converter.cli.commands import main

TEXT = (Path(__file__).parent.parent / "docs" / "lora.md").read_text()
MODELS = {"Qwen/Qwen-Image": "qwen_image", "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan22"}


def fences(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [body for stated, body in found if stated == language]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A reader's folder with the LoRAs that the page names, and a Hub that has the models, small."""
    monkeypatch.chdir(tmp_path)
    files = {"qwen_image": ("lightning", "style"), "wan22": ("high", "low")}
    for name, stems in files.items():
        shapes = linears(bare_pipeline(saved(name), name).transformer)
        for seed, stem in enumerate(stems):
            write(tmp_path / f"{stem}.safetensors", prefixed("transformer.", pairs(shapes, 4, seed)))
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        for repo, name in MODELS.items():
            hub.add_repo(repo, saved(name))
        yield


def test_the_commands(reader: None) -> None:
    commands = [line for body in fences("") for line in body.splitlines() if line.startswith("fp8-convert ")]
    assert len(commands) == 5
    for command in commands:
        result = CliRunner().invoke(main, shlex.split(command)[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{command}: {result.output}"
    assert [lora.component for lora in inspect("wan-fp8").merged_loras] == ["transformer", "transformer_2"]
    assert [lora.scale for lora in inspect("styled").merged_loras] == [1.0, 0.8]


def test_the_python(reader: None) -> None:
    (snippet,) = fences("python")
    names: dict[str, object] = {}
    exec(compile(snippet, "lora.md", "exec"), names)
    assert len(inspect("styled-fp8").merged_loras) == 2
    assert names["pipe"]
