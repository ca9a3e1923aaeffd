"""The program of docs/parallel.md runs under torchrun; on the CPU where there are no two GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from runs import converted

from fp8_convert.loader import fill

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"
HERE = {  # what a machine without two GPUs types instead
    'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))': "import ranks; ranks.stand_in_for_an_accelerator()",
    '"nccl"': '"gloo"',
    'torch.Generator("cuda")': "torch.Generator()",
}


def test_the_buffers_are_those_of_the_loader() -> None:
    assert f" {fill._SPANS} of {fill._SPAN_BYTES >> 20} MiB\n" in PAGE.read_text()


def test_its_program(tmp_path: Path) -> None:
    program, tensor = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    if torch.cuda.device_count() < 2:
        for there, here in HERE.items():
            assert there in program
            program = program.replace(there, here)
    program = program.replace("num_inference_steps=20", "num_inference_steps=2, height=64, width=64")
    last = "torch.distributed.destroy_process_group()"
    program = program.replace(last, f"{tensor}print(report(pipe))\n{last}")
    (tmp_path / "paint.py").write_text(program)
    (tmp_path / "qwen-image-fp8").symlink_to(converted("qwen_image"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "paint.py"]
    paths = [str(Path(__file__).parent), str(PAGE.parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "cube.png") as image:
        assert image.size == (64, 64)
    assert "tokens are divided among ranks (ulysses_degree=2)" in done.stdout
    assert "parameters are spread over 2 ranks" in done.stdout
    assert done.stdout.count("linears are cut among 2 ranks") == 2  # both ranks say so
