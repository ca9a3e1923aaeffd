"""`verify` says what is wrong, once and by name, whatever was damaged or forged, and goes on where it can."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import running_hub
from own_manifests import with_scales_of_rows
from pipelines import copied, saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shards import put_together, taken_apart

from fp8_convert.converter import ConvertError, convert, inspect, verify
from fp8_convert.converter.checks.codes import compare_shard
from fp8_convert.converter.cli.render import render_inspection, render_verification
from fp8_convert.converter.format.layout import RECORD_FORMAT, encode_json
from fp8_convert.converter.format.record import seal
from fp8_convert.converter.output.record import load_record
from fp8_convert.converter.plan.manifest import choose_manifest
from fp8_convert.converter.plan.planning import make_plan
from fp8_convert.converter.plan.recipe import Recipe
from fp8_convert.converter.plan.schedule import MEMORY, Memory
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.converter.snapshot.describing import describe
from fp8_convert.converter.snapshot.files import LocalFiles
from fp8_convert.converter.stream.supply import FolderSupply

RECORD = "fp8_convert.json"
DIT = "transformer/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"
CONFIG = "transformer/config.json"
LAYER = "layers.0.attention.to_q"


@pytest.fixture
def static(converted: Path, tmp_path: Path) -> Path:
    """The same with static activations."""
    scales = {f"{name}.input_scale": torch.tensor(1.0) for name in modules(converted / DIT)}
    save_file(scales, tmp_path / "scales.safetensors")
    options: dict[str, Any] = {"activation_scheme": "static", "input_scales": tmp_path / "scales.safetensors"}
    convert(saved("z_image"), tmp_path / "static", **options)
    return tmp_path / "static"


def findings(folder: Path, **options: Any) -> list[tuple[str, str]]:
    return [(f.path, f.problem) for f in verify(folder, **options).findings]


def spoil(file: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file; a negative offset counts from its end."""
    content = bytearray(file.read_bytes())
    offset %= len(content)
    content[offset : offset + len(data)] = data
    file.write_bytes(content)


