"""docs/sensitivity.md and docs/calibrate.md tell the truth: their commands and their Python run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fp8_convert.converter import inspect, verify
from fp8_convert.converter.cli.commands import main

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("sensitivity", "calibrate")}


def fences(page: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    return [
        body.replace("--steps 16", "--steps 2").replace("steps=16", "steps=2")
        for name, body in found
        if name == language
    ]


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
    assert re.search(r"proposal for 32 dB: keep \d+ units", proposed)
    assert "measured transformer 32." in proposed
    assert "wrote mine.toml" in proposed
    assert "SUSPECT" not in snapshot
    reasons = {g.why for c in inspect("emoji-fp8").components for g in c.groups}
    assert any("fp8-convert sensitivity: " in str(why) for why in reasons) or verify("emoji-fp8").ok


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
