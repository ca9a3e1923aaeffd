"""What is refused: every kind of bad input through the real command line, in one sentence, with nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import own_manifests
import pytest
import torch
from click.testing import CliRunner
from pipelines import copied, saved
from safetensors.torch import load_file, save_file

from fp8_convert.converter import ConvertError, convert
from fp8_convert.converter.cli.commands import main

DIT = "transformer/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"
LAYER = "layers.0.attention.to_q"
FP8 = torch.float8_e4m3fn


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Z-Image pipeline that the test may spoil."""
    return copied(saved("z_image"), tmp_path / "source")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in shards of at most 300 KB."""
    return copied(saved("z_image", max_shard_size="300KB"), tmp_path / "source")


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Where the conversion would go, below a folder that must be as empty afterwards as before."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    yield folder / "out"
    assert list(folder.iterdir()) == []


def refused(*arguments: object, names: str, next_step: str) -> str:
    """Run fp8-convert, which must exit with 1 and one line that names the culprit and ends in what to do."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stdout == ""
    return checked(result.stderr, names, next_step)


def checked(stderr: str, names: str, next_step: str) -> str:
    *before, line = stderr.splitlines()
    assert all(re.search(r", manifest \S+$|^note: ", told) for told in before), stderr  # what was begun
    assert line.startswith("error: ")
    assert line.endswith((".", "?"))
    assert names in line
    assert next_step in line
    return line


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


# Weights that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        (DIT, "layers.0.attention.to_q.weight"),  # a fusion group's member
        (DIT, "layers.1.feed_forward.w2.weight"),  # a scale of its own
        (ENCODER, "layers.1.mlp.up_proj.weight"),  # block scales
    ],
)
def test_weight_with_nan_or_inf(source: Path, output: Path, file: str, tensor: str, value: float) -> None:
    edit(source / file, lambda tensors: tensors[tensor].view(-1)[-3:].fill_(value))
    line = refused(source, "-o", output, names=f"{tensor} in {file}", next_step="repair the weight")
    assert "NaN or Inf" in line
    assert ("--ignored-layers" in line) == (file == DIT)  # the option applies to the DiT alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weight_with_nan_in_other_dtypes(source: Path, output: Path, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[f"{LAYER}.weight"][5, 7] = float("nan")

    edit(source / DIT, spoil)
    refused(source, "-o", output, names=f"{LAYER}.weight", next_step="repair the weight")


def test_nan_where_nothing_is_quantised_is_copied(source: Path, tmp_path: Path) -> None:
    edit(source / DIT, lambda tensors: tensors[f"{LAYER}.weight"].fill_(float("nan")))
    result = CliRunner().invoke(main, [str(source), "-o", str(tmp_path / "out"), "--ignored-layers", LAYER])
    assert result.exit_code == 0, result.stderr
    assert load_file(tmp_path / "out" / DIT)[f"{LAYER}.weight"].isnan().all()


# Sources that are quantised already


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "fp8_convert", "modelopt"])
def test_config_says_quantised(source: Path, output: Path, method: str) -> None:
    config = {"quantization_config": {"quant_method": method}}
    edit_json(source / "text_encoder/config.json", lambda data: data.update(config))
    refused(source, "-o", output, names=f"text_encoder of {source}", next_step="give the original BF16")