def span(file: Path, name: str) -> tuple[int, int]:
    """Where a tensor lies in a safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + start, 8 + length + end


def modules(file: Path) -> list[str]:
    """The FP8 modules of a shard."""
    with safe_open(file, "pt") as opened:
        return list(json.loads(opened.metadata()["fp8_convert"]))


# Damage


def test_damaged_weight_is_named_with_the_source(spoilt: Path) -> None:
    spoil(spoilt / DIT, span(spoilt / DIT, f"{LAYER}.weight")[0], b"\x12\x34")
    spoil(spoilt / DIT, span(spoilt / DIT, "x_pad_token")[0], b"\x12\x34")
    of_file = (DIT, "has another sha256 than the record says")
    assert findings(spoilt) == [of_file]
    assert findings(spoilt, source=saved("z_image")) == [
        of_file,
        (DIT, f"{LAYER}.weight differs from what the source gives"),
        (DIT, "x_pad_token differs from what the source gives"),
    ]


def test_damaged_scale_is_named_without_the_source(spoilt: Path) -> None:
    spoil(spoilt / DIT, span(spoilt / DIT, f"{LAYER}.weight_scale")[0], b"\x00\x00\xc0\x7f")
    assert findings(spoilt) == [
        (DIT, "has another sha256 than the record says"),
        (DIT, f"{LAYER}.weight_scale holds a scale that is not finite and positive"),
    ]


def test_a_header_that_does_not_parse_does_not_end_the_checks(spoilt: Path) -> None:
    spoil(spoilt / DIT, 8, b"[")
    spoil(spoilt / ENCODER, span(spoilt / ENCODER, "layers.0.mlp.up_proj.weight_scale_inv")[0], b"\0\0\0\0")
    spoil(spoilt / DIT, -1, b"\x99")  # in the last tensor
    encoder, scale, header = (
        (ENCODER, "has another sha256 than the record says"),
        (ENCODER, "layers.0.mlp.up_proj.weight_scale_inv holds a scale that is not finite and positive"),
        (DIT, "has another sha256 than the record says: it has a corrupt safetensors header: it is not valid JSON; "
              "download it again."),
    )  # fmt: skip
    assert findings(spoilt) == [encoder, header, scale]
    assert findings(spoilt, source=saved("z_image")) == [
        encoder,
        header,
        scale,
        (ENCODER, "layers.0.mlp.up_proj.weight_scale_inv differs from what the source gives"),
        (DIT, "x_pad_token differs from what the source gives"),
    ]


def test_truncated_file_names_what_it_lost(spoilt: Path) -> None:
    size = (spoilt / DIT).stat().st_size
    os.truncate(spoilt / DIT, size - 1)
    assert findings(spoilt, source=saved("z_image")) == [
        (DIT, f"has {size - 1} bytes instead of {size}"),
        (DIT, "x_pad_token differs from what the source gives"),
    ]
    os.truncate(spoilt / DIT, 5)
    assert findings(spoilt, source=saved("z_image")) == [(DIT, f"has 5 bytes instead of {size}")]


@pytest.mark.parametrize("path", [DIT, CONFIG, "model_index.json", "tokenizer/tokenizer.json"])
def test_missing_file_is_one_finding(spoilt: Path, path: str) -> None:
    (spoilt / path).unlink()
    assert findings(spoilt, source=saved("z_image")) == [(path, "is missing")]
    (spoilt / path).mkdir()
    assert findings(spoilt, source=saved("z_image")) == [(path, "is missing")]


@pytest.mark.parametrize("path", [CONFIG, "model_index.json"])
def test_json_that_does_not_parse_is_one_finding(spoilt: Path, path: str) -> None:
    spoil(spoilt / path, 0, b"[")
    problem = "has another sha256 than the record says: it is not valid JSON"
    assert findings(spoilt, source=saved("z_image")) == [(path, problem)]


@pytest.mark.parametrize(
    "name",
    [
        "transformer/more.safetensors", "tokenizer/added_chat_template.jinja", "vocab.txt", "pytorch_model.bin",
        "pipeline.py", "transformer/.hidden", ".env",
    ],
)  # fmt: skip
def test_added_file(spoilt: Path, name: str) -> None:
    (spoilt / name).write_text("x")
    assert findings(spoilt) == [(name, "is not in the record")]


@pytest.mark.parametrize("folder", [".git", "transformer/.cache", "unet", "vae/.fp8-convert"])
def test_added_folder(spoilt: Path, folder: str) -> None:
    for name in ("config.json", "deep/er/weights.bin"):
        (spoilt / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (spoilt / folder / name).write_text("x")
    assert findings(spoilt) == [(f"{folder}/", "is not in the record (2 files)")]


def test_what_the_hub_adds_to_a_download(spoilt: Path) -> None:
    for name in (".gitattributes", ".cache/huggingface/.gitignore", "README.md"):
        (spoilt / name).parent.mkdir(parents=True, exist_ok=True)
        (spoilt / name).write_text("x")
    found = verify(spoilt)
    assert found.ok
    assert found.notes == ("README.md is not checked: it was written after the conversion, to present the snapshot",)
    (spoilt / "transformer" / ".gitattributes").write_text("x")
    (spoilt / ".cache" / "module.py").write_text("x")
    assert findings(spoilt) == [
        (".cache/", "is not in the record (2 files)"),
        ("transformer/.gitattributes", "is not in the record"),
    ]


def test_added_links(spoilt: Path, tmp_path: Path) -> None:
    """A dangling one, one to a folder, and one that leads back into the snapshot."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "module.py").write_text("x")
    (spoilt / "dangling").symlink_to(tmp_path / "none")
    (spoilt / "custom").symlink_to(tmp_path / "elsewhere")
    (spoilt / "vae" / "again").symlink_to(spoilt)
    assert [path for path, _ in findings(spoilt)] == ["dangling", "custom/", "vae/again/"]


def test_what_lies_in_a_linked_component_is_looked_at(spoilt: Path, tmp_path: Path) -> None:
    (spoilt / "vae").rename(tmp_path / "vae")
    (spoilt / "vae").symlink_to(tmp_path / "vae")
    (tmp_path / "vae" / "modeling.py").write_text("x")
    assert ("vae/modeling.py", "is not in the record") in findings(spoilt)


def test_a_damaged_source_is_a_finding_and_the_rest_is_compared(spoilt: Path, tmp_path: Path) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    tensors = load_file(source / DIT)
    tensors[f"{LAYER}.weight"][0, 0] = float("nan")
    save_file(tensors, source / DIT, metadata={"format": "pt"})
    spoil(spoilt / ENCODER, span(spoilt / ENCODER, "norm.weight")[0], b"\x12\x34")
    (first, second, third) = findings(spoilt, source=source)
    assert first == (ENCODER, "has another sha256 than the record says")
    assert second == (ENCODER, "norm.weight differs from what the source gives")
    assert third[0] == DIT
    assert third[1].startswith(f"cannot be compared with its source: {LAYER}.weight in {DIT}")


