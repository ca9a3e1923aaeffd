"""Progress: a bar on a terminal alone, plain lines elsewhere, nothing where nothing is asked for."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import constants
from huggingface_hub import utils as hub_utils
from transformers.utils import logging as transformers_logging

from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.telling.progress import Bar, Lines, Silent, bars_of_libraries, for_terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_told_where() -> None:
    assert isinstance(for_terminal(Terminal()), Bar)
    assert isinstance(for_terminal(io.StringIO()), Lines)
    assert isinstance(for_terminal(Terminal(), quiet=True), Silent)
    assert isinstance(for_terminal(io.StringIO(), quiet=True), Silent)


def test_quiet_says_nothing() -> None:
    progress = for_terminal(out := Terminal(), quiet=True)
    progress.start(10)
    progress.advance(10)
    progress.say("note: something")
    progress.close()
    assert out.getvalue() == ""


def test_lines_count_anew_from_each_start() -> None:
    lines = Lines(out := io.StringIO(), every_s=0)
    for _ in range(2):
        lines.start(10**9)
        lines.advance(10**9)
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == ["1.00 of 1.00 GB"] * 2


def test_lines_are_rare() -> None:
    lines = Lines(out := io.StringIO(), every_s=3600)
    lines.start(10)
    lines.advance(10)
    assert out.getvalue() == ""


def draw_all() -> None:
    """Let every library that draws bars draw one."""
    for tqdm in (diffusers_logging.tqdm, transformers_logging.tqdm, hub_utils.tqdm):
        for _ in tqdm(range(2)):
            pass


@pytest.mark.parametrize(("out", "quiet", "bars"), [(Terminal(), False, 3), (Terminal(), True, 0), (None, False, 0)])
def test_bars_of_libraries(capsys: pytest.CaptureFixture[str], out: io.StringIO | None, quiet: bool, bars: int) -> None:
    with bars_of_libraries(out, quiet=quiet):
        draw_all()
    assert capsys.readouterr().err.count("100%") == bars
    draw_all()
    assert capsys.readouterr().err.count("100%") == 3, "what libraries did before is restored"


def test_bars_that_were_off_stay_off(capsys: pytest.CaptureFixture[str]) -> None:
    hub_utils.disable_progress_bars()
    diffusers_logging.disable_progress_bar()
    try:
        with bars_of_libraries():
            draw_all()
        draw_all()
        assert capsys.readouterr().err.count("100%") == 1  # transformers'
    finally:
        hub_utils.enable_progress_bars()
        diffusers_logging.enable_progress_bar()


@pytest.mark.parametrize("decided", ["0", "1"])
def test_no_warning_where_the_environment_decides(decided: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", decided == "1")
    assert constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    with bars_of_libraries():
        draw_all()


def test_a_log_holds_no_bars(tmp_path: Path) -> None:
    """The demo builds, saves and loads models, and their libraries draw bars for each."""
    done = CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0
    assert "%|" not in done.output