def _fp8_with_scale(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(FP8)
        tensors[LAYER + suffix] = torch.tensor(0.5)

    return change


def _fp8_without_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(FP8)


def _bitsandbytes(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors[f"{LAYER}.weight"]
    tensors[f"{LAYER}.weight"] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    tensors[f"{LAYER}.weight.absmax"] = torch.ones(weight.numel() // 64)
    tensors[f"{LAYER}.weight.quant_map"] = torch.zeros(16)
    tensors[f"{LAYER}.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(96, dtype=torch.uint8)


def _int8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.int8)
    tensors[f"{LAYER}.SCB"] = torch.ones(256)


def _gptq(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{LAYER}.weight"]
    tensors[f"{LAYER}.qweight"] = torch.zeros(32, 256, dtype=torch.int32)
    tensors[f"{LAYER}.qzeros"] = torch.zeros(2, 32, dtype=torch.int32)


def _comfy(tensors: dict[str, torch.Tensor]) -> None:
    tensors["scaled_fp8"] = torch.zeros(2, dtype=FP8)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        pytest.param(_fp8_with_scale(".weight_scale"), f"{LAYER}.weight", id="per-tensor"),
        pytest.param(_fp8_with_scale(".weight_scale_inv"), f"{LAYER}.weight", id="block"),
        pytest.param(_fp8_with_scale(".scale_weight"), f"{LAYER}.", id="old ComfyUI"),
        pytest.param(_fp8_without_scale, f"{LAYER}.weight", id="codes without a scale"),
        pytest.param(_bitsandbytes, f"{LAYER}.weight", id="bitsandbytes 4-bit"),
        pytest.param(_int8, f"{LAYER}.", id="bitsandbytes 8-bit"),
        pytest.param(_gptq, f"{LAYER}.q", id="GPTQ"),
        pytest.param(_comfy, "scaled_fp8", id="scaled_fp8"),
    ],
)
def test_tensors_say_quantised(
    source: Path, output: Path, change: Callable[[dict[str, torch.Tensor]], None], culprit: str
) -> None:
    edit(source / DIT, change)
    line = refused(source, "-o", output, names=culprit, next_step="give the original BF16")
    assert ("without a scale" in line) == (change is _fp8_without_scale)


def test_own_output_as_a_source(tmp_path: Path, output: Path) -> None:
    converted = tmp_path / "converted"
    assert CliRunner().invoke(main, [str(saved("z_image")), "-o", str(converted)]).exit_code == 0
    refused(converted, "-o", output, names=str(converted), next_step="give the original")
    lone = converted / "transformer"
    refused(lone, "-o", output, names=str(lone), next_step="give the original")
    edit_json(lone / "config.json", lambda config: config.pop("quantization_config"))
    refused(lone, "-o", output, names="is F8_E4M3", next_step="give the original")


# Options that cannot be met


@pytest.mark.parametrize("dry_run", [True, False])
def test_pattern_that_matches_nothing(output: Path, dry_run: bool) -> None:
    arguments = ["--dry-run"] if dry_run else ["-o", output]
    line = refused(
        saved("z_image"),
        *arguments,
        "--ignored-layers",
        "attention,feed_foward",
        names="'feed_foward'",
        next_step="did you mean",
    )
    assert "feed_forward" in line


def test_pattern_unlike_any_name(output: Path) -> None:
    refused(
        saved("z_image"), "-o", output, "--ignored-layers", "xyzzy", names="'xyzzy'", next_step="run with --dry-run"
    )


@pytest.mark.parametrize("pattern", ["re:(", ".", "re:[z-a]"])
def test_malformed_pattern(output: Path, pattern: str) -> None:
    refused(saved("z_image"), "-o", output, "--ignored-layers", pattern, names="pattern", next_step="; ")


def test_unknown_component(output: Path) -> None:
    line = refused(saved("z_image"), "-o", output, "--component", "unet", names="'unet'", next_step="it has")
    assert "text_encoder" in line


def test_component_that_the_manifest_keeps(output: Path) -> None:
    refused(saved("z_image"), "-o", output, "--component", "vae", names="convert vae", next_step="another --manifest")


def test_ignored_layers_without_a_dit(output: Path) -> None:
    options = ["--component", "text_encoder", "--ignored-layers", "mlp"]
    refused(saved("z_image"), "-o", output, *options, names="--ignored-layers", next_step="drop the option")


def test_static_activations_without_scales(output: Path) -> None:
    refused(
        saved("z_image"),
        "-o",
        output,
        "--activation-scheme",
        "static",
        names="static",
        next_step="--input-scales FILE",
    )


def test_static_activations_with_blocks(output: Path) -> None:
    options = ["--activation-scheme", "static", "--weight-block-size", "128", "128"]
    refused(saved("z_image"), "-o", output, *options, names="Block scales", next_step="drop one")


@pytest.mark.parametrize("scales", ['weight_scales = "channel"', "weight_block_size = [128, 128]"])
def test_static_activations_with_a_manifest_of_other_scales(tmp_path: Path, output: Path, scales: str) -> None:
    save_file({f"{LAYER}.input_scale": torch.tensor(1.0)}, tmp_path / "scales.safetensors")
    (tmp_path / "own.toml").write_text(own_manifests.text().replace("kinds", f"{scales}\nkinds", 1))
    options = ["--manifest", tmp_path / "own.toml", "--component", "transformer"]
    options += ["--activation-scheme", "static", "--input-scales", tmp_path / "scales.safetensors"]
    refused(saved("z_image"), "-o", output, *options, names="The manifest own gives layers.0", next_step="; drop")


@pytest.mark.parametrize("target", ["vllm-omni", "sglang", "comfyui"])
def test_scales_of_rows_for_another_reader(output: Path, target: str) -> None:
    options = ["--manifest", own_manifests.with_scales_of_rows("z-image"), "--target", target]
    refused(saved("z_image"), "-o", output, *options, names="a scale for each row", next_step=f"drop --target {target}")


def test_input_scales_for_dynamic_activations(tmp_path: Path, output: Path) -> None:
    save_file({f"{LAYER}.input_scale": torch.tensor(1.0)}, tmp_path / "scales.safetensors")
    options = ["--input-scales", tmp_path / "scales.safetensors"]
    refused(saved("z_image"), "-o", output, *options, names="Input scales", next_step="drop --input-scales")


@pytest.mark.parametrize(
    ("scales", "names"),
    [
        ({f"{LAYER}.input_scale": torch.tensor(1.0)}, ".input_scale of transformer; calibrate"),  # all others lack
        ({f"{LAYER}.input_scale": torch.tensor(float("nan"))}, f"{LAYER}.input_scale"),
        ({f"{LAYER}.input_scale": torch.tensor(-1.0)}, f"{LAYER}.input_scale"),
        ({f"{LAYER}.input_scale": torch.ones(2)}, f"{LAYER}.input_scale"),
        ({f"{LAYER}.weight": torch.tensor(1.0)}, f"{LAYER}.weight"),
    ],
)
def test_unfit_input_scales(tmp_path: Path, output: Path, scales: dict[str, torch.Tensor], names: str) -> None:
    save_file(scales, tmp_path / "scales.safetensors")
    options = ["--activation-scheme", "static", "--input-scales", tmp_path / "scales.safetensors"]
    refused(saved("z_image"), "-o", output, *options, names=names, next_step="; c")


UNDECODABLE = "x\udcff"  # how Python shows an argument that is no UTF-8


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--ignored-layers", "The ignored layer"),
        ("--component", "The component"),
        ("--manifest", "The manifest"),
        ("--revision", "The revision"),
        ("--variant", "The variant"),
        ("--cache-dir", "The cache folder"),
        ("--input-scales", "The path of the input scales"),
        ("--token", "The Hub token"),
    ],
)
def test_options_that_are_no_text(output: Path, option: str, names: str) -> None:
    line = refused(saved("z_image"), "-o", output, option, UNDECODABLE, names=names, next_step="; co")
    assert line.isprintable()


