"""The commands, the jobs and the snippet of docs/batch.md run, against a Hub on loopback."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import running_hub
from loras import bare_pipeline, linears, pairs, prefixed, write
from pipelines import copied, saved

from fp8_convert.converter import verify
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.jobs.job import KEYS
from fp8_convert.converter.output.capacity import memory_bound

CLI = [sys.executable, "-c", "from fp8_convert.converter.cli import main; main()"]
PAGE = Path(__file__).parent.parent / "docs" / "batch.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fences(language: str) -> list[str]:
    return [body for found, body in FENCE.findall(PAGE.read_text()) if found == language]


def test_it_has_every_key_and_option() -> None:
    text = PAGE.read_text()
    assert set(re.findall(r"`([a-z_]+)`", text)) >= set(KEYS)
    known = {option for parameter in main.commands["batch"].params for option in parameter.opts if option[:2] == "--"}
    named = set(re.findall(r"`(--[a-z-]+)", text))
    assert known - named <= {"--quiet", "--help"}
    assert named <= known | {"--stream"}


def test_the_memory_is_what_tasks_declare() -> None:
    one, two = memory_bound(1), memory_bound(2)
    said = [f"{memory_bound(0) / 1e9:.2f} GB", f"{(one - memory_bound(0)) / 1e6:.0f} MB", f"{(two - one) / 1e6:.0f} MB"]
    assert all(f" {size} " in PAGE.read_text() for size in said), said


def test_its_commands_and_its_snippet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (commands,), (jobs,), (snippet,) = fences(""), fences("json"), fences("python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps its token
    Path("jobs.jsonl").write_text(jobs)
    copied(saved("qwen_image"), tmp_path / "finetune-3")
    shapes = linears(bare_pipeline(saved("qwen_image"), "qwen_image").transformer)
    write(tmp_path / "style.safetensors", prefixed("transformer.", pairs(shapes, 4, 0)))
    counts = []
    with running_hub(monkeypatch, tmp_path / "hub") as hub:
        hub.add_repo("me/finetune-1", saved("z_image"))
        hub.add_repo("me/finetune-2", saved("wan22"))
        hub.move_branch("me/finetune-2", "v2", saved("wan22"))
        for command in commands.splitlines():
            words = [*dict.fromkeys([*shlex.split(command)[1:], "--json"])]
            if "--ray" in words:
                run = subprocess.run([*CLI, *words], capture_output=True, text=True, timeout=120)
                assert run.returncode == 0, run.stderr
                counts.append(json.loads(run.stdout)["counts"])
                continue
            result = CliRunner().invoke(main, words, catch_exceptions=False)
            assert result.exit_code == 0, result.output
            counts.append(json.loads(result.stdout)["counts"])
        assert counts == [{"planned": 3}, {"converted": 3}, {"already done": 3}]
        assert all(verify(Path("fp8") / f"finetune-{number}").ok for number in (1, 2, 3))
        exec(compile(snippet, "batch.md", "exec"), {})
    assert capsys.readouterr().out == "True {'already done': 1} []\n"


def test_the_page_on_scale_has_the_numbers_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PAGE.parent.parent / "benchmarks")
    import scale

    text = PAGE.with_name("scale.md").read_text()
    assert f"takes {scale.cpu_seconds_per_gb():.2f} CPU seconds for each GB" in text
    assert f"So {scale.LINK_GB_PER_S * scale.cpu_seconds_per_gb():.1f} cores keep up with a link of 10 Gbit/s" in text
    assert f"<!-- scale -->\n{scale.catalogue()}<!-- end of scale -->" in text
    runs = json.loads((PAGE.parent.parent / "benchmarks" / "results" / "batch-2-cores.json").read_text())
    one, single, double = (f"{run['seconds']:.1f} s" for run in runs["runs"])
    assert f"Eight jobs of {runs['source_bytes'] / 1e9:.2f} GB on {runs['machine']['cpus']} cores" in text
    assert f": {one} in one process, {single} on Ray with one CPU a job, {double} with two" in text
    for name in ("scale", "tables"):
        sys.modules.pop(name, None)
