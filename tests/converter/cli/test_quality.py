"""The commands that run pipelines, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hub_server import running_hub
from pipelines import saved
from runs import converted

from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.cli.quality import _CONTROLS
from fp8_convert.loader.quality.control import CONTROLS

SMALL = ["--steps", "1", "--height", "32", "--width", "32", "--argument", "max_sequence_length=32", "--device", "cpu"]


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="fp8-convert")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\n")
    return file


def test_compare_with_a_page_and_json(tmp_path: Path, prompts: Path) -> None:
    page = tmp_path / "report.html"
    result = run(
        "compare", converted("z_image"), saved("z_image"), "--prompts", prompts, *SMALL, "--fail-below", "99",
        "-o", page, "--json", "--no-lpips", code=1,
    )  # fmt: skip
    data = json.loads(result.stdout)
    (problem,) = data["problems"]
    assert problem.startswith("PSNR falls below 99 dB in 1 of 1 case")
    assert data["sampling"]["steps"] == 1
    assert data["control"]["kind"] == "attention"
    assert "red apple" in page.read_text()
    assert "FP8: z_image" in result.stderr


def test_without_fp8_a_recipe_is_tried(prompts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("Tongyi-MAI/Z-Image-Turbo", saved("z_image"))
        result = run(
            "compare", "Tongyi-MAI/Z-Image-Turbo", "--prompts", prompts, *SMALL, "--control", "none",
            "--ignored-layers", "attention,feed_forward", "--compact", "--no-lpips", "-q",
        )  # fmt: skip
    text = result.stdout
    assert "Tongyi-MAI/Z-Image-Turbo, converted while loading against Tongyi-MAI/Z-Image-Turbo: 1 prompt" in text
    assert "ran dequantised" not in text  # nothing of the DiT is W8A8
    assert result.stderr == ""


def test_what_would_be_left_unsaid_is_a_wrong_command_line(prompts: Path) -> None:
    result = run("compare", "a", "b", "--prompts", prompts, "--compact", "--ignored-layers", "x", code=2)
    assert "FP8 is converted already; drop --compact, --ignored-layers and --weight-block-size" in result.stderr
    assert "is not NAME=VALUE" in run("compare", "a", "--prompts", prompts, "--argument", "x", code=2).stderr


@pytest.mark.parametrize("content", [None, b"", b"\n#\n", b"\xff"])
def test_a_prompts_file_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    result = run("compare", converted("z_image"), saved("z_image"), "--prompts", file, code=1)
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: {file} ")


def test_an_error_of_the_loader_is_a_sentence_too(tmp_path: Path, prompts: Path) -> None:
    (tmp_path / "out" / ".fp8-convert").mkdir(parents=True)
    result = run("compare", tmp_path / "out", saved("z_image"), "--prompts", prompts, code=1)
    assert result.stderr.startswith("error: The conversion into ")


def test_the_controls_are_those_of_the_library() -> None:
    assert _CONTROLS == CONTROLS  # spelled twice, so that help imports no PyTorch