def test_folders_that_are_no_text(tmp_path: Path, output: Path) -> None:
    """Refused before the work: their names could not be printed after it."""
    refused(UNDECODABLE, "-o", output, names="The source 'x\\udcff'", next_step="correct or rename it")
    (tmp_path / UNDECODABLE).mkdir()
    refused(tmp_path / UNDECODABLE, "-o", output, names="The source", next_step="correct or rename it")
    refused(saved("z_image"), "-o", output / UNDECODABLE, names="The output folder", next_step="correct or rename it")


def test_block_size_below_one(output: Path) -> None:
    options = ["--weight-block-size", "0", "128"]
    refused(
        saved("z_image"), "-o", output, *options, names="weight_block_size is (0, 128)", next_step="such as [128, 128]"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda_device(output: Path) -> None:
    refused(saved("z_image"), "-o", output, "--device", "cuda", names="CUDA", next_step="use --device cpu")


# Manifests

MANIFEST = own_manifests.text(name="mine")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        pytest.param(MANIFEST.replace("name =", "nmae = 1\nname ="), "'nmae'", id="top level"),
        pytest.param(MANIFEST.replace("kinds =", "knids = []\nkinds ="), "'knids'", id="component"),
        pytest.param(MANIFEST + 'extra = "x"\n', "'extra'", id="rule"),
        pytest.param(MANIFEST.replace('"w8a8"', '"w4a4"'), "'mode'", id="unknown mode"),
        pytest.param(MANIFEST.replace('["Linear"]', '["Lstm"]'), "'kinds'", id="unknown kind"),
        pytest.param(MANIFEST.replace('why = "a test"', ""), "'why'", id="no evidence"),
        pytest.param(MANIFEST.replace('"layers.*"', "1"), "'pattern'", id="a number for a pattern"),
        pytest.param(MANIFEST.replace('"layers.*"', '"re:("'), "re:(", id="bad regular expression"),
        pytest.param(MANIFEST.replace('kinds = ["Linear"]', ""), "components.transformer", id="no kinds"),
        pytest.param("name = ", "mine.toml", id="no TOML"),
        pytest.param("\udcff", "mine.toml", id="no UTF-8"),
    ],
)
def test_unfit_manifest(tmp_path: Path, output: Path, text: str, names: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    refused(saved("z_image"), "-o", output, "--manifest", path, names=names, next_step="; ")


def test_unknown_manifest(output: Path) -> None:
    line = refused(saved("z_image"), "-o", output, "--manifest", "sdxl", names="'sdxl'", next_step="a path to a .toml")
    assert "z-image" in line


def test_missing_manifest_file(tmp_path: Path, output: Path) -> None:
    path = tmp_path / "none.toml"
    refused(saved("z_image"), "-o", output, "--manifest", path, names=str(path), next_step="check the path")


def test_manifest_that_finds_nothing(tmp_path: Path, output: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MANIFEST.replace("layers.*", "layer.*"))
    place = f"{path}, components.transformer, eligible[0]: the pattern 'layer.*' matches no module of transformer"
    refused(saved("z_image"), "-o", output, "--manifest", path, names=place, next_step="did you mean layers")


# Damaged files


def _with_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a file's header and leave its data as they are."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _first(header: dict[str, Any]) -> Any:
    return min((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"][0])


def _truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _stray_bytes(file: Path) -> None:
    with open(file, "ab") as opened:
        opened.write(b"x")


def _empty(file: Path) -> None:
    os.truncate(file, 0)


def _length_past_the_end(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])


def _no_json(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"[" + data[9:])


def _deep_json(file: Path) -> None:
    text = b"[" * 200_000
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def _git_lfs_pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _overlap(header: dict[str, Any]) -> None:
    entries = sorted((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"][0])
    start, _ = entries[0]["data_offsets"]
    length = entries[1]["data_offsets"][1] - entries[1]["data_offsets"][0]
    entries[1]["data_offsets"] = [start, start + length]


def _hole(header: dict[str, Any]) -> None:
    header.pop(next(n for n in header if n != "__metadata__" and header[n]["data_offsets"][0] > 0))


def _wrong_shape(header: dict[str, Any]) -> None:
    _first(header)["shape"].append(2)


def _negative_offset(header: dict[str, Any]) -> None:
    _first(header)["data_offsets"][0] = -8


def _unknown_dtype(header: dict[str, Any]) -> None:
    _first(header)["dtype"] = "F3"


@pytest.mark.parametrize("file", [DIT, "vae/diffusion_pytorch_model.safetensors"], ids=["converted", "kept"])
@pytest.mark.parametrize(
    "damage",
    [_truncated, _stray_bytes, _empty, _length_past_the_end, _no_json, _deep_json, _git_lfs_pointer],
    ids=lambda damage: damage.__name__,
)
def test_damaged_file(source: Path, output: Path, damage: Callable[[Path], None], file: str) -> None:
    damage(source / file)
    refused(source, "-o", output, names=f"{file} in {source}", next_step="download it again")


@pytest.mark.parametrize(
    "change",
    [_overlap, _hole, _wrong_shape, _negative_offset, _unknown_dtype],
    ids=lambda change: change.__name__,
)
def test_damaged_header(source: Path, output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    _with_header(source / DIT, change)
    refused(source, "-o", output, names=f"{DIT} in {source}", next_step="download it again")


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_damaged_json(source: Path, output: Path, file: str, text: str) -> None:
    (source / file).write_bytes(text.encode(errors="surrogateescape"))
    refused(source, "-o", output, names=f"{file} in {source}", next_step="download it again")


JSONS = [
    "model_index.json",
    "transformer/config.json",
    "text_encoder/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
]


@pytest.mark.parametrize("file", JSONS)
@pytest.mark.parametrize("where", ["value", "key"])
def test_half_a_surrogate_pair(sharded: Path, output: Path, file: str, where: str) -> None:
    """Python's JSON takes it, and it could never be written again."""

    def spoil(data: Any) -> None:
        data.update({"_x": ["\ud800"]} if where == "value" else {"_\udfff": 1})

    edit_json(sharded / file, spoil)
    refused(
        sharded,
        "-o",
        output,
        names=f"{file} in {sharded} contains half a surrogate pair",
        next_step="download it again",
    )


@pytest.mark.parametrize("name", ["\x1f", "Z\x1b[2JImage", "Z\n", "Z" * 256])
@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model_index.json", lambda name: {"text_encoder": ["transformers", name]}),
        ("model_index.json", lambda name: {"text_encoder": [name, "Qwen3Model"]}),
        ("transformer/config.json", lambda name: {"_class_name": name}),
        ("text_encoder/config.json", lambda name: {"architectures": [name]}),
    ],
    ids=["component", "library", "DiT", "text encoder"],
)
def test_names_of_classes_reach_no_terminal(
    source: Path, output: Path, file: str, change: Callable[[str], dict[str, Any]], name: str
) -> None:
    edit_json(source / file, lambda data: data.update(change(name)))
    lone = source / file.partition("/")[0] if "/" in file else source
    file = Path(file).name
    names = f"{file} in {lone} gives a class or a library the name {repr(name)[:80]}"
    refused(lone, "-o", output, names=names, next_step="download it again")


@pytest.mark.parametrize("file", JSONS)
def test_json_beyond_its_limit_is_not_read(sharded: Path, output: Path, file: str) -> None:
    os.truncate(sharded / file, 2 * 10**9)  # a sparse file
    limit = 32 * 2**20 if "index." in file and "/" in file else 4 * 2**20
    names = f"{file} in {sharded} has 2000000000 bytes, and at most {limit}"
    refused(sharded, "-o", output, names=names, next_step="check that it is the right one")


@pytest.mark.parametrize("file", JSONS)
def test_json_of_too_many_values_is_not_parsed(sharded: Path, output: Path, file: str) -> None:
    """Within the limit of bytes, and fifty times that in memory."""
    (sharded / file).write_bytes(b'{"a":[' + b"[]," * 1_100_000 + b"[]]}")
    refused(sharded, "-o", output, names=f"{file} in {sharded} has more than 2000000", next_step="download it again")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("file", [*JSONS[:2], DIT, "tokenizer/tokenizer.json", "LICENSE"])
def test_fifo_instead_of_a_file(source: Path, output: Path, file: str) -> None:
    """Opened as a file it would wait for ever."""
    (source / file).unlink(missing_ok=True)
    os.mkfifo(source / file)
    refused(source, "-o", output, names=f"{file} in {source} is a FIFO", next_step="replace it by the file")


def test_fifo_instead_of_an_input_scales_file(tmp_path: Path, output: Path) -> None:
    os.mkfifo(tmp_path / "scales")
    options = ["--activation-scheme", "static", "--input-scales", tmp_path / "scales"]
    refused(saved("z_image"), "-o", output, *options, names="scales is a FIFO", next_step="replace it by the file")


@pytest.mark.parametrize(
    "value",
    [10**8, 1e30, [float("nan"), 10**8], [1] * 100_000, {"deep": [[{"n_layers": 10**12}]]}],
    ids=["number", "float", "in a list", "list", "nested"],
)
def test_more_layers_than_weights(source: Path, output: Path, value: Any) -> None:
    """Found before a class loops over them."""
    for component, key in (("transformer", "n_layers"), ("text_encoder", "num_hidden_layers")):
        edit_json(source / component / "config.json", lambda config, key=key: config.update({key: value}))
    refused(
        source, "-o", output, names="text_encoder/config.json asks for more layers", next_step="download both again"
    )


@pytest.mark.parametrize(
    "config",
    [[], 5, "fp8", True, {}, {"quant_method": []}, {"quant_method": {"a": 1}}, {"quant_method": "x" * 10_000}],
    ids=lambda config: str(config)[:20],
)
def test_damaged_quantization_config(source: Path, output: Path, config: Any) -> None:
    edit_json(source / "text_encoder/config.json", lambda data: data.update({"quantization_config": config}))
    line = refused(source, "-o", output, names=f"text_encoder of {source}", next_step="give the original BF16")
    assert len(line) < 1000


# Snapshots that do not hold together

INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


def test_index_names_a_missing_shard(sharded: Path, output: Path) -> None:
    shard = sorted(sharded.glob("transformer/*.safetensors"))[3]
    shard.unlink()
    refused(sharded, "-o", output, names=shard.name, next_step="download it")


def test_index_names_a_missing_tensor(sharded: Path, output: Path) -> None:
    shard = sorted(p.name for p in sharded.glob("transformer/*.safetensors"))[0]
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"layers.9.w.weight": shard}))
    refused(sharded, "-o", output, names="'layers.9.w.weight'", next_step="download both again")


