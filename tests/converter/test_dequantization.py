"""`dequantize`: plain weights by an independent formula, loaded by stock libraries, and the same bytes once more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pipelines import BUILDERS, copied, saved
from reference import decode, read_safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp8_convert.converter import ConvertError, convert, dequantize, verify
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.format.header import TensorInfo, encode_header
from fp8_convert.converter.telling.progress import Silent

RECORD = "fp8_convert.json"
DIT = "transformer/diffusion_pytorch_model.safetensors"
_VALUES = np.array([decode(code) for code in range(256)], np.float32)
_KEPT = ("weight_scale", "weight_scale_inv", "input_scale")


def plain(file: Path) -> dict[str, torch.Tensor]:
    """What a converted file's tensors stand for, in BF16: codes from a table, one product, one rounding."""
    tensors = read_safetensors(file)
    with safe_open(file, "pt") as shard:
        stated = json.loads((shard.metadata() or {}).get("fp8_convert", "{}"))
    found = {}
    for name, (_, shape, data) in tensors.items():
        module, _, last = name.rpartition(".")
        if last in _KEPT and module in stated:
            continue
        if last != "weight" or module not in stated:
            found[name] = load_file(file)[name]
            continue
        scheme = stated[module][1]
        key = "weight_scale" if scheme == "tensor" else "weight_scale_inv"
        _, scale_shape, scale_data = tensors[f"{module}.{key}"]
        scale = np.frombuffer(scale_data, np.float32).reshape(scale_shape)
        if scheme != "tensor":
            rows, columns = map(int, scheme.removeprefix("block").split("x"))
            scale = scale.repeat(rows, 0).repeat(columns, 1)[: shape[0], : shape[1]]
        weights = _VALUES[np.frombuffer(data, np.uint8)].reshape(shape) * scale
        found[name] = torch.from_numpy(weights).to(torch.bfloat16)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def record_without_sources(folder: Path) -> Any:
    """The record but for its own digest, and what depends on the source's weights: of errors only whose they are."""
    record = json.loads((folder / RECORD).read_text())
    del record["record_sha256"]
    for component in record["components"].values():
        component["errors"] = {layer: error["weights"] for layer, error in component["errors"].items()}
    for shard in record["shards"].values():
        del shard["source_size"], shard["source_sha256"]
    return record


CASES: list[Any] = [
    *(pytest.param(name, {}, id=name) for name in BUILDERS),
    pytest.param("qwen_image", {"compact": True}, id="compact"),
    pytest.param("z_image", {"weight_block_size": [128, 128]}, id="blocks"),
    pytest.param("z_image", {"weight_block_size": [32, 96]}, id="edge-blocks"),
    pytest.param("wan22", {"max_shard_size": "300KB"}, id="cut"),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_there_and_back(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """The weights are those that codes and scales stand for, and converted again they give every byte again."""
    fp8, back, again = tmp_path / "fp8", tmp_path / "back", tmp_path / "again"
    convert(saved(name), fp8, **options)
    result = dequantize(fp8, back)
    assert {p for p in files(back) if not p.endswith(".json")} == {p for p in files(fp8) if not p.endswith(".json")}
    assert not (back / RECORD).exists()
    assert not any("quantization_config" in p.read_text() for p in back.rglob("config.json"))
    weights = 0
    for file in sorted(back.rglob("*.safetensors")):
        expected, given = plain(fp8 / file.relative_to(back)), load_file(file)
        assert list(given) == list(expected)
        for key, tensor in expected.items():
            assert given[key].dtype == tensor.dtype
            assert torch.equal(given[key], tensor), key
        with safe_open(file, "pt") as shard:
            assert "fp8_convert" not in (shard.metadata() or {})
        weights += sum(t[0] == "F8_E4M3" for t in read_safetensors(fp8 / file.relative_to(back)).values())
    assert result.weights == weights
    if name == "wan22":  # the tiny one keeps some modules in FP32, none of which becomes FP8
        assert result.notes == ()
    convert(back, again, **{k: v for k, v in options.items() if k != "max_shard_size"})
    first, second = files(fp8), files(again)
    first.pop(RECORD), second.pop(RECORD)
    assert first.keys() == second.keys()
    assert [path for path in first if first[path] != second[path]] == []
    if "max_shard_size" not in options:
        assert record_without_sources(fp8) == record_without_sources(again)


@pytest.mark.parametrize("name", ["z_image", "qwen_image", "wan22"])
def test_stock_libraries_load_it(tmp_path: Path, name: str) -> None:
    """In a process that never heard of this project."""
    dequantize(_converted(tmp_path, name), tmp_path / "back")
    code = (
        "import sys, torch, diffusers\n"
        "pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.bfloat16)\n"
        "assert not any(name.startswith('fp8_convert') for name in sys.modules)\n"
        "torch.save(pipe.transformer.state_dict(), sys.argv[2])\n"
    )
    arguments = [tmp_path / "back", tmp_path / "weights.pt"]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], check=True, cwd=tmp_path)
    expected = plain(tmp_path / "fp8" / DIT)
    given = torch.load(tmp_path / "weights.pt")
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[k], v.to(given[k].dtype)) for k, v in expected.items())


