"""Memory stays bounded whatever a tensor's size, measured by the operating system in a process of its own."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from pipelines import copied, saved
from reference import read_safetensors
from safetensors.torch import load_file

from fp8_convert.converter.format.header import TensorInfo, encode_header
from fp8_convert.converter.snapshot.building import quiet_libraries

LIMIT = 300 * 2**20
_CHILD = """
import sys
from fp8_convert.converter import convert, plan_conversion

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

plan_conversion(sys.argv[1])  # builds the classes: all imports are done
imports = memory("VmHWM:")
convert(sys.argv[1], sys.argv[2], workers=2, shards=1, weight_block_size=[int(n) for n in sys.argv[3:]] or None)
print(imports, memory("VmHWM:"))
"""


@pytest.fixture(scope="module")
def three_gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan DiT of 3 GB in FP32 with weights of 1.1 GB: a sparse file, all zeros but for a few values."""
    folder = tmp_path_factory.mktemp("large") / "transformer"
    folder.mkdir()
    with torch.device("meta"), quiet_libraries():
        model = WanTransformer3DModel(num_layers=1, num_attention_heads=40, ffn_dim=53_760)
        model.save_config(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in sorted(model.state_dict().items())}
    tensors = write_sparse(folder / "diffusion_pytorch_model.safetensors", shapes, "F32")
    sizes = sorted(t.nbytes for t in tensors)
    assert sum(sizes) > 3e9
    assert sizes[-1] > 1.1e9
    return folder


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> list[TensorInfo]:
    """A safetensors file without memory or room on the disk: zeros, and -2 at the end of each FP32 weight."""
    tensors, position, size = [], 0, {"F32": 4, "BF16": 2}[dtype]
    for name, shape in shapes.items():
        tensors.append(TensorInfo(name, dtype, shape, position, position + size * math.prod(shape)))
        position = tensors[-1].end
    with open(path, "wb") as file:
        header = encode_header(tensors, {"format": "pt"})
        file.write(header)
        for tensor in tensors if dtype == "F32" else ():
            file.seek(len(header) + tensor.end - 4)
            file.write(torch.tensor(-2.0).numpy().tobytes())
        file.truncate(len(header) + position)
    return tensors


def check_memory(child: str, *arguments: object) -> None:
    """Run `child`, which prints its peak of memory after its imports and at its end: it stays below the limit."""
    command = [sys.executable, "-W", "ignore", "-c", child, *map(str, arguments)]
    imports, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert peak - imports <= LIMIT, f"{(peak - imports) / 2**20:.0f} MiB over imports"


_LOADING_CHILD = """
import sys
from fp8_convert.converter import plan_conversion
from fp8_convert.loader import load_component, report

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

plan_conversion(sys.argv[1])
imports = memory("VmHWM:")
model = load_component(sys.argv[1], quantization="fp8", device="cpu")
weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(imports, weights, memory("VmHWM:"))
"""


def test_converting_while_loading_holds_the_result_and_little_more(three_gigabytes: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOADING_CHILD, three_gigabytes],
        capture_output=True,
        text=True,
        check=True,
    )
    imports, weights, peak = map(int, done.stdout.split())
    assert peak - imports - weights <= LIMIT, f"{(peak - imports - weights) / 2**20:.0f} MiB over imports and weights"


def test_a_large_file_that_is_only_copied(tmp_path: Path) -> None:
    """What lies beside the weights may be of any size, too."""
    source = copied(saved("z_image"), tmp_path / "source")
    (source / "tokenizer" / "vocab.txt").touch()
    os.truncate(source / "tokenizer" / "vocab.txt", 2 * LIMIT)  # a sparse file
    check_memory(_CHILD, source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").stat().st_size == 2 * LIMIT
    shutil.rmtree(tmp_path / "out")


_PLANNING_CHILD = """
import json, sys
from fp8_convert.converter import ConvertError, plan_conversion

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

plan_conversion(sys.argv[1])
imports = memory("VmHWM:")
for source in sys.argv[2:]:
    try:
        plan_conversion(source)
    except ConvertError as error:
        print(error)
print(memory("VmHWM:") - imports)
"""


def test_dry_runs_of_hostile_sources(tmp_path: Path) -> None:
    """Whatever an uploader wrote into a config, it is refused in little memory."""
    good = saved("z_image") / "transformer"
    config = json.loads((good / "config.json").read_text())
    layers = {"n_layers": 10**8}
    modules = {"all_patch_size": [2] * 10**5, "all_f_patch_size": [1] * 10**5}  # as many as no number tells
    damages = {
        "has 2147483648 bytes": None,
        "has more than 2000000 JSON values": b'{"a":[' + b"[]," * 1_390_000 + b"[]]}",
        "asks for more layers": json.dumps({**config, **layers}).encode(),
        "asks for more modules": json.dumps({**config, **modules}).encode(),
    }
    sources = []
    for number, content in enumerate(damages.values()):
        sources.append(copied(good, tmp_path / str(number)))
        if content is None:
            os.truncate(sources[-1] / "config.json", 2**31)  # a sparse file
        else:
            (sources[-1] / "config.json").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PLANNING_CHILD, good, *sources],
        capture_output=True,
        text=True,
        check=True,
    )
    *messages, peak = done.stdout.splitlines()
    for expected, message in zip(damages, messages, strict=True):
        assert expected in message
    assert int(peak) <= LIMIT, f"{int(peak) / 2**20:.0f} MiB over imports"


