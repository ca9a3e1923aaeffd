"""docs/serving/vllm-omni.md tells the truth: its conversions run, and what it says is refused is."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hub_server import HubServer, running_hub
from pipelines import saved

from fp8_convert.converter import ConvertError, inspect, plan_conversion
from fp8_convert.converter.cli.commands import main

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/serving/vllm-omni.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODELS = {
    "Qwen/Qwen-Image": "qwen_image",
    "Tongyi-MAI/Z-Image-Turbo": "z_image",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan22",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """An empty folder, and a Hub that has the models which the page names, small."""
    monkeypatch.chdir(tmp_path)
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        for name, source in MODELS.items():
            hub.add_repo(name, saved(source))
        yield hub


def commands() -> list[str]:
    lines = [line for language, body in FENCE.findall(PAGE) if language == "" for line in body.splitlines()]
    return [line for line in lines if line.startswith("fp8-convert ")]


def quantised(folder: Path) -> set[str]:
    """The components of a snapshot whose config says that they are quantised."""
    configs = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/config.json")}
    return {name for name, config in configs.items() if "quantization_config" in config}


def test_the_commands_run(hub: HubServer) -> None:
    """In their order; each conversion writes FP8 into the components that the page names."""
    expected = {
        "Qwen/Qwen-Image": {"transformer", "text_encoder"},
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {"transformer", "transformer_2"},
    }
    assert len(commands()) == 4
    for command in commands():
        arguments = shlex.split(command)[1:]
        if "--component" in arguments:
            arguments.append("--force")  # the page converts to this folder a second time
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"{command}: {result.output}"
        if "-o" in arguments:
            out = Path(arguments[arguments.index("-o") + 1])
            fp8 = {"transformer"} if "--component" in arguments else expected[arguments[0]]
            assert quantised(out) == fp8
            assert inspect(out).target == "vllm-omni"


def test_the_snippet_runs(hub: HubServer) -> None:
    (snippet,) = [body for language, body in FENCE.findall(PAGE) if language == "python"]
    exec(compile(snippet, "vllm-omni.md", "exec"), {})
    assert quantised(Path("z-image-turbo-fp8")) == {"transformer"}


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("qwen_image", {"compact": True}),
        ("qwen_image", {"weight_block_size": [128, 128]}),
        ("qwen_image", {"components": ["vae"]}),
        ("z_image", {"components": ["text_encoder"]}),
        ("z_image/transformer", {}),
        ("wan22", {"components": ["transformer"]}),
        ("flux", {}),
    ],
    ids=str,
)
def test_what_it_says_is_refused_is(source: str, options: dict[str, Any]) -> None:
    name, _, component = source.partition("/")
    with pytest.raises(ConvertError, match=r"vllm-omni|vLLM-Omni"):
        plan_conversion(saved(name) / component, target="vllm-omni", **options)


def test_links_and_files_exist() -> None:
    paths = re.findall(r"`(tests/[\w./]+)`", PAGE)
    assert len(paths) == 2
    assert [path for path in paths if not (ROOT / path).is_file()] == []