def _converted(tmp_path: Path, name: str = "z_image", **options: Any) -> Path:
    convert(saved(name), tmp_path / "fp8", **options)
    return tmp_path / "fp8"


def test_static_scales_are_left_out(tmp_path: Path) -> None:
    modules = json.loads(_metadata(_converted(tmp_path) / DIT)["fp8_convert"])
    save_file({f"{m}.input_scale": torch.tensor(1.0) for m in modules}, tmp_path / "scales.safetensors")
    static = tmp_path / "static"
    convert(saved("z_image"), static, activation_scheme="static", input_scales=tmp_path / "scales.safetensors")
    dequantize(static, tmp_path / "back")
    assert not [name for name in load_file(tmp_path / "back" / DIT) if "scale" in name]


def test_a_component_on_its_own(tmp_path: Path) -> None:
    convert(saved("z_image") / "transformer", tmp_path / "fp8")
    dequantize(tmp_path / "fp8", tmp_path / "back")
    assert (
        load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors").keys()
        == plain(tmp_path / "fp8" / "diffusion_pytorch_model.safetensors").keys()
    )
    moved = copied(_converted(tmp_path / "whole") / "transformer", tmp_path / "moved")  # without its record
    dequantize(moved, tmp_path / "back2")
    assert "quantization_config" not in (tmp_path / "back2" / "config.json").read_text()


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as shard:
        return dict(shard.metadata() or {})


def test_half_precision(tmp_path: Path) -> None:
    """A source in FP16 gives its bytes again through FP16."""
    source = saved("z_image", dtype=torch.float16)
    convert(source, tmp_path / "fp8")
    result = dequantize(tmp_path / "fp8", tmp_path / "back", dtype="float16")
    assert result.notes == ()
    assert {t.dtype for t in load_file(tmp_path / "back" / DIT).values()} == {torch.float16}
    convert(tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "fp8" / DIT).read_bytes() == (tmp_path / "again" / DIT).read_bytes()


def test_what_was_float32_is_said(tmp_path: Path) -> None:
    convert(saved("wan22", fp32_dits=True), tmp_path / "fp8")
    (note,) = dequantize(tmp_path / "fp8", tmp_path / "back").notes
    assert "weights had the dtype F32 before they were converted" in note


