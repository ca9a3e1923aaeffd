"""The numbers of docs/quality.md, and those that others quote, are what the benchmarks wrote; its command runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fp8_convert.converter.cli.commands import main
from fp8_convert.loader.quality.layer_errors import decibels

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "quality.md").read_text()
NAMES = {
    "**default** (per-tensor scales, activations per token)": "default",
    "`--compact`": "`--compact`",
    "`--weight-block-size 128 128`": "blocks of 128×128",
    "`--ignored-layers feed_forward.w2`": "`feed_forward.w2` kept",
    "`--ignored-layers feed_forward` (as `img_mlp` of Qwen-Image)": "`feed_forward` kept",
    "static activations, `--method max`": "static activations, max",
    "static activations, `--method percentile`": "static activations, percentile",
    "static activations, `--method mse`": "static activations, mse",
    'activations in BF16 (`backend="dequantize"`)': "weights alone (activations in BF16)",
    "`high_precision_steps=(2, 2)`": "`high_precision_steps=(2, 2)`",
    "proposed by `sensitivity` for 32 dB": "proposed by sensitivity",
}
CONTROLS = {
    "*control: the original in another attention kernel*": "default",
    "*control: the original in float32*": "default, once more",
}


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def table(heading: str, page: str = PAGE) -> list[list[str]]:
    """The rows of the first table below a text."""
    section = page.split(f"\n{heading}", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    assert lines is not None
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[0].splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def test_every_recipe_has_its_numbers() -> None:
    rows = {row["recipe"]: row["summary"] for row in results("quality-h100.json")["rows"]}
    told = table("## Recipes")
    assert [row[0] for row in told] == [*NAMES, *CONTROLS]
    for name, *cells in told:
        found = rows[NAMES[name]]["fp8"] if name in NAMES else rows[CONTROLS[name]]["control"]
        measures = [f"{found[key]:.1f}" for key in ("psnr", "worst_psnr")]
        assert cells == [*measures, *(f"{found[key]:.4f}" for key in ("ssim", "worst_ssim"))], name


def test_the_ranking_and_the_proposal() -> None:
    found = results("quality-h100.json")["sensitivity"]
    for row, unit in zip(table("## Which layers"), found["ranked"][:10], strict=True):
        assert row == [
            f"`{unit['name']}`".replace("|", "\\|"),
            f"{unit['share']:.1%}",
            f"{decibels(unit['error']):.1f} dB",
            f"{unit['cost'] / 1000:.1f} kB",
        ]
    proposal = found["proposal"]
    stated = [decibels(errors["transformer"]) for errors in (proposal["estimated"], proposal["measured"])]
    assert f"estimated to leave {stated[0]:.1f} dB and measured {stated[1]:.1f};" in PAGE.replace("\n", " ")
    assert f"The proposal keeps nine units, {proposal['cost'] / 1000:.0f} kB" in PAGE
    assert len(proposal["kept"]) == 9
    assert f"leaves {decibels(found['plain']['transformer']):.1f} dB of the DiT's output" in PAGE
    assert f"every layer ({decibels(proposal['in_blocks']['transformer']):.1f} dB there)" in PAGE


@pytest.mark.parametrize("number", [0, 1])
def test_the_planted_faults(number: int) -> None:
    found = results("quality-h100.json")
    (_, pictures, compare, sensitivity), fault = table("## Faults")[number], found["faults"][number]
    (row,) = [row for row in found["rows"] if row["recipe"] == fault["fault"]]
    assert pictures.startswith(f"{row['summary']['fp8']['psnr']:.1f} dB")
    assert f"transformer.layers.5.attention.to_out.0 {compare}." in fault["compare"]
    (suspect,) = fault["sensitivity"]
    assert suspect.startswith("SUSPECT transformer.layers.5.attention.to_out.0: ")
    assert re.findall(r"\d+\.\d dB", sensitivity) == re.findall(r"\d+\.\d dB", suspect)


def test_rounding() -> None:
    measured = results("rounding-emoji-cpu.json")["rows"]
    found = sorted(measured, key=lambda row: ("float32", "E4M3", "BF16").index(row["activations"]))
    nearest = {row["activations"]: row["output"] for row in found if row["weights"] == "nearest"}
    for row, told in zip(found, table("## Rounding"), strict=True):
        numbers = (row["output"], row["pictures"], row["worst"])
        stated = [float(told[column].removesuffix(" dB")) for column in (2, 4, 5)]
        assert stated == pytest.approx(numbers, abs=0.051), row
        if row["weights"] in ("float32", "nearest"):
            assert told[3] == ""
        else:
            assert float(told[3]) == pytest.approx(row["output"] - nearest[row["activations"]], abs=0.0051), row


def test_what_the_readme_quotes() -> None:
    rows = {row["recipe"]: row["summary"] for row in results("quality-h100.json")["rows"]}
    mean = {name: f"{summary['fp8']['psnr']:.1f}" for name, summary in rows.items()}
    worst, control = f"{rows['default']['fp8']['worst_psnr']:.1f}", f"{rows['default']['control']['psnr']:.1f}"
    quoted = (
        f"FP8 is {mean['default']} dB from BF16 in the mean ({worst} at worst; the original in another attention "
        f"kernel {control}), blocks {mean['blocks of 128×128']}, `--compact` {mean['`--compact`']}:"
    )
    assert quoted in " ".join((ROOT / "README.md").read_text().split())


def test_the_command_of_the_proposal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("emoji").mkdir()
    Path("emoji/model").symlink_to(ROOT / "emoji" / "model")
    Path("emoji/calibration.txt").write_text("red apple\n")
    torch.set_num_threads(1)
    (command,) = re.findall(r"^fp8-convert (sensitivity .*)$", PAGE, re.MULTILINE)
    small = command.replace("--steps 16", "--steps 1 --by pattern")
    result = CliRunner().invoke(main, shlex.split(small), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert Path("proposed.toml").is_file()