def test_input_scales_are_said_to_be_taken_as_stated(static: Path, converted: Path) -> None:
    said = "the input scales are not checked: they come from a file of their own, not from the source"
    assert verify(static, source=saved("z_image")).notes == (said,)
    assert verify(converted, source=saved("z_image")).notes == ()


def test_damaged_static_scales_keep_the_findings(static: Path) -> None:
    assert findings(static, source=saved("z_image")) == []
    spoil(static / DIT, 8, b"[")
    first, second = findings(static, source=saved("z_image"))
    assert first[0] == DIT
    assert second[0] == "."
    assert second[1].startswith(f"cannot be compared with its source: {DIT} has a corrupt safetensors header")


# Sources that are another's


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "lone"
    convert(saved("z_image") / "transformer", folder)
    return folder


def test_component_against_its_pipeline(lone: Path) -> None:
    message = r"lone holds one component, and .* is a whole pipeline; pass the folder of that component \(transformer\)"
    with pytest.raises(ConvertError, match=message):
        verify(lone, source=saved("z_image"))
    with pytest.raises(ConvertError, match=r"the folder of that component as --source"):
        verify(lone, source=saved("wan22"))
    assert findings(lone, source=saved("z_image") / "transformer") == []


def test_pipeline_against_a_component(converted: Path) -> None:
    with pytest.raises(ConvertError, match=r"holds a whole pipeline, and .* is one component; pass the pipeline's"):
        verify(converted, source=saved("z_image") / "transformer")


def test_another_pipeline(converted: Path, lone: Path) -> None:
    with pytest.raises(ConvertError, match=r"was made of .*ZImage.*, and .* has .*Wan.*; pass its own source"):
        verify(converted, source=saved("wan22"))
    with pytest.raises(ConvertError, match=r"was made of .*ZImage.*, and .* has .*Wan.*; pass its own source"):
        verify(lone, source=saved("wan22") / "transformer")


def test_a_snapshot_with_one_component_converted(tmp_path: Path) -> None:
    convert(saved("z_image"), tmp_path / "out", components=["transformer"])
    assert findings(tmp_path / "out", source=saved("z_image")) == []
    with pytest.raises(ConvertError, match="holds a whole pipeline"):
        verify(tmp_path / "out", source=saved("z_image") / "transformer")


def test_a_wrong_source_is_said_before_the_long_work(spoilt: Path, tmp_path: Path) -> None:
    spoil(spoilt / DIT, -1, b"\x99")
    with pytest.raises(ConvertError, match="does not exist"):
        verify(spoilt, source=tmp_path / "none")


# Forgery: the record's digests and its seal are made to fit


def reseal(folder: Path, change: Callable[[Any], None] = lambda record: None) -> None:
    """Change the record, and let it have the digests of the files as they are now."""
    record = json.loads((folder / RECORD).read_text())
    del record["record_sha256"]
    for path, entry in record["files"].items():
        data = (folder / path).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if path in record["shards"]:
            record["shards"][path] |= entry
    change(record)
    record = seal(record)
    try:
        data = encode_json(record)
    except UnicodeEncodeError:  # half a surrogate pair: only an escape can write it
        data = json.dumps(record).encode()
    (folder / RECORD).write_bytes(data)


def put(value: Any, *keys: Any) -> Callable[[Any], None]:
    """A change that puts the value where the keys lead; `...` stands for whatever key or item is first."""

    def change(record: Any) -> None:
        *parents, last = keys
        for key in parents:
            record = record[first(record) if key is ... else key]
        record[first(record) if last is ... else last] = value

    def first(place: Any) -> Any:
        return next(iter(place)) if isinstance(place, dict) else 0

    return change


