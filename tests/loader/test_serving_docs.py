"""Every command and snippet of docs/serving's pages on SGLang, transformers and diffusers runs, on tiny snapshots."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from click.testing import CliRunner
from hub_server import running_hub
from runs import converted
from safetensors.torch import save_file

from fp8_convert.converter.cli.commands import main

PAGES = Path(__file__).parents[2] / "docs" / "serving"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fences(page: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall((PAGES / page).read_text()) if found == language]


@pytest.mark.parametrize(("page", "count"), [("sglang.md", 5), ("transformers.md", 2), ("diffusers.md", 1)])
def test_commands(page: str, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [line for body in fences(page, "") for line in body.splitlines()]
    assert len(commands) == count
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("Qwen/Qwen-Image", pipelines.saved("qwen_image"))
        for command in commands:
            shutil.rmtree("out", ignore_errors=True)
            result = CliRunner().invoke(main, shlex.split(command)[1:], catch_exceptions=False)
            assert result.exit_code == 0, f"{command}: {result.output}"


@pytest.mark.parametrize(("page", "count"), [("transformers.md", 3), ("diffusers.md", 6)])
def test_snippets(page: str, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(converted("qwen_image"), "qwen-image-fp8")
    _adapter(Path("adapters/one.safetensors"))
    snippets = fences(page, "python")
    assert len(snippets) == count
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(_small(snippet), page, "exec"), names)


def _adapter(path: Path) -> None:
    path.parent.mkdir()
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(4, 256), f"{layer}.lora_B.weight": torch.ones(256, 4)}, path)


def _small(snippet: str) -> str:
    """The snippet with small pictures and, on a machine without a GPU, with the CPU instead of one."""
    snippet = snippet.replace("num_inference_steps=20)", "num_inference_steps=2, height=64, width=64)")
    if torch.cuda.is_available():
        return snippet
    return snippet.replace('onload_device="cuda"', 'onload_device="cpu"').replace(", use_stream=True", "")


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.name)
def test_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
