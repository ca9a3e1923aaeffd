"""Every command and snippet of docs/import.md runs, on small models from a Hub on loopback."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import foreign
import pytest
from click.testing import CliRunner
from hub_server import running_hub
from pipelines import saved
from safetensors.torch import load_file, save_file
from test_docs import fences

from fp8_convert.converter import convert, verify
from fp8_convert.converter.cli.commands import main

PAGE = Path(__file__).parents[1] / "docs" / "import.md"
DIT = "transformer/diffusion_pytorch_model.safetensors"


def write_what_the_page_names() -> None:
    for name, write, files in (
        ("qwen_image", foreign.comfyui, ["qwen_image_fp8.safetensors"]),
        ("wan22", foreign.channel, ["wan_high_noise.safetensors", "wan_low_noise.safetensors"]),
        ("z_image", foreign.modelopt, ["modelopt.safetensors"]),
    ):
        plain = load_file(saved(name) / DIT)
        made = write(plain, foreign.linears(plain))
        for file in files:
            save_file({n: t.contiguous() for n, t in made.tensors.items()}, file, made.metadata)
        if made.config is not None:
            foreign.as_folder(made, Path("modelopt-pipeline"))
    convert(saved("qwen_image"), "qwen-image-comfyui", target="comfyui")


def test_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("Qwen/Qwen-Image", saved("qwen_image"))
        hub.add_repo("Wan-AI/Wan2.2-T2V-A14B-Diffusers", saved("wan22"))
        write_what_the_page_names()
        commands = [line for body in fences(PAGE, "") for line in body.splitlines()]
        assert len(commands) == 9
        for command in commands:
            result = CliRunner().invoke(main, shlex.split(command)[1:], catch_exceptions=False)
            assert result.exit_code == 0, f"{command}: {result.output}"
        for snippet in fences(PAGE, "python"):
            exec(compile(snippet, "import.md", "exec"), {})
    for folder in ("qwen-image-fp8", "modelopt-fp8", "from-comfyui", "high", "wan-fp8", "imported"):
        assert verify(folder).ok
    assert (tmp_path / "qwen-image-fp16" / DIT).stat().st_size > (tmp_path / "qwen-image-fp8" / DIT).stat().st_size


def test_every_option_exists() -> None:
    known = {option for command in main.commands.values() for p in command.params for option in p.opts}
    assert set(re.findall(r"`(--[a-z-]+)", PAGE.read_text())) <= known