def drop(*keys: str) -> Callable[[Any], None]:
    def change(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        del record[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param(
            put(RECORD_FORMAT + 1, "format"), f"and this version reads 1 to {RECORD_FORMAT}", id="a newer format"
        ),
        pytest.param(put(1, "format"), "'max_shard_size' of 'recipe' comes with the format 2", id="an older format"),
        pytest.param(put(True, "format"), "has the format True", id="no format"),
        pytest.param(put(1, "more"), "the record has the unknown key 'more'", id="an unknown key"),
        pytest.param(
            drop("components", "vae", "bytes_before"), "'vae' of 'components' of the record lacks", id="bytes"
        ),
        pytest.param(put([], "files"), "'files' of the record is []", id="files"),
        pytest.param(put(None, "files", ...), "is None", id="a file"),
        pytest.param(put("1", "files", ..., "size"), "'size' of", id="a size as text"),
        pytest.param(put(-1, "files", ..., "size"), "is -1", id="a negative size"),
        pytest.param(put(True, "files", ..., "size"), "is True", id="a size that is true"),
        pytest.param(put(10**400, "files", ..., "size"), "'size' of", id="a huge size"),
        pytest.param(put(None, "files", ..., "sha256"), "'sha256' of", id="no digest"),
        pytest.param(drop("files"), "the record lacks files", id="no files"),
        pytest.param(drop("recipe", "manifest"), "lacks manifest", id="no manifest"),
        pytest.param(put({"size": 1, "sha256": ""}, "files", "/etc/passwd"), "'/etc/passwd'", id="absolute"),
        pytest.param(put({"size": 1, "sha256": ""}, "files", "a/../../b"), "'a/../../b'", id="outside"),
        pytest.param(put({"size": 1, "sha256": ""}, "files", "a\x00b"), r"'a\x00b'", id="no path"),
        pytest.param(put("x", "components"), "'components' of the record is 'x'", id="components"),
        pytest.param(put([None], "components", ..., "decisions"), "an item of 'decisions'", id="decisions"),
        pytest.param(put("x", "components", ..., "decisions", 0, "dtypes"), "'dtypes' of", id="dtypes"),
        pytest.param(put([], "components", ..., "fp8_modules"), "'fp8_modules' of", id="fp8_modules"),
        pytest.param(put([1, 2, 3], "recipe", "weight_block_size"), "weight_block_size", id="a block of three"),
        pytest.param(put([None], "recipe", "ignored_layers"), "an item of 'ignored_layers'", id="ignored layers"),
        pytest.param(put(None, "source"), "'source' of the record is None", id="source"),
        pytest.param(drop("shards", DIT, "size"), "lacks size", id="a shard without a size"),
        pytest.param(put("0", "shards", DIT, "sha256"), f"disagree about '{DIT}'", id="two digests"),
    ],
)
def test_forged_record_is_one_finding(spoilt: Path, change: Callable[[Any], None], names: str) -> None:
    reseal(spoilt, change)
    ((path, problem),) = findings(spoilt, source=saved("z_image"))
    assert path == RECORD
    assert names in problem
    assert inspect(spoilt).converted_by == "fp8-convert, with a damaged record: run verify"
    if "was changed" not in problem:  # what only readers of the whole record can tell
        with pytest.raises(ConvertError, match=f"{RECORD} (is damaged|has the format)"):
            load_record(spoilt)


def test_record_with_half_a_surrogate_pair(spoilt: Path) -> None:
    reseal(spoilt, put("\ud800", "tool_version"))
    with pytest.raises(ConvertError, match=r"fp8_convert\.json is damaged \(it contains half a surrogate pair"):
        verify(spoilt)


def test_record_that_leaves_out_a_file(spoilt: Path) -> None:
    reseal(spoilt, drop("files", CONFIG))
    assert findings(spoilt) == [(CONFIG, "is not in the record")]


def test_record_with_a_name_that_no_file_can_have(spoilt: Path) -> None:
    reseal(spoilt, put({"size": 1, "sha256": ""}, "files", "x" * 5000))
    ((path, problem),) = findings(spoilt)
    assert path == "x" * 5000
    assert problem.startswith("cannot be read")


def test_record_with_other_components(spoilt: Path) -> None:
    reseal(spoilt, drop("components", "vae"))
    assert findings(spoilt)[0] == (
        RECORD,
        f"is damaged (the shard '{DIT.replace('transformer', 'vae')}' is of no component)",
    )


def test_record_that_counts_other_modules(spoilt: Path) -> None:
    reseal(spoilt, put(0, "components", "transformer", "fp8_modules", "w8a8"))
    assert findings(spoilt) == [(RECORD, "counts other FP8 modules in transformer than its shards hold")]


def test_record_with_another_class(spoilt: Path) -> None:
    reseal(spoilt, put("Other", "components", "vae", "class"))
    assert findings(spoilt) == [(RECORD, "has other components than the snapshot")]


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("sqnr_db", float("nan"), "an error of"),
        ("sqnr_db", -1.0, "an error of"),
        ("row_sqnr_db", float("inf"), "an error of"),
        ("row_error", 1.5, "an error of"),
        ("vanished", 10**9, "an error of"),
        ("weights", 5, "errors of 5 weights"),
    ],
)
def test_record_with_an_error_that_no_weight_has(spoilt: Path, key: str, value: Any, names: str) -> None:
    reseal(spoilt, put(value, "components", "transformer", "errors", LAYER, key))
    found = findings(spoilt)
    assert {path for path, _ in found} == {RECORD}
    assert any(f"states {names}" in problem and LAYER in problem for _, problem in found)