long_run = pytest.mark.skipif("FP8_CONVERT_FAULTS" not in os.environ, reason="a minute more: runs in `make faults`")


@long_run
def test_one_file_of_three_gigabytes(three_gigabytes: Path, tmp_path: Path) -> None:
    child = _CHILD.replace("workers=2", 'workers=2, target="comfyui"')
    check_memory(child, three_gigabytes, tmp_path / "out")
    (output,) = (tmp_path / "out").rglob("*.safetensors")
    written = read_safetensors(output)["blocks.0.ffn.0.weight"]
    assert written[0] == "F8_E4M3"
    assert written[2][-2:] == b"\x00\xfe"  # -2 is the largest magnitude: code -448
    output.unlink()


@pytest.mark.parametrize("block", [pytest.param([], id="tensor"), pytest.param([128, 128], id="block", marks=long_run)])
def test_three_gigabytes_with_a_tensor_of_one(three_gigabytes: Path, tmp_path: Path, block: list[int]) -> None:
    check_memory(_CHILD, three_gigabytes, tmp_path / "out", *block)
    output = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    written = read_safetensors(output)
    name = "blocks.0.ffn.net.0.proj.weight"
    assert written[name][0] == "F8_E4M3"
    assert written[name][2][-2:] == b"\x00\xfe"  # -2 is the largest magnitude: code -448
    assert json.loads((tmp_path / "out" / "config.json").read_text())["ffn_dim"] == 53_760
    output.unlink()


@pytest.fixture(scope="module")
def four_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan DiT in BF16 in four shards of a layer each, with fusion groups as large as Qwen-Image's: 1.5 GB."""
    folder = tmp_path_factory.mktemp("sharded") / "transformer"
    folder.mkdir()
    with torch.device("meta"), quiet_libraries():
        model = WanTransformer3DModel(num_layers=4, num_attention_heads=24, ffn_dim=12_288)
        model.save_config(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in sorted(model.state_dict().items())}
    index = {name: int(name.split(".")[1]) if name.startswith("blocks.") else 0 for name in shapes}
    names = [f"diffusion_pytorch_model-0000{i + 1}-of-00004.safetensors" for i in range(4)]
    for number, name in enumerate(names):
        tensors = write_sparse(folder / name, {n: shapes[n] for n in shapes if index[n] == number}, "BF16")
        assert sum(t.nbytes for t in tensors) > 3e8
    weight_map = {name: names[number] for name, number in index.items()}
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
    return folder


def test_one_file_of_four_shards(four_shards: Path, tmp_path: Path) -> None:
    child = _CHILD.replace("workers=2", 'workers=2, target="comfyui"')
    check_memory(child, four_shards, tmp_path / "out")
    (output,) = (tmp_path / "out").rglob("*.safetensors")
    written = read_safetensors(output)
    assert [written[f"blocks.{layer}.ffn.0.weight"][0] for layer in range(4)] == ["F8_E4M3"] * 4
    output.unlink()


def test_a_shard_more_under_way_takes_150_megabytes(four_shards: Path, tmp_path: Path) -> None:
    over_imports = {}
    for shards in (1, 2, 4):
        child = _CHILD.replace("shards=1", f"shards={shards}")
        command = [sys.executable, "-W", "ignore", "-c", child, str(four_shards), str(tmp_path / "out")]
        imports, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        over_imports[shards] = peak - imports
        shutil.rmtree(tmp_path / "out")
    found = {shards: f"{size / 2**20:.0f} MiB" for shards, size in over_imports.items()}
    assert over_imports[1] <= LIMIT, found
    for shards in (2, 4):
        assert over_imports[shards] <= over_imports[1] + (shards - 1) * 150 * 2**20, found
    assert over_imports[4] > over_imports[1] + 100 * 2**20, f"they were not under way together: {found}"


_IMPORTING_CHILD = """
import sys
from fp8_convert.converter import import_checkpoint, plan_import_checkpoint

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

plan_import_checkpoint(sys.argv[1])
imports = memory("VmHWM:")
import_checkpoint(sys.argv[1], sys.argv[2])
print(imports, memory("VmHWM:"))
"""


@long_run
def test_importing_a_weight_of_400_megabytes(tmp_path: Path) -> None:
    shard_name = "diffusion_pytorch_model.safetensors"
    source = copied(saved("wan22") / "transformer", tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"ffn_dim": 400 * 2**12}
    (source / "config.json").write_text(json.dumps(config))
    tensors, position = [], 0
    for name, old in load_file(source / shard_name).items():
        large = name.startswith("blocks.0.ffn.net.0.proj")
        shape = (400 * 2**12, *old.shape[1:]) if large else tuple(old.shape)
        dtype, size = ("F8_E4M3", 1) if large else ("F32", 4)
        tensors.append(TensorInfo(name, dtype, shape, position, position + size * math.prod(shape)))
        position = tensors[-1].end
    with open(source / shard_name, "wb") as file:
        file.write(encode_header(tensors, {}))
        file.truncate(file.tell() + position)
    command = [sys.executable, "-W", "ignore", "-c", _IMPORTING_CHILD, str(source), str(tmp_path / "out")]
    imports, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert peak - imports <= LIMIT, f"{(peak - imports) / 2**20:.0f} MiB over imports"
    assert (tmp_path / "out" / shard_name).stat().st_size > 400 * 2**20
