"""The documentation tells the truth: its commands and snippets run, its sizes are the golden ones, its links exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_server import HubServer, running_hub
from pipelines import copied, saved

from fp8_convert.converter import convert
from fp8_convert.converter.cli.commands import main

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fences(document: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(document.read_text()) if found == language]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A reader's folder, and a Hub that has the models which the documentation names, small."""
    monkeypatch.chdir(tmp_path)
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("Qwen/Qwen-Image", saved("qwen_image"))
        hub.tokens["hf_readers"] = "me"
        monkeypatch.setenv("HF_TOKEN", "hf_readers")
        copied(saved("z_image"), tmp_path / "my-pipeline")
        Path("prompts.txt").write_text("a red cube\n")
        yield hub


def commands() -> list[str]:
    lines = [line for body in fences(ROOT / "README.md", "") for line in body.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("fp8-convert ")]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in the Hub's client, when it uploads
def test_commands_of_the_readme(reader: HubServer) -> None:
    assert len(commands()) > 5
    for command in commands():
        shutil.rmtree("out", ignore_errors=True)
        small = ["--height", "32", "--width", "32"] if "--prompts" in command else []
        typed = shlex.split(command.replace("--steps 20", "--steps 2"))[1:]
        result = CliRunner().invoke(main, [*typed, *small], catch_exceptions=False)
        assert result.exit_code == 0, f"{command}: {result.output}"
    assert all(Path(file).is_file() for file in ("report.html", "mine.toml", "scales.safetensors"))


def test_converting_in_python(reader: HubServer) -> None:
    snippets = [s for s in fences(ROOT / "README.md", "python") if "fp8_convert.converter" in s]
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    assert Path("my-pipeline-fp8/fp8_convert.json").is_file()


def test_loading_in_python(reader: HubServer) -> None:
    convert(saved("qwen_image"), "qwen-image-fp8")
    (snippet,) = [s for s in fences(ROOT / "README.md", "python") if "fp8_convert.loader" in s]
    small = snippet.replace("num_inference_steps=2", "num_inference_steps=2, height=64, width=64")
    names: dict[str, object] = {}
    exec(compile(small, "README.md", "exec"), names)
    assert names["image"]


def test_every_option_of_the_readme_exists() -> None:
    known = {option for command in main.commands.values() for p in command.params for option in p.opts}
    named = set(re.findall(r"`(--[a-z-]+)", (ROOT / "README.md").read_text()))
    assert named - known <= {"--help"}


def test_sizes_are_the_golden_ones() -> None:
    golden = json.loads((ROOT / "tests" / "converter" / "plan" / "golden_manifests.json").read_text())
    rows = {
        "Qwen-Image, -2512": "qwen-image",
        "Qwen-Image-Edit, -2509, -2511": "qwen-image-edit",
        "Qwen-Image-Layered": "qwen-image-layered",
        "Z-Image-Turbo": "z-image",
        "Wan2.2-T2V-A14B (FP32 as published)": "wan2.2",
    }
    text = (ROOT / "README.md").read_text()
    for label, name in rows.items():
        plain, compact = (golden[name][kind].values() for kind in ("plain", "compact"))
        before = sum(component["bytes"][0] for component in plain)
        after, stored = (sum(component["bytes"][1] for component in kind) for kind in (plain, compact))
        assert f"| {label} | {before / 1e9:.2f} GB | {after / 1e9:.2f} GB | {stored / 1e9:.2f} GB |" in text


@pytest.mark.parametrize("document", DOCS, ids=lambda d: d.name)
def test_links_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_contributing_names_files_and_commands_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"`([\w/]+\.(?:py|md|toml))`", text)) - {"manifests/NAME.toml"}
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))
    assert {"test", "demo"} <= set(re.findall(r"(?m)(?:^|`)make ([a-z]+)", text)) <= targets