def test_record_without_an_error_and_with_one_of_nothing(spoilt: Path) -> None:
    reseal(spoilt, drop("components", "transformer", "errors", LAYER))
    ((path, problem),) = findings(spoilt)
    assert path == RECORD
    assert problem.startswith(f"states errors of none of {LAYER} in transformer")
    error = json.loads((spoilt / RECORD).read_text())["components"]["transformer"]["errors"]["layers.0.attention.to_k"]
    reseal(spoilt, put(error, "components", "transformer", "errors", LAYER))
    reseal(spoilt, put(error, "components", "transformer", "errors", "layers.9"))
    ((_, problem),) = findings(spoilt)
    assert problem == f"states errors of {error['weights']} weights of layers.9 in transformer, which has 0 to state"


def test_members_of_a_group_with_two_scales(spoilt: Path) -> None:
    with safe_open(spoilt / DIT, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(spoilt / DIT)
    tensors["layers.1.feed_forward.w3.weight_scale"] *= 1.5
    save_file(tensors, spoilt / DIT, metadata=metadata)
    reseal(spoilt)
    problem = "layers.1.feed_forward.w1, layers.1.feed_forward.w3 must share one scale and do not"
    assert findings(spoilt) == [("transformer", problem)]


def test_record_that_names_a_shared_scale_that_is_none(spoilt: Path) -> None:
    reseal(spoilt, put(["layers.9.to_q", "layers.9.to_k"], "components", "transformer", "shared_scales", 0))
    assert findings(spoilt) == [(RECORD, "names the shared scale of layers.9.to_q, which has none")]


# Forgery that only the source can tell


EDITED = ["model_index.json", "tokenizer/tokenizer.json", "tokenizer/chat_template.jinja",
          "scheduler/scheduler_config.json", "vae/config.json", CONFIG]  # fmt: skip


@pytest.mark.parametrize("path", EDITED)
def test_an_edited_and_resealed_file(spoilt: Path, path: str) -> None:
    (spoilt / path).write_bytes((spoilt / path).read_bytes().rstrip() + b"\n\n")
    reseal(spoilt)
    assert findings(spoilt) == []
    assert findings(spoilt, source=saved("z_image")) == [(path, "differs from what the source gives")]


@pytest.mark.parametrize("path", ["tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json"])
def test_a_file_that_was_removed_from_snapshot_and_record(spoilt: Path, path: str) -> None:
    (spoilt / path).unlink()
    record = json.loads((spoilt / RECORD).read_text())
    del record["files"][path]
    (spoilt / RECORD).write_text(json.dumps(record))
    reseal(spoilt)
    assert findings(spoilt) == []
    assert findings(spoilt, source=saved("z_image")) == [(path, "is missing, though the source gives it")]


def test_a_file_that_was_added_to_snapshot_and_record(spoilt: Path) -> None:
    (spoilt / "tokenizer" / "extra.json").write_text("{}")
    reseal(spoilt, lambda record: record["files"].update({"tokenizer/extra.json": {
        "size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}}))  # fmt: skip
    assert findings(spoilt) == []
    assert findings(spoilt, source=saved("z_image")) == [
        ("tokenizer/extra.json", "is not what the source gives"),
    ]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (put("0" * 64, "recipe_sha256"), "'recipe_sha256' of the record is '000"),
        (put("Other", "source", "pipeline"), "'pipeline' of 'source' of the record is 'Other', and the source gives"),
        (put("0" * 64, "shards", DIT, "source_sha256"), f"'source_sha256' of '{DIT}' of 'shards' of the record"),
        (put(7, "shards", DIT, "source_size"), f"'source_size' of '{DIT}'"),
        (put("x.safetensors", "shards", DIT, "source"), f"'source' of '{DIT}'"),
        (put(1, "components", "transformer", "bytes_after"), "'bytes_after' of 'transformer'"),
        (put("because", "components", "vae", "decisions", 0, "why"), "'decisions' of 'vae'"),
        (put([], "components", "transformer", "shared_scales"), "'shared_scales' of 'transformer'"),
        (put("another tool", "tool"), "'tool' of the record is 'another tool'"),
        (put("7.7", "tool_version"), "'recipe_sha256' of the record is"),
        (put(1, "components", "transformer", "bytes_before"), "'bytes_before' of 'transformer'"),
        (put(30.0, "components", "transformer", "errors", LAYER, "sqnr_db"), f"'sqnr_db' of '{LAYER}' of 'errors'"),
    ],
)
def test_a_record_that_tells_something_else(spoilt: Path, change: Callable[[Any], None], names: str) -> None:
    reseal(spoilt, change)
    ((path, problem),) = findings(spoilt, source=saved("z_image"))
    assert path == RECORD
    assert names in problem


def test_a_record_with_a_target_that_there_is_not(spoilt: Path) -> None:
    reseal(spoilt, put("other", "recipe", "target"))
    assert [problem.partition("; ")[0] for _, problem in findings(spoilt, source=saved("z_image"))] == [
        "cannot be compared with its source: target is 'other'"
    ]


def test_every_field_of_a_record_is_compared(spoilt: Path) -> None:
    """Whatever leaf of the record is changed and sealed, comparing with the source says so, once at least."""
    # `repo` and `commit` need a Hub: test_hub.py; a folder makes no claim.
    record = json.loads((spoilt / RECORD).read_text())
    unchecked = {("source", "repo"), ("source", "commit"), ("recipe", "input_scales_sha256"), ("record_sha256",)}
    places = [p for p in leaves(record) if p not in unchecked]
    before = (spoilt / RECORD).read_bytes()
    for place in places[:: max(1, len(places) // 40)]:
        value = functools.reduce(lambda part, key: part[key], place, record)
        other = (
            not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else f"{value or ''}x"
        )
        reseal(spoilt, put(other, *place))
        try:
            assert findings(spoilt, source=saved("z_image")), place
        except ConvertError:
            assert place[0] in ("components", "recipe"), place  # another class or manifest is another source's
        (spoilt / RECORD).write_bytes(before)


def leaves(value: Any, *place: Any) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, *place, key)]
    if isinstance(value, list):
        return [leaf for number, item in enumerate(value) for leaf in leaves(item, *place, number)]
    return [place]


def test_a_record_that_claims_a_repository(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder cannot tell; the repository that is named can."""
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("org/model", saved("z_image"))
        convert("org/model", tmp_path / "out", cache_dir=tmp_path / "cache")
        options = HubAccess(cache_dir=tmp_path / "cache")
        found = verify(tmp_path / "out", source="org/model", options=options)
        commit = json.loads((tmp_path / "out" / RECORD).read_text())["source"]["commit"]
        assert found.ok
        assert found.compared_with == f"org/model @ {commit}"
        assert not found.notes
        by_folder = verify(tmp_path / "out", source=saved("z_image"))
        assert by_folder.ok
        assert by_folder.notes == ("that it was made from 'org/model' is not checked: the source given is a folder",)
        newer = copied(saved("z_image"), tmp_path / "newer")
        (newer / "README.md").write_text("newer")
        hub.add_repo("org/model", newer)
        assert verify(tmp_path / "out", source="org/model", options=options).ok  # at the commit that the record names
        at_main = HubAccess(cache_dir=tmp_path / "cache", revision="main")
        problems = [f.problem for f in verify(tmp_path / "out", source="org/model", options=at_main).findings]
        assert any(p.startswith(f"'commit' of 'source' of the record is '{commit}', and the source") for p in problems)
        reseal(tmp_path / "out", put("0" * 40, "source", "commit"))
        with pytest.raises(ConvertError, match=r"says that it was made from the commit '0{40}'"):
            verify(tmp_path / "out", source="org/model", options=options)
        reseal(tmp_path / "out", put("org/other", "source", "repo"))
        problems = [f.problem for f in verify(tmp_path / "out", source="org/model", options=options).findings]
        assert any(p.startswith("'repo' of 'source' of the record is 'org/other'") for p in problems)


def test_record_with_a_manifest_that_is_a_path(spoilt: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("no TOML")
    reseal(spoilt, put(str(own), "recipe", "manifest"))
    with pytest.raises(ConvertError, match=r"no manifest named .* here; pass the one"):
        verify(spoilt, source=saved("z_image"))


def test_record_with_another_recipe(spoilt: Path) -> None:
    reseal(spoilt, put("quiet", "recipe", "activation_scheme"))
    ((path, problem),) = findings(spoilt, source=saved("z_image"))
    assert path == "."
    assert problem.startswith("cannot be compared with its source: activation_scheme is 'quiet'")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_method", "fp8_convert"),
        ("quant_method", None),
        ("activation_scheme", ["dynamic"]),
        ("is_checkpoint_fp8_serialized", False),
        ("weight_block_size", [128, 128]),
        ("weight_block_size", {}),
    ],
)
def test_forged_config(spoilt: Path, key: str, value: Any) -> None:
    config = json.loads((spoilt / CONFIG).read_text())
    config["quantization_config"][key] = value
    (spoilt / CONFIG).write_text(json.dumps(config))
    reseal(spoilt)
    ((path, problem),) = findings(spoilt)
    assert path == CONFIG
    assert problem.startswith(f"{key} is {value!r} instead of ")


@pytest.mark.parametrize("value", [None, 1, [], [["a"]], [{}], "layers"])
def test_forged_ignored_layers(spoilt: Path, value: Any) -> None:
    config = json.loads((spoilt / CONFIG).read_text())
    config["quantization_config"]["ignored_layers"] = value
    (spoilt / CONFIG).write_text(json.dumps(config))
    reseal(spoilt)
    assert findings(spoilt) == [(CONFIG, "ignored_layers are not exactly the linear layers that are not FP8")]


def test_config_of_a_class_that_cannot_be_built(spoilt: Path) -> None:
    config = json.loads((spoilt / CONFIG).read_text())
    config["n_heads"] = None
    (spoilt / CONFIG).write_text(json.dumps(config))
    reseal(spoilt)
    ((path, problem),) = findings(spoilt)
    assert path == CONFIG
    assert problem.startswith("its layers cannot be checked: ZImageTransformer2DModel cannot be built")


def with_metadata(file: Path, text: str) -> None:
    """Give a shard other fp8_convert metadata."""
    header, weights = taken_apart(file)
    header["__metadata__"]["fp8_convert"] = text
    file.write_bytes(put_together(json.dumps(header).encode(), weights))


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a": ["w8a8", "block0x0"]}', '{"a":' * 50_000])
def test_forged_metadata(spoilt: Path, text: str) -> None:
    with_metadata(spoilt / DIT, text)
    reseal(spoilt)
    ((path, problem),) = findings(spoilt)
    assert path == DIT
    assert problem.startswith("has unreadable fp8_convert metadata (")
    with pytest.raises(ConvertError, match="unreadable fp8_convert metadata"):
        inspect(spoilt)


def test_names_cannot_reach_the_terminal(spoilt: Path) -> None:
    with_metadata(spoilt / DIT, json.dumps({"a\x1b[2Jb\n": ["w8a8", "tensor"]}))
    reseal(spoilt, put("why\x1b[2J", "components", "vae", "decisions", 0, "why"))
    for text in (render_verification(verify(spoilt)), render_inspection(inspect(spoilt))):
        assert all(line.isprintable() for line in text.split("\n"))
    assert "its metadata name a [2Jb , whose weight it does not hold" in render_verification(verify(spoilt))


def test_block_scales_for_what_has_no_rows(tmp_path: Path) -> None:
    convert(saved("qwen_image"), tmp_path / "out")
    file = tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors"
    names = modules(file)
    with_metadata(file, json.dumps({name: ["storage", "block128x128"] for name in names}))
    reseal(tmp_path / "out")
    problems = {problem for path, problem in findings(tmp_path / "out") if path.endswith(".safetensors")}
    assert len(problems) == len(names)
    assert all(problem.endswith("and scales of rows or blocks are for two dimensions") for problem in problems)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The same with a scale for each row of its linears."""
    convert(saved("z_image"), tmp_path / "rows", manifest=with_scales_of_rows("z-image"))
    return tmp_path / "rows"


def test_scales_of_rows_with_a_config_for_other_readers(rows: Path) -> None:
    """They would take a row's scale for that of the tensor, or codes for weights."""
    config = json.loads((rows / CONFIG).read_text())
    config["quantization_config"]["quant_method"] = "fp8"
    (rows / CONFIG).write_bytes(encode_json(config))
    reseal(rows)
    assert findings(rows) == [(CONFIG, "quant_method is 'fp8' instead of 'fp8_convert'")]


def test_scales_of_rows_in_another_shape_or_scheme(rows: Path) -> None:
    with safe_open(rows / DIT, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(rows / DIT)
    whole = tensors[f"{LAYER}.weight_scale"]
    for scale, found in ((whole.flatten(), "F32 [256]"), (whole[:-1], "F32 [255, 1]"), (whole[0, 0], "F32 []")):
        save_file({**tensors, f"{LAYER}.weight_scale": scale.contiguous()}, rows / DIT, metadata)
        reseal(rows)
        assert findings(rows) == [(DIT, f"{LAYER}.weight_scale is {found} instead of F32 [256, 1]")]
    formats = json.loads(metadata["fp8_convert"])
    formats[LAYER][1] = "tensor"
    save_file(tensors, rows / DIT, {**metadata, "fp8_convert": json.dumps(formats)})
    reseal(rows)
    assert (DIT, f"{LAYER}.weight_scale is F32 [256, 1] instead of F32 []") in findings(rows)


def test_damaged_scales_of_rows(rows: Path) -> None:
    last = span(rows / DIT, f"{LAYER}.weight_scale")[1] - 4
    whole = (rows / DIT).read_bytes()
    spoil(rows / DIT, last, b"\x00\x00\xc0\x7f")
    reseal(rows)
    assert findings(rows) == [(DIT, f"{LAYER}.weight_scale holds a scale that is not finite and positive")]
    spoil(rows / DIT, last, bytes([whole[last] ^ 1]) + whole[last + 1 : last + 4])  # by one unit in the last place
    reseal(rows)
    assert findings(rows) == []
    assert findings(rows, source=saved("z_image"), manifest=with_scales_of_rows("z-image")) == [
        (DIT, f"{LAYER}.weight_scale differs from what the source gives")
    ]


def test_forged_input_scale(static: Path) -> None:
    with safe_open(static / DIT, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(static / DIT)
    first, second, *_ = sorted(name for name in tensors if name.endswith(".input_scale"))
    tensors[first] = torch.ones(1, dtype=torch.bfloat16)
    del tensors[second]
    save_file(tensors, static / DIT, metadata=metadata)
    reseal(static)
    assert findings(static) == [
        (DIT, f"{first} is BF16 [1] instead of F32 []"),
        (CONFIG, f"activations are static and {second.removesuffix('.input_scale')} has no input_scale"),
    ]


def test_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    convert(saved("z_image", max_shard_size="2MB"), tmp_path / "out", components=["transformer"])
    index = tmp_path / "out" / f"{DIT}.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["more.weight"] = next(iter(data["weight_map"].values()))
    index.write_text(json.dumps(data))
    reseal(tmp_path / "out")
    ((path, problem),) = findings(tmp_path / "out")
    assert path == "."
    assert "puts 'more.weight' into" in problem


def test_a_component_that_was_only_copied_may_be_quantised_otherwise(tmp_path: Path) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    tensors = load_file(source / ENCODER)
    tensors["layers.0.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    tensors["layers.0.mlp.up_proj.weight_scale"] = torch.tensor(1.0)
    save_file(tensors, source / ENCODER, metadata={"format": "pt"})
    config = json.loads((source / "text_encoder/config.json").read_text())
    config["quantization_config"] = {"quant_method": "another"}
    (source / "text_encoder/config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", components=["transformer"])
    assert findings(tmp_path / "out", source=source) == []


def test_every_shard_is_compared_after_errors(tmp_path: Path) -> None:
    """Each error loses buffers of the reader, here a few of four; the next shard must not miss them."""
    source, output = copied(saved("z_image", max_shard_size="300KB"), tmp_path / "source"), tmp_path / "out"
    convert(source, output)
    broken = set()
    for path in sorted((output / "transformer").glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            fp8 = [n for n in shard.keys() if shard.get_slice(n).get_dtype() == "F8_E4M3"]  # noqa: SIM118
        if fp8:
            weights = load_file(source / "transformer" / path.name)
            weights[fp8[0]][0, 0] = float("nan")
            save_file(weights, source / "transformer" / path.name, metadata={"format": "pt"})
            broken.add(f"transformer/{path.name}")
    assert len(broken) > 10
    files = LocalFiles(source)
    snapshot = describe(files)
    classes = {c.name: c.class_name for c in snapshot.components}
    recipe = Recipe(choose_manifest(None, snapshot.pipeline, classes))
    for memory in (MEMORY, Memory(MEMORY.slot_bytes, 4 * MEMORY.slot_bytes)):
        plan = make_plan(snapshot, recipe, memory)
        found = [f for shard in plan.shards for f in compare_shard(output, shard, plan, FolderSupply(files), ())]
        assert {f.path for f in found if "holds NaN or Inf" in f.problem} == broken
    assert {f.path for f in verify(output, source=source).findings if "holds NaN or Inf" in f.problem} == broken
