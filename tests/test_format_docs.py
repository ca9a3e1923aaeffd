"""docs/format.md is what a conversion writes: its field lists, its examples, its reader and its formula."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from own_manifests import with_scales_of_rows
from pipelines import saved
from safetensors import safe_open
from safetensors.torch import load_file

from fp8_convert.converter import convert
from fp8_convert.converter.format import layout

TEXT = (Path(__file__).parent.parent / "docs" / "format.md").read_text()


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format") / "out"
    convert(saved("qwen_image"), folder, compact=True)  # both modes, both schemes, convolutions
    return folder


@pytest.fixture(scope="module")
def record(snapshot: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((snapshot / "fp8_convert.json").read_text())
    return data


def keys_of(heading: str) -> list[str]:
    """The keys in the first column of the table with this heading, in order."""
    (table,) = re.findall(rf"^\| {re.escape(heading)} \| value \|\n\|---\|---\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [key for row in table.splitlines() for key in re.findall(r"`(\w+)`", row.split("|")[1])]


def fence(info: str) -> str:
    (body,) = re.findall(rf"^```{info}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return str(body)


def first(values: dict[str, Any]) -> Any:
    return next(iter(values.values()))


def test_fields_of_the_record(record: dict[str, Any]) -> None:
    component = first(record["components"])
    for heading, value in {
        "key of the record": record,
        "key of `source`": record["source"],
        "key of `recipe`": record["recipe"],
        "key of a component": component,
        "key of an error": first(component["errors"]),
        "key of a decision": component["decisions"][0],
        "key of a shard": first(record["shards"]),
        "key of a file": first(record["files"]),
    }.items():
        assert keys_of(heading) == list(value), heading


def test_the_number_of_the_format(record: dict[str, Any]) -> None:
    (stated,) = re.findall(r"^\| `format` \| the number of this format: (\d+) \|", TEXT, re.MULTILINE)
    assert int(stated) == record["format"] == layout.RECORD_FORMAT
    versions = re.findall(r"^\| (\d+) \|", TEXT.partition("## Versions")[2], re.MULTILINE)
    assert [*map(int, versions)] == [*range(1, layout.RECORD_FORMAT + 1)]


def test_digests(snapshot: Path, record: dict[str, Any]) -> None:
    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    assert digest({k: v for k, v in record.items() if k != "record_sha256"}) == record["record_sha256"]
    assert digest({"tool": record["tool_version"], **record["recipe"]}) == record["recipe_sha256"]
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    assert (snapshot / "fp8_convert.json").read_bytes() == text.encode()


def test_the_config(snapshot: Path) -> None:
    example = json.loads(fence("json config"))
    config = json.loads((snapshot / "transformer/config.json").read_text())["quantization_config"]
    assert list(example) == list(config) == keys_of("key")
    for key in ("activation_scheme", "is_checkpoint_fp8_serialized", "weight_block_size"):
        assert type(example[key]) in (type(config[key]), type(None))
    assert config["quant_method"] == "fp8_convert"  # mixed, as the table says
    assert {layout.QUANT_METHOD, layout.QUANT_METHOD_NATIVE} <= set(re.findall(r"`(fp8\w*)`", TEXT))


def test_the_metadata(snapshot: Path) -> None:
    example = layout.decode_modules({layout.METADATA_KEY: fence("json metadata")})
    assert {(how.mode, how.scheme) for how in example.values()} == {
        ("w8a8", "tensor"),
        ("w8a8", "channel"),
        ("storage", "block128x128"),
    }
    for shard in snapshot.rglob("*.safetensors"):
        with safe_open(shard, "pt") as opened:
            modules = layout.decode_modules(opened.metadata() or {})
            names = set(opened.keys())
            for module, how in modules.items():
                (suffix,) = {"MODULE.weight_scale", "MODULE.weight_scale_inv"} & {how.scale_key("MODULE")}
                assert f"| `{suffix}` |" in TEXT
                assert {f"{module}.weight", how.scale_key(module)} <= names


def dequantised(component: Path) -> dict[str, torch.Tensor]:
    """What the documented reader makes of a component."""
    scope: dict[str, Any] = {}
    exec(compile(fence("python"), "docs/format.md", "exec"), scope)
    weights: dict[str, torch.Tensor] = scope["dequantised"](component)
    return weights


def test_the_reader_and_scales_of_rows(tmp_path: Path) -> None:
    convert(saved("z_image"), tmp_path / "out", manifest=with_scales_of_rows("z-image"), components=["text_encoder"])
    (written,) = (tmp_path / "out" / "text_encoder").glob("*.safetensors")
    original, codes = load_file(saved("z_image") / "text_encoder" / written.name), load_file(written)
    for module, weight in dequantised(tmp_path / "out" / "text_encoder").items():
        source = original[f"{module}.weight"].float()
        amax = source.abs().amax(1, keepdim=True)
        assert torch.equal(codes[f"{module}.weight_scale"], amax / 448), module
        assert ((weight - source).abs() < amax / 27).all(), module  # 16 of 448 is half a place of E4M3


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_the_reader_and_the_formula(snapshot: Path, component: str) -> None:
    weights = dequantised(snapshot / component)
    written: dict[str, torch.Tensor] = {}
    original: dict[str, torch.Tensor] = {}
    for tensors, folder in ((written, snapshot), (original, saved("qwen_image"))):
        for shard in (folder / component).glob("*.safetensors"):
            tensors.update(load_file(shard))
    assert set(weights) == {n.removesuffix(".weight") for n, t in written.items() if t.dtype == torch.float8_e4m3fn}
    for module, weight in weights.items():
        source = original[f"{module}.weight"].float()
        assert (weight - source).abs().max() <= source.abs().max() / 8, module
        scale = written.get(f"{module}.weight_scale")
        if scale is not None:
            codes = (source * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(codes.view(torch.uint8), written[f"{module}.weight"].view(torch.uint8)), module
            assert scale >= source.abs().max() / 448
