"""Every command of docs/serving/comfyui.md runs, on a small model from a Hub on loopback, and its tree is right."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import running_hub
from pipelines import saved

from fp8_convert.converter.cli.commands import main

PAGE = (Path(__file__).parents[3] / "docs" / "serving" / "comfyui.md").read_text()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for language, body in FENCES if not language for line in body.splitlines()]
    return [line.partition("#")[0].strip() for line in lines]


def test_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("Qwen/Qwen-Image", saved("qwen_image"))
        assert len(commands()) == 7
        for command in commands():
            shutil.rmtree("out", ignore_errors=True)
            result = CliRunner().invoke(main, shlex.split(command)[1:], catch_exceptions=False)
            assert result.exit_code == 0, f"{command}: {result.output}"
    (tree,) = (body for language, body in FENCES if language == "text")
    stated = {line.strip() for line in tree.splitlines()[1:]}
    folder = tmp_path / "qwen-image-comfyui"
    assert stated == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
