"""The commands and the snippet of docs/push.md run, against a Hub on loopback."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import HubServer, running_hub
from pipelines import saved

from fp8_convert.converter import convert
from fp8_convert.converter.cli.commands import main

PAGE = Path(__file__).parent.parent / "docs" / "push.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # by the client, of httpx


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub, and a folder with a converted snapshot."""
    monkeypatch.chdir(tmp_path)
    convert(saved("qwen_image"), "qwen-image-fp8")
    with running_hub(monkeypatch, tmp_path / "home") as server:
        server.tokens["hf_mine"] = "me"
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        yield server


def fences(language: str) -> list[str]:
    return [body for found, body in FENCE.findall(PAGE.read_text()) if found == language]


def test_its_commands_and_its_snippet(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    (commands,), (snippet,) = fences(""), fences("python")
    for command in commands.splitlines():
        result = CliRunner().invoke(main, shlex.split(command)[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{command}: {result.output}"
    assert len(hub.messages) == 1
    exec(compile(snippet, "push.md", "exec"), {})
    assert capsys.readouterr().out == f"{hub.url}/me/qwen-image-fp8 {hub.commit('me/qwen-image-fp8')}\n"


def test_it_has_every_option() -> None:
    known = {option for parameter in main.commands["push"].params for option in parameter.opts if option[:2] == "--"}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE.read_text()))
    assert named <= known | {"--source"}
    assert known - named <= {"--quiet", "--help"}
