"""Hostile input: whatever stands in headers, indices, configs, manifests and records, the answer is a clean error.

Property tests: valid files are changed at random, structurally and byte by byte. A conversion then either works or
raises ConvertError, and never anything else. FP8_CONVERT_FUZZ=N sets the number of examples per target.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import loras
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pipelines import saved
from shards import put_together, taken_apart

from fp8_convert.converter import ConvertError, convert, inspect, plan_conversion, verify
from fp8_convert.converter.cli.render import render_inspection, render_verification
from fp8_convert.converter.format.layout import encode_json
from fp8_convert.converter.output.record import seal
from fp8_convert.converter.plan.manifest import parse_manifest
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.converter.snapshot.describing import describe
from fp8_convert.converter.snapshot.files import LocalFiles
from fp8_convert.converter.snapshot.modules import module_map
from fp8_convert.loader import LoadError
from fp8_convert.loader.build import build
from fp8_convert.loader.checkpoint import check_record, fp8_modules, open_snapshot

EXAMPLES = int(os.environ.get("FP8_CONVERT_FUZZ", "25"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["../x", "/etc/passwd", "a/b", "\x00", "\x1b[2J", "..", "", "F8_E4M3", "model.safetensors", "𝕏" * 3]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def snapshot() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def paths_into(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON document."""
    found = [prefix]
    if isinstance(value, dict):
        for key in value:
            found += paths_into(value[key], (*prefix, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            found += paths_into(item, (*prefix, i))
    return found


@st.composite
def changes(draw: st.DrawFn, document: Any) -> bytes:
    """The document as JSON with one to three places replaced, removed or renamed, or its bytes damaged."""
    changed = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from([p for p in paths_into(changed) if p] or [("x",)]))
        place = changed
        try:
            for key in parents:
                place = place[key]
            action = draw(st.sampled_from(["replace", "remove", "rename"]))
            if action == "replace":
                place[last] = draw(VALUES)
            elif action == "remove":
                del place[last]
            elif isinstance(place, dict):
                place[draw(st.text(max_size=8))] = place.pop(last)
        except (KeyError, IndexError, TypeError):
            continue
    data = json.dumps(changed).encode()
    if draw(st.integers(0, 4)) == 0:
        position = draw(st.integers(0, len(data)))
        data = data[:position] + draw(st.binary(max_size=4)) + data[position + draw(st.integers(0, 4)) :]
    return data


def link_copy(source: Path, folder: Path) -> None:
    """A copy of a snapshot by hard links: files are replaced, never changed in place."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, copy_function=os.link)


def replaced(folder: Path, path: str, data: bytes) -> None:
    (folder / path).unlink()
    (folder / path).write_bytes(data)


def works_or_says(action: Callable[[], Any]) -> None:
    message = ""
    try:
        action()
    except ConvertError as error:
        message = str(error)
    assert message.isprintable(), "control characters reach the terminal"
    assert len(message) < 2000


def is_clean(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def shows_itself(result: Any) -> None:
    """At a Python prompt and in a notebook, short and without markup or control characters of the input's."""
    assert len(repr(result)) < 200
    assert is_clean(repr(result) + result._repr_html_())
    assert len(result._repr_html_()) < 100_000


def looked_at(folder: Path, source: Path | None = None) -> None:
    """Show a converted snapshot in every way."""

    def inspected() -> None:
        inspection = inspect(folder)
        json.dumps(inspection.to_json())
        assert is_clean(render_inspection(inspection))
        shows_itself(inspection)

    def verified() -> None:
        verification = verify(folder, source=source)
        json.dumps(verification.to_json())
        assert is_clean(render_verification(verification))
        shows_itself(verification)
        assert all(len(f.path) + len(f.problem) < 2000 for f in verification.findings)

    works_or_says(inspected)
    works_or_says(verified)


def resealed(record: Any) -> bytes:
    """A record as its forger would write it: its seal fits."""
    if not isinstance(record, dict):
        return json.dumps(record).encode()
    record = seal({k: v for k, v in record.items() if k != "record_sha256"})
    try:
        return encode_json(record)
    except UnicodeEncodeError:  # half a surrogate pair: only an escape can write it
        return json.dumps(record).encode()


def forged(folder: Path, path: str, data: bytes) -> None:
    """Put another file into a converted snapshot, and its size and digest into the record."""
    replaced(folder, path, data)
    record = json.loads((folder / "fp8_convert.json").read_text())
    for entries in (record["files"], record["shards"]):
        if path in entries:
            entries[path] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    replaced(folder, "fp8_convert.json", resealed(record))


@pytest.fixture(scope="module")
def sharded() -> Path:
    return saved("z_image", max_shard_size="2MB")


FILES = [
    "model_index.json",
    "transformer/config.json",
    "text_encoder/config.json",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
]


@pytest.mark.parametrize("path", FILES)
def test_json_of_the_source(sharded: Path, snapshot: Path, path: str) -> None:
    document = json.loads((sharded / path).read_text())

    @fuzzed
    @given(data=changes(document))
    def run(data: bytes) -> None:
        link_copy(sharded, snapshot / "s")
        replaced(snapshot / "s", path, data)
        works_or_says(lambda: plan_conversion(snapshot / "s"))
        works_or_says(lambda: inspect(snapshot / "s"))

    run()


def test_headers_of_the_source(snapshot: Path) -> None:
    source = saved("z_image") / "transformer"
    file = source / "diffusion_pytorch_model.safetensors"
    header, weights = taken_apart(file)
    few = {name: header[name] for name in list(header)[:6]}

    @fuzzed
    @given(data=changes({**few, "__metadata__": {"format": "pt"}}), keep_rest=st.booleans())
    def run(data: bytes, keep_rest: bool) -> None:
        if keep_rest:
            with contextlib.suppress(ValueError, TypeError):
                data = json.dumps({**header, **json.loads(data)}).encode()
        link_copy(source, snapshot / "s")
        replaced(snapshot / "s", file.name, put_together(data, weights))
        works_or_says(lambda: convert(snapshot / "s", snapshot / "out", force=True, workers=1))
        shutil.rmtree(snapshot / "out", ignore_errors=True)

    run()


def test_headers_of_a_lora(snapshot: Path) -> None:
    model = saved("z_image") / "transformer"
    shapes = {"layers.0.attention.to_q": (64, 64), "layers.0.feed_forward.w1": (170, 64)}
    header, weights = taken_apart(loras.write(snapshot / "lora.safetensors", loras.pairs(shapes)))
    renamed = {name.replace(".w1.", ".\x1b[2J\n."): tensor for name, tensor in header.items()}

    @fuzzed
    @given(data=changes(header))
    @example(data=json.dumps(renamed).encode())
    def run(data: bytes) -> None:
        (snapshot / "changed.safetensors").write_bytes(put_together(data, weights))
        works_or_says(lambda: plan_conversion(model, merge_lora=[str(snapshot / "changed.safetensors")]))

    run()


def test_manifests(snapshot: Path) -> None:
    raw = resources.files("fp8_convert.manifests").joinpath("qwen-image.toml").read_bytes()

    @fuzzed
    @given(position=st.integers(0, len(raw)), junk=st.binary(max_size=6), cut=st.integers(0, 40))
    def run(position: int, junk: bytes, cut: int) -> None:
        works_or_says(lambda: parse_manifest(raw[:position] + junk + raw[position + cut :], "own.toml"))

    run()


@pytest.mark.parametrize("path", ["fp8_convert.json", "transformer/config.json"])
def test_converted_snapshots(snapshot: Path, path: str) -> None:
    convert(saved("z_image"), snapshot / "converted", components=["transformer"])
    document = json.loads((snapshot / "converted" / path).read_text())

    @fuzzed
    @given(data=changes(document))
    def run(data: bytes) -> None:
        link_copy(snapshot / "converted", snapshot / "s")
        replaced(snapshot / "s", path, data)
        works_or_says(lambda: inspect(snapshot / "s"))
        works_or_says(lambda: verify(snapshot / "s"))

    run()


@pytest.fixture(scope="module")
def converted(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of FP8 linears and a copied text encoder."""
    folder = tmp_path_factory.mktemp("hostile") / "converted"
    convert(sharded, folder, components=["transformer"])
    return folder


def test_resealed_records(converted: Path, sharded: Path, snapshot: Path) -> None:
    document = json.loads((converted / "fp8_convert.json").read_text())
    link_copy(converted, snapshot / "s")

    @fuzzed
    @given(data=changes(document), against_source=st.integers(0, 9).map(lambda n: n == 0))
    def run(data: bytes, against_source: bool) -> None:
        with contextlib.suppress(ValueError):
            data = resealed(json.loads(data))
        replaced(snapshot / "s", "fp8_convert.json", data)
        looked_at(snapshot / "s", sharded if against_source else None)
        works_or_says(lambda: loaded(snapshot / "s"))

    run()


def loaded(folder: Path) -> None:
    """What the loader reads of a snapshot beside its weights."""
    component = next(c for c in open_snapshot(folder, HubAccess())[0].components if c.name == "transformer")
    with contextlib.suppress(LoadError):
        check_record(folder, component, fp8_modules(component))


@pytest.mark.parametrize("path", ["quantization_config", "transformer/config.json", FILES[0], FILES[3]])
def test_forged_files(converted: Path, snapshot: Path, path: str) -> None:
    """Files that have the digest of a record that has its seal: nothing but the checks themselves stands in the way."""
    of_config = path == "quantization_config"
    path = "transformer/config.json" if of_config else path
    document = json.loads((converted / path).read_text())
    kept = {k: v for k, v in document.items() if k != "quantization_config"} if of_config else {}
    document = {k: v for k, v in document.items() if k not in kept}

    @fuzzed
    @given(data=changes(document))
    def run(data: bytes) -> None:
        if kept:
            with contextlib.suppress(ValueError, TypeError):
                data = json.dumps({**kept, **json.loads(data)}).encode()
        link_copy(converted, snapshot / "s")
        forged(snapshot / "s", path, data)
        looked_at(snapshot / "s")

    run()


@pytest.mark.parametrize("part", ["modules", "tensors"])
def test_forged_headers(converted: Path, snapshot: Path, part: str) -> None:
    path = min(converted.glob("transformer/*.safetensors")).relative_to(converted).as_posix()
    header, weights = taken_apart(converted / path)
    modules = json.loads(header["__metadata__"]["fp8_convert"])
    few = {name: header[name] for name in list(header)[1:7]}

    @fuzzed
    @given(data=changes(modules if part == "modules" else few))
    def run(data: bytes) -> None:
        if part == "modules":
            metadata = {**header["__metadata__"], "fp8_convert": data.decode(errors="replace")}
            data = json.dumps({**header, "__metadata__": metadata}).encode()
        else:
            with contextlib.suppress(ValueError, TypeError):
                data = json.dumps({**header, **json.loads(data)}).encode()
        link_copy(converted, snapshot / "s")
        forged(snapshot / "s", path, put_together(data, weights))
        looked_at(snapshot / "s")

    run()


@pytest.mark.parametrize("depth", [1_000, 200_000])
@pytest.mark.parametrize("path", [*FILES, "header"])
def test_deep_json(sharded: Path, snapshot: Path, path: str, depth: int) -> None:
    link_copy(sharded, snapshot / "s")
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    if path == "header":
        shard = next((snapshot / "s" / "transformer").glob("*.safetensors")).relative_to(snapshot / "s").as_posix()
        replaced(snapshot / "s", shard, put_together(deep, b""))
    else:
        replaced(snapshot / "s", path, deep)
    works_or_says(lambda: plan_conversion(snapshot / "s"))


def test_control_characters_in_file_names(snapshot: Path) -> None:
    shutil.copytree(saved("z_image"), snapshot / "s")
    (snapshot / "s" / "scheduler" / "a\x1b[31m.json").write_text("{}")
    with pytest.raises(ConvertError, match="control characters"):
        convert(snapshot / "s", snapshot / "out")
    assert not (snapshot / "out").exists()


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted component that stands alone."""
    folder = tmp_path_factory.mktemp("hostile") / "lone"
    convert(saved("z_image") / "transformer", folder)
    return folder


@pytest.mark.parametrize("value", [None, 1e30, "", [[]], [{}], {"a": []}, ["x" * 5000], float("nan")], ids=ascii)
def test_a_quantization_config_of_wrong_types(lone: Path, snapshot: Path, value: Any) -> None:
    """As a whole and in each of its keys, in a source and in what claims to be converted."""
    source = saved("z_image") / "transformer"
    config = json.loads((lone / "config.json").read_text())
    stated = config["quantization_config"]
    for changed in (value, *({**stated, key: value} for key in stated), {**stated, "unknown": value}):
        data = json.dumps({**config, "quantization_config": changed}).encode()
        link_copy(lone, snapshot / "s")
        forged(snapshot / "s", "config.json", data)
        looked_at(snapshot / "s")
        link_copy(source, snapshot / "source")
        replaced(snapshot / "source", "config.json", data)
        works_or_says(lambda: plan_conversion(snapshot / "source"))
        works_or_says(lambda: inspect(snapshot / "source"))


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": [16] * 10**5, "down_block_types": ["DownEncoderBlock2D"] * 10**5},
        {"layers_per_block": 10**9},
        {"latent_channels": -4},
        {"block_out_channels": [10**30, 16]},
        {"latent_channels": 1e30},
        {"norm_num_groups": 0},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_config_that_its_weights_do_not_bear_out(change: dict[str, Any]) -> None:
    """The class is never built beyond what the checkpoint can hold, by converter and loader alike."""
    (component,) = describe(LocalFiles(saved("z_image") / "vae")).components
    hostile = replace(component, config={**component.config, **change})
    problem = module_map(hostile).problem
    assert problem is not None
    assert len(problem) < 500
    many = isinstance(next(iter(change.values())), list | int) and "asks for more" in problem
    with pytest.raises(ConvertError if many else Exception):
        build(hostile, torch.bfloat16)
    assert module_map(component).problem is None  # nothing stays behind


def test_numbers_of_layers_as_real_classes_have_them() -> None:
    """What repeats is bounded by the number of tensors, with room for every class of the test pipelines."""
    for name in ("z_image", "qwen_image", "wan22", "flux"):
        for component in describe(LocalFiles(saved(name))).components:
            assert module_map(component).problem is None, component.label