def _component(folder: Path, weight: torch.Tensor) -> Path:
    """A Z-Image DiT whose first feed-forward weight is `weight`."""
    source = copied(saved("z_image") / "transformer", folder)
    tensors = load_file(source / "diffusion_pytorch_model.safetensors")
    name = "layers.0.feed_forward.w2.weight"
    tensors[name] = weight[: tensors[name].shape[0], : tensors[name].shape[1]].contiguous()
    save_file(tensors, source / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize("blocks", [None, [128, 128]])
@pytest.mark.parametrize("amax", [0.0, 1e-30, 9e-5, 9.7e-5, 1e-4, 1.01e-4, 3.0, 1e30])
def test_scales_come_back_whatever_their_size(tmp_path: Path, amax: float, blocks: list[int] | None) -> None:
    """Also just below the smallest scale of a block, where the nearest BF16 number would be a larger amax."""
    weight = torch.empty(2048, 2048).uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    weight[0, 0] = 1
    source = _component(tmp_path / "source", (weight * amax).bfloat16())
    convert(source, tmp_path / "fp8", weight_block_size=blocks)
    dequantize(tmp_path / "fp8", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again", weight_block_size=blocks)
    first, second = (read_safetensors(tmp_path / f / "diffusion_pytorch_model.safetensors") for f in ("fp8", "again"))
    assert [name for name in first if first[name] != second[name]] == []


def test_a_dtype_that_cannot_hold_the_weights(tmp_path: Path) -> None:
    source = _component(tmp_path / "source", torch.full((2048, 2048), 1e30).bfloat16())
    convert(source, tmp_path / "fp8")
    with pytest.raises(ConvertError, match=r"layers\.0\.feed_forward\.w2\.weight in .* holds what F16 cannot"):
        dequantize(tmp_path / "fp8", tmp_path / "back", dtype="float16")
    assert not (tmp_path / "back").exists()


# What is refused


def test_damage_is_found_while_it_is_read(tmp_path: Path) -> None:
    fp8 = _converted(tmp_path)
    with open(fp8 / DIT, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\x01\x02\x03")
    with pytest.raises(ConvertError, match=f"{DIT} in .* has another sha256 than the record says"):
        dequantize(fp8, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("path", ["scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "model_index.json"])
def test_small_files_are_compared_with_the_record_too(tmp_path: Path, path: str) -> None:
    fp8 = _converted(tmp_path)
    before = (fp8 / path).read_bytes()
    (fp8 / path).write_bytes(b" " + before)
    with pytest.raises(ConvertError, match=rf"{path} in .* has {len(before) + 1} bytes instead of"):
        dequantize(fp8, tmp_path / "back")
    (fp8 / path).write_bytes(before[:-1] + b" ")
    with pytest.raises(ConvertError, match=rf"{path} in .* has another sha256 than the record says"):
        dequantize(fp8, tmp_path / "back")
    (fp8 / path).unlink()
    with pytest.raises(ConvertError, match=rf"{path} in .* is missing"):
        dequantize(fp8, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_file_that_the_record_does_not_list_is_said(tmp_path: Path) -> None:
    fp8 = _converted(tmp_path)
    (fp8 / "tokenizer" / "added.json").write_text("{}")
    assert dequantize(fp8, tmp_path / "back").notes == (
        "tokenizer/added.json is not in the record, and is copied as it is",
    )
    assert (tmp_path / "back" / "tokenizer" / "added.json").read_text() == "{}"


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_none(tmp_path: Path, value: float) -> None:
    moved = copied(_converted(tmp_path) / "transformer", tmp_path / "moved")
    file = moved / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    tensors[name] = torch.tensor(value)
    save_file(tensors, file, _metadata(file))
    with pytest.raises(ConvertError, match=f"{name} in .* is not finite and positive"):
        dequantize(moved, tmp_path / "back")


def test_a_scale_that_is_missing(tmp_path: Path) -> None:
    moved = copied(_converted(tmp_path) / "transformer", tmp_path / "moved")
    file = moved / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop(name := next(name for name in tensors if name.endswith("weight_scale")))
    save_file(tensors, file, _metadata(file))
    with pytest.raises(ConvertError, match=f"has no scale {name}"):
        dequantize(moved, tmp_path / "back")


def test_a_scale_in_another_file_than_its_weight(tmp_path: Path) -> None:
    moved = copied(_converted(tmp_path) / "transformer", tmp_path / "moved")
    file = moved / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    scale = next(name for name in tensors if name.endswith("weight_scale"))
    parts = {"a": {n: t for n, t in tensors.items() if n != scale}, "b": {scale: tensors[scale]}}
    file.unlink()
    for part, mine in parts.items():
        save_file(mine, moved / f"{part}.safetensors", {"format": "pt"})  # as other programs save it
    places = {name: f"{part}.safetensors" for part, mine in parts.items() for name in mine}
    (moved / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    with pytest.raises(ConvertError, match=rf"{scale} is not in a.safetensors, as its weight is; convert the snapshot"):
        dequantize(moved, tmp_path / "back")


def test_what_has_no_fp8_weights(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="has no FP8 weights; give a snapshot that fp8-convert made"):
        dequantize(saved("z_image"), tmp_path / "back")
    with pytest.raises(ConvertError, match="does not exist"):
        dequantize(tmp_path / "nothing", tmp_path / "back")
    (tmp_path / "unfinished" / ".fp8-convert").mkdir(parents=True)
    with pytest.raises(ConvertError, match=r"The conversion into .* is unfinished; run the same fp8-convert command"):
        dequantize(tmp_path / "unfinished", tmp_path / "back")


def test_what_another_tool_wrote(tmp_path: Path) -> None:
    source = copied(_converted(tmp_path) / "transformer", tmp_path / "moved")
    file = source / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match="quantised by another tool"):
        dequantize(source, tmp_path / "back")


def test_outputs_that_are_not_to_be_written(tmp_path: Path) -> None:
    fp8 = _converted(tmp_path)
    for output, message in ((fp8, "is the source"), (fp8 / "in", "is inside it")):
        with pytest.raises(ConvertError, match=message):
            dequantize(fp8, output)
    other = tmp_path / "other"
    convert(saved("z_image"), other)
    with pytest.raises(ConvertError, match="holds an FP8 snapshot; choose another folder"):
        dequantize(fp8, other)
    assert verify(other).ok
    dequantize(fp8, tmp_path / "back")
    before = files(tmp_path / "back")
    with pytest.raises(ConvertError, match="has every file of this result already, in its size; use it as it is, or"):
        dequantize(fp8, tmp_path / "back")
    (tmp_path / "back" / DIT).unlink()
    with pytest.raises(ConvertError, match="no record there says that it is fp8-convert's; choose another folder or"):
        dequantize(fp8, tmp_path / "back")
    assert files(tmp_path / "back") == {path: data for path, data in before.items() if path != DIT}
    with pytest.raises(ConvertError, match="use bfloat16 or float16"):
        dequantize(fp8, tmp_path / "back2", dtype="float32")


class Stops(Silent):
    """Stops the work once `left` shards are done."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def advance(self, count: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_is_resumed(tmp_path: Path) -> None:
    fp8, back = _converted(tmp_path), tmp_path / "back"
    with pytest.raises(KeyboardInterrupt):
        dequantize(fp8, back, progress=Stops(2))
    assert not (back / "model_index.json").exists()
    assert dequantize(fp8, back).resumed_shards == 2
    dequantize(fp8, tmp_path / "whole")
    assert files(back) == files(tmp_path / "whole")


def test_an_interrupted_run_in_another_dtype_is_not_resumed(tmp_path: Path) -> None:
    class Said(Silent):
        def say(self, line: str) -> None:
            lines.append(line)

    fp8, back, lines = _converted(tmp_path), tmp_path / "back", list[str]()
    with pytest.raises(KeyboardInterrupt):
        dequantize(fp8, back, progress=Stops(2))
    assert dequantize(fp8, back, dtype="float16", progress=Said()).resumed_shards == 0
    assert lines[-1] == "the unfinished output of another source, recipe or version was dropped"
    assert {t.dtype for t in load_file(back / DIT).values()} == {torch.bfloat16, torch.float16}


# The command


def test_command(tmp_path: Path) -> None:
    fp8 = str(_converted(tmp_path))
    line = CliRunner().invoke(main, ["dequantize", fp8, "-o", str(tmp_path / "a")], catch_exceptions=False)
    assert (line.exit_code, line.stdout.count("\n")) == (0, 1)
    assert line.stdout.startswith(f"wrote {tmp_path / 'a'}: 38 FP8 weights in bfloat16, ")
    result = CliRunner().invoke(main, ["dequantize", fp8, "-o", str(tmp_path / "b"), "--json", "--dtype", "float16"])
    summary = json.loads(result.stdout)
    assert (summary["dtype"], summary["weights"], summary["output"]) == ("float16", 38, str(tmp_path / "b"))
    assert summary["bytes_after"] == sum(p.stat().st_size for p in (tmp_path / "b").rglob("*.safetensors"))
    assert summary["bytes_before"] == sum(p.stat().st_size for p in Path(fp8).rglob("*.safetensors"))


_CHILD = """
import sys
from fp8_convert.converter import dequantize

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

try:
    dequantize(sys.argv[1], sys.argv[2])
except Exception as error:
    assert "has no FP8 weights" in str(error)
imports = memory("VmHWM:")
dequantize(sys.argv[3], sys.argv[2])
print(imports, memory("VmHWM:"))
"""


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A weight of 350 MB, of zeros in a sparse file, in a process of its own."""
    folder = tmp_path / "fp8"
    folder.mkdir()
    codes = 350 * 2**20
    tensors = [
        TensorInfo("proj.weight", "F8_E4M3", (codes >> 12, 4096), 0, codes),
        TensorInfo("proj.weight_scale", "F32", (), codes, codes + 4),
    ]
    header = encode_header(tensors, {"fp8_convert": '{"proj":["w8a8","tensor"]}'})
    with open(folder / "diffusion_pytorch_model.safetensors", "wb") as file:
        file.write(header)
        file.seek(len(header) + codes)
        file.write(np.float32(1).tobytes())
    (folder / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    arguments = [saved("z_image"), tmp_path / "back", folder]
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imports, peak = map(int, done.stdout.split())
    assert peak - imports <= 450 * 2**20, f"{(peak - imports) / 2**20:.0f} MiB over imports"
    assert (tmp_path / "back" / "diffusion_pytorch_model.safetensors").stat().st_size > 2 * codes