def test_index_puts_a_tensor_into_another_shard(sharded: Path, output: Path) -> None:
    names = sorted(p.name for p in sharded.glob("transformer/*.safetensors"))

    def swap(index: Any) -> None:
        tensor = next(t for t, shard in index["weight_map"].items() if shard == names[0])
        index["weight_map"][tensor] = names[1]

    edit_json(sharded / INDEX, swap)
    refused(sharded, "-o", output, names=INDEX, next_step="download both again")


@pytest.mark.parametrize("path", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "a\nb.safetensors"])
def test_index_leaves_the_component(sharded: Path, output: Path, path: str) -> None:
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({f"{LAYER}.weight": path}))
    refused(sharded, "-o", output, names=INDEX, next_step="download it again")


def test_index_without_a_weight_map(sharded: Path, output: Path) -> None:
    (sharded / INDEX).write_text("{}")
    refused(sharded, "-o", output, names=INDEX, next_step="download it again")


def test_shards_without_an_index(sharded: Path, output: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, "-o", output, names="no index file", next_step="download the .index.json")


def test_tensor_in_two_shards(sharded: Path, output: Path) -> None:
    first, second, *_ = sorted(sharded.glob("transformer/*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    edit(second, lambda tensors: tensors.update({name: tensor}))
    refused(sharded, "-o", output, names=name, next_step="download the snapshot again")


@pytest.mark.parametrize("file", [DIT, "transformer/config.json", "model_index.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_link_leaves_the_snapshot(source: Path, output: Path, file: str, dry_run: bool) -> None:
    """Found before anything is written, in a file that would only be copied too."""
    outside = source.parent / "outside"
    shutil.move(source / file, outside)
    (source / file).symlink_to(outside)
    arguments = ["--dry-run"] if dry_run else ["-o", output]
    refused(source, *arguments, names=f"{file} in {source}", next_step="replace the link by its file")


def test_link_into_something_like_the_blobs_of_a_hub_cache(source: Path, output: Path) -> None:
    """They are trusted in the Hub's cache, and not wherever an uploader's archive unpacks to that shape."""
    snapshot = source.parent / "somewhere" / "snapshots" / "main"
    shutil.copytree(source, snapshot)
    (snapshot / "../../blobs").mkdir()
    shutil.move(snapshot / DIT, snapshot / "../../blobs/secret")
    (snapshot / DIT).symlink_to("../../../blobs/secret")
    refused(snapshot, "-o", output, names=f"{DIT} in {snapshot}", next_step="replace the link by its file")


def test_link_to_nowhere(source: Path, output: Path) -> None:
    (source / DIT).unlink()
    (source / DIT).symlink_to(source / "gone")
    refused(source, "-o", output, names="transformer", next_step="download its safetensors files")


def test_only_pickles(source: Path, output: Path) -> None:
    (source / DIT).rename(source / "transformer/diffusion_pytorch_model.bin")
    refused(source, "-o", output, names="transformer", next_step="save_pretrained(safe_serialization=True)")


def test_no_weights(source: Path, output: Path) -> None:
    (source / DIT).unlink()
    refused(source, "-o", output, names="transformer", next_step="download its safetensors files")


def test_weights_under_a_variant_alone(source: Path, output: Path) -> None:
    (source / DIT).rename(source / "transformer/diffusion_pytorch_model.fp16.safetensors")
    refused(source, "-o", output, names="transformer", next_step="--variant fp16")


def test_model_index_names_a_missing_component(source: Path, output: Path) -> None:
    shutil.rmtree(source / "text_encoder")
    refused(source, "-o", output, names="text_encoder", next_step="download it")


@pytest.mark.parametrize(
    "name", ["../vae", "/tmp", "a\nb", "", "..", ".fp8-convert", ".cache", "fp8_convert.json", "text-encoder", "1"]
)
def test_model_index_names_no_folder(source: Path, output: Path, name: str) -> None:
    edit_json(source / "model_index.json", lambda index: index.update({name: ["diffusers", "AutoencoderKL"]}))
    refused(source, "-o", output, names=repr(name), next_step="download it again")


def test_names_with_line_breaks_stay_in_one_line(source: Path, output: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["two\nlines.weight"] = torch.zeros(4, dtype=FP8)

    edit(source / DIT, spoil)
    refused(source, "-o", output, names="two lines.weight", next_step="give the original")


def test_no_snapshot(tmp_path: Path, output: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "-o", output, names=str(tmp_path / "empty"), next_step="give a pipeline's folder")


def test_source_is_a_file(source: Path, output: Path) -> None:
    refused(source / DIT, "-o", output, names=DIT, next_step="give the snapshot's folder")


def test_source_does_not_exist(tmp_path: Path, output: Path) -> None:
    refused(tmp_path / "none", "-o", output, names=str(tmp_path / "none"), next_step="check the path")


def test_class_that_no_library_has(source: Path, output: Path) -> None:
    for component in ("transformer", "text_encoder"):
        edit_json(source / "model_index.json", lambda i, c=component: i.update({c: ["my_module", "MyModel"]}))
    refused(source, "-o", output, names="MyModel", next_step="upgrade diffusers or transformers")


# Targets that cannot be written


def test_not_enough_disk(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    refused(saved("z_image"), "-o", output, names=str(output), next_step="free some space or choose another folder")


def test_target_below_a_file(tmp_path: Path, output: Path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "out"
    refused(saved("z_image"), "-o", target, names=str(target), next_step="choose another folder")


def test_target_is_a_file(tmp_path: Path, output: Path) -> None:
    (tmp_path / "file").write_text("kept")
    refused(saved("z_image"), "-o", tmp_path / "file", names="file", next_step="name a folder")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write, root neither")
def test_target_on_an_unwritable_file_system(output: Path) -> None:
    refused(saved("z_image"), "-o", "/proc/fp8-out", names="/proc/fp8-out", next_step="choose another folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_target_without_permission(tmp_path: Path, output: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(saved("z_image"), "-o", tmp_path / "locked/out", names="locked", next_step="mend its permissions")


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_target_holds_something_else(tmp_path: Path, output: Path, force: list[str]) -> None:
    """Also under --force, which replaces nothing but our own snapshots; also the source itself."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("kept")
    refused(saved("z_image"), "-o", foreign, *force, names=str(foreign), next_step="choose another folder")
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]
    source = saved("z_image")
    before = sorted(source.rglob("*"))
    refused(source, "-o", source, *force, names=str(source), next_step="choose another folder")
    assert sorted(source.rglob("*")) == before


def test_target_inside_the_source(source: Path) -> None:
    before = sorted(source.rglob("*"))
    refused(source, "-o", source / "transformer" / "out", names="inside", next_step="choose another folder")
    assert sorted(source.rglob("*")) == before


def test_variant_that_no_component_has(source: Path, output: Path) -> None:
    refused(source, "-o", output, "--variant", "fp61", names="'fp61'", next_step="correct or drop --variant")


def test_verify_is_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, problem in ((tmp_path / "none", "does not exist"), (tmp_path / "file", "is a file")):
        refused("verify", path, names=f"{path} {problem}", next_step="give the folder")


def test_inspect_is_for_a_folder_a_file_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    refused("inspect", tmp_path / "file", names="is not a .safetensors file", next_step="or the folder of a snapshot")
    refused("inspect", tmp_path / "none", names="none does not exist", next_step="check the path, or give a Hub id")
    monkeypatch.chdir(tmp_path)
    refused("inspect", "x.safetensors", names="x.safetensors cannot be opened", next_step="check the path")
    os.mkfifo("fifo.safetensors")
    refused("inspect", "fifo.safetensors", names="is a FIFO instead of a file", next_step="replace it by the file")


def test_verify_of_an_unfinished_and_of_an_original_snapshot(source: Path) -> None:
    refused("verify", source, names="fp8_convert.json", next_step="give the folder that fp8-convert wrote")
    (source / ".fp8-convert").mkdir()
    refused("verify", source, names="fp8_convert.json", next_step="run its conversion again")


def test_target_is_finished(tmp_path: Path, output: Path) -> None:
    def contents() -> dict[str, bytes]:
        return {p.relative_to(done).as_posix(): p.read_bytes() for p in done.rglob("*") if p.is_file()}

    done = tmp_path / "done"
    arguments = [str(saved("z_image")), "-o", str(done)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    before = contents()
    refused(*arguments, "--component", "transformer", names="components was []", next_step="pass --force")
    assert contents() == before
    assert CliRunner().invoke(main, [*arguments, "--force", "--component", "transformer"]).exit_code == 0
    after = contents()
    assert after.keys() == before.keys()
    assert after[DIT] == before[DIT]
    assert after[ENCODER] != before[ENCODER]


# The process itself


def test_as_a_process(source: Path, output: Path) -> None:
    """An error in the middle of a conversion, from outside: no traceback, nothing on stdout, exit code 1."""
    edit(source / DIT, lambda tensors: tensors["layers.1.feed_forward.w2.weight"].fill_(float("nan")))
    code = "from fp8_convert.converter.cli.commands import main; main()"
    command = [sys.executable, "-c", code, str(source), "-o", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    checked(run.stderr, "layers.1.feed_forward.w2.weight", "repair the weight")


@pytest.mark.parametrize(
    "files",
    [5, ["a\0b"], {"": {}}, {"transformer": {}}, {"n" * 5000: {}}, {"../kept.json": {}}, {"link/kept.json": {}}],
    ids=str,
)
def test_a_forged_record_lets_nothing_be_replaced_or_deleted(tmp_path: Path, files: Any) -> None:
    """What it does not name is not ours to replace, and what lies elsewhere is not ours to delete."""
    output = tmp_path / "out"
    convert(saved("z_image"), output, components=["transformer"])
    for kept in (tmp_path / "kept.json", tmp_path / "elsewhere" / "kept.json"):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("{}")
    (output / "link").symlink_to(tmp_path / "elsewhere")
    (output / "fp8_convert.json").write_text(json.dumps({"files": files}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConvertError, match=r"holds .* which fp8-convert did not write there|is damaged"):
        convert(saved("z_image"), output, force=True)
    assert sorted(tmp_path.rglob("*")) == before
