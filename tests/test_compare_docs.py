"""docs/compare.md tells the truth: its commands and its Python run, on a small model with small pictures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import running_hub
from pipelines import saved

from fp8_convert.converter.cli.commands import main
from fp8_convert.loader.quality.control import CONTROLS
from fp8_convert.loader.quality.page import AMPLIFIED
from fp8_convert.loader.quality.weight_errors import COARSE_DB, MARGIN_DB

TEXT = (Path(__file__).parent.parent / "docs" / "compare.md").read_text()
SMALL = ["--steps", "1", "--height", "32", "--width", "32", "--argument", "max_sequence_length=32", "--control", "none"]


def fences(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [body for stated, body in found if stated == language]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A reader's folder with prompts, and a Hub that has the model, small."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red apple\n")
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("Tongyi-MAI/Z-Image-Turbo", saved("z_image"))
        yield


def test_the_commands_and_the_python(reader: None) -> None:
    commands = [line for body in fences("") for line in body.splitlines() if line.startswith("fp8-convert ")]
    assert len(commands) == 4
    for command in commands:
        small = SMALL if " compare " in command else []
        result = CliRunner().invoke(main, [*shlex.split(command)[1:], *small], catch_exceptions=False)
        assert result.exit_code == 0, f"{command}: {result.output}"
    assert Path("report.html").is_file()
    (snippet,) = fences("python")
    small_call = "steps=1, height=32, width=32, extra={'max_sequence_length': 32}, control='none'"
    assert "steps=9" in snippet
    exec(compile(snippet.replace("steps=9", small_call), "compare.md", "exec"), {})


def test_the_controls_and_the_limits_are_those_of_the_code() -> None:
    section = TEXT.partition("## Against a control")[2].partition("## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == CONTROLS
    assert f"more than {MARGIN_DB:g} dB below" in " ".join(TEXT.split())
    assert f"below {COARSE_DB:g} dB" in TEXT
    assert f"{AMPLIFIED} times amplified" in TEXT
