"""Every snippet of docs/loading.md runs, in order, on tiny snapshots under the names that it uses."""

import re
import shutil
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from runs import converted
from safetensors.torch import save_file

DOCS = Path(__file__).parents[2] / "docs" / "loading.md"


def test_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipelines.saved("qwen_image"), "qwen-image")
    shutil.copytree(converted("qwen_image"), "first")
    Path("adapters").mkdir()
    layer = "transformer.transformer_blocks.0.attn.to_q"
    adapter = {f"{layer}.lora_A.weight": torch.ones(4, 256), f"{layer}.lora_B.weight": torch.ones(256, 4)}
    save_file(adapter, "adapters/one.safetensors")
    snippets = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(snippets) == 11
    names: dict[str, Any] = {}
    for snippet in snippets:
        shutil.rmtree("qwen-image-fp8", ignore_errors=True)
        if "save_as" not in snippet:
            shutil.copytree("first", "qwen-image-fp8")
        code = snippet
        if not torch.cuda.is_available():
            for there, here in {'"cuda", ': '"cpu", ', ", use_stream=True": "", ", cuda_graphs=True": ""}.items():
                code = code.replace(there, here)
        code = code.replace(
            'pipe("a red cube", num_inference_steps=20)',
            'pipe("a red cube", height=64, width=64, num_inference_steps=2)',
        )
        exec(compile(code, str(DOCS), "exec"), names)
        if "enable_group_offload" in snippet:  # the next snippets go on without offloading
            exec('pipe = load_pipeline("qwen-image-fp8")', names)
    assert "every promised module is FP8" in capsys.readouterr().out
    assert names["image"].size == (64, 64)
