"""docs/sensitivity.md and docs/calibrate.md tell the truth: their commands and their Python run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fp8_convert.converter.cli.commands import main

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("sensitivity", "calibrate")}


def fences(page: str, language: str) -> list[str]:
    """The page's snippets, for one step; a budget that this needs something for."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    smaller = {"--steps 16": "--steps 1", "steps=16": "steps=1", "32dB": "36dB"}
    bodies = [body for name, body in found if name == language]
    for stated, small in smaller.items():
        bodies = [body.replace(stated, small) for body in bodies]
    return bodies


@pytest.fixture(autouse=True)
def _reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A reader's folder with the model and the prompts, and one thread, which is quicker beside other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "emoji").symlink_to(ROOT / "emoji")
    (tmp_path / "prompts.txt").write_text("red apple\n")
    torch.set_num_threads(1)


def run(page: str) -> list[str]:
    """What the page's commands print."""
    said = []
    for line in "".join(fences(page, "")).splitlines():
        if line.startswith("fp8-convert "):
            result = CliRunner().invoke(main, shlex.split(line)[1:], catch_exceptions=False)
            assert result.exit_code == 0, f"{line}: {result.output}"
            said.append(result.stdout)
    return said


def test_the_commands_of_sensitivity() -> None:
    ranking, proposed, _, _, snapshot = run("sensitivity")
    assert "transformer.layers.*.feed_forward.(w1|w3)" in ranking
    assert re.search(r"proposal for 36 dB: keep \d+ units", proposed)
    (decibels,) = re.findall(r"measured transformer (\d+\.\d) dB", proposed)
    assert float(decibels) >= 36
    assert "wrote mine.toml" in proposed
    assert "SUSPECT" not in snapshot
    assert "fp8-convert sensitivity: " in Path("emoji-fp8/fp8_convert.json").read_text()


def test_the_commands_of_calibrate() -> None:
    calibrated, _, measured = run("calibrate")
    assert calibrated.startswith("98 layers calibrated (max, 1 prompt, 1 seed)")
    assert calibrated.endswith("wrote scales.safetensors\n")
    assert "with every layer in FP8" in measured
    config = json.loads(Path("emoji-static/transformer/config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "static"


@pytest.mark.parametrize("page", [*PAGES])
def test_the_python(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = fences(page, "python")
    names: dict[str, object] = {}
    exec(compile(snippet, f"{page}.md", "exec"), names)
    assert "transformer." in capsys.readouterr().out if page == "sensitivity" else names["pipe"]
