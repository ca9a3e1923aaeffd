"""`sensitivity` and `calibrate` as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from click.testing import CliRunner, Result
from damage import LAYER, SHARD, set_float
from pipelines import saved
from runs import converted

from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.cli.quality import _METHODS, _UNITS
from fp8_convert.converter.plan.scales import read_input_scales
from fp8_convert.loader.quality.ranges import Method
from fp8_convert.loader.quality.units import By

SMALL = [
    "--steps", "2", "--height", "64", "--width", "64", "--guidance", "0", "--argument", "max_sequence_length=32",
    "--device", "cpu",
]  # fmt: skip


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="fp8-convert")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("red apple\n")
    torch.set_num_threads(1)
    return file


def test_choices_are_the_functions() -> None:
    assert get_args(Method) == _METHODS
    assert get_args(By) == _UNITS


def test_a_damaged_layer_is_told_by_exit_code_and_name(tmp_path: Path, prompts: Path) -> None:
    faulty = Path(shutil.copytree(converted("z_image"), tmp_path / "faulty"))
    set_float(faulty / SHARD, f"{LAYER}.weight_scale", 0.5)
    common = ["sensitivity", saved("z_image"), "--fp8", faulty, "--prompts", prompts, *SMALL, "--by", "block"]
    data = json.loads(run(*common, "--json", "-q", code=1).stdout)
    assert [suspect["layer"] for suspect in data["suspects"]] == [f"transformer.{LAYER}"]
    assert data["suspects"][0]["error"] > 0.5
    assert data["how"]["steps"] == 2


def test_a_proposal_is_written_and_taken(tmp_path: Path, prompts: Path) -> None:
    file = tmp_path / "mine.toml"
    common = ["--prompts", prompts, *SMALL, "--by", "pattern"]
    said = run("sensitivity", saved("z_image"), *common, "--budget", "100KB", "-o", file).stdout
    assert "proposal for 100.0 kB: keep 1 unit (65.5 kB more)" in said
    assert said.endswith(f"wrote {file}\n")
    assert run("manifests", "check", file, saved("z_image")).stdout.endswith("ok\n")
    plan = json.loads(run(saved("z_image"), "--manifest", file, "--dry-run", "--json").stdout)
    assert plan["recipe"]["manifest"] == "mine"
    assert "fp8-convert sensitivity: " in json.dumps(plan)
    refused = run("sensitivity", saved("z_image"), *common, "--budget", "100KB", "-o", file, code=1)
    assert refused.stderr == f"error: {file} exists; name another file, or replace it with --force.\n"


def test_calibrated_scales_are_written_and_taken(tmp_path: Path, prompts: Path) -> None:
    file = tmp_path / "scales.safetensors"
    common = ["--prompts", prompts, *SMALL]
    said = run("calibrate", saved("z_image"), *common, "--method", "mse", "-o", file).stdout
    assert said.startswith("28 layers calibrated (mse, 1 prompt, 1 seed)")
    assert len(read_input_scales(file)) == 28
    run(saved("z_image"), "-o", tmp_path / "out", "--activation-scheme", "static", "--input-scales", file)
    data = json.loads(
        run("sensitivity", saved("z_image"), *common, "--by", "block", "--input-scales", file, "--json").stdout
    )
    assert 0 < data["plain"]["transformer"] < 0.01


@pytest.mark.parametrize("command", ["sensitivity", "calibrate"])
def test_hostile_input_is_one_sentence(tmp_path: Path, prompts: Path, command: str) -> None:
    output = ["-o", tmp_path / "s.safetensors"] if command == "calibrate" else []
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    for arguments, message in (
        (["no/such/folder", "--prompts", prompts], "no/such/folder"),
        ([saved("z_image"), "--prompts", tmp_path / "missing.txt"], "missing.txt"),
        ([saved("z_image"), "--prompts", empty], "holds no prompt"),
        ([saved("z_image"), "--prompts", prompts, "--steps", "2", "--frames", "5", "--device", "cpu"], "no num_frames"),
        ([converted("z_image"), "--prompts", prompts], "already"),
    ):
        said = run(command, *arguments, *output, code=1).stderr.splitlines()[-1]
        assert said.startswith("error: ")
        assert message in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(prompts: Path) -> None:
    said = run("sensitivity", saved("z_image"), "--prompts", prompts, "--device", "cuda", code=1).stderr
    assert "finds no CUDA device" in said
