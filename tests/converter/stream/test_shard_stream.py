"""Streaming: any shard, in any bounded memory, gives the reference's bytes; and whole conversions of a lone folder."""

import errno
import faulthandler
import hashlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from shards import Weights, convert_in, fp8, random_tensor, weights, whole

from fp8_convert.converter import ConvertError, ResumableError, convert
from fp8_convert.converter.format.header import read_header
from fp8_convert.converter.format.layout import decode_modules
from fp8_convert.converter.plan.plan import ShardPlan
from fp8_convert.converter.plan.schedule import MEMORY, Memory
from fp8_convert.converter.snapshot.files import LocalFiles
from fp8_convert.converter.stream.component_stream import convert_component
from fp8_convert.converter.stream.engine import Engine
from fp8_convert.converter.stream.measuring import measure
from fp8_convert.converter.stream.shard_stream import stream_shard
from fp8_convert.converter.stream.supply import FolderSupply

SIZES = [Memory(slot, slot * count) for slot, count in [(16, 1), (64, 4), (64, 9), (1024, 5)]] + [MEMORY]


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """A deadlock would hang for ever: end the process with every thread's stack instead."""
    faulthandler.dump_traceback_later(300, exit=True, file=sys.__stderr__ or 2)
    yield
    faulthandler.cancel_dump_traceback_later()


def streamed(plans: Sequence[ShardPlan], engine: Engine, folder: Path) -> list[list[Path]]:
    """Convert all shards and write their files as the disk writer would; checks what holds of every stream."""
    paths = []
    for stream in convert_component(whole(plans), FolderSupply(LocalFiles(folder)), engine, hashed=True):
        plan = stream.plan
        outputs = {o.name: o for o in plan.schedule.outputs}
        data = bytearray()
        for chunk in stream.chunks:
            assert outputs[chunk.name].start + chunk.offset == len(data)  # front to back, without a gap
            data += chunk.data.numpy().tobytes()
        assert len(data) == sum(o.nbytes for o in outputs.values())
        assert stream.sha256 == hashlib.sha256(stream.source.path.read_bytes()).hexdigest()
        assert b"".join(data[f.start : f.stop] for f in plan.files) == data  # files follow one another without a gap
        for file in plan.files:
            (folder / file.path).write_bytes(file.header + data[file.start : file.stop])
            assert (folder / file.path).stat().st_size == file.size
        paths.append([folder / file.path for file in plan.files])
    return paths


def check(
    w: Weights,
    folder: Path,
    workers: int = 2,
    readers: int = 1,
    max_shard_size: int | None = None,
    memory: Memory = MEMORY,
) -> list[list[Path]]:
    with Engine(workers=workers, readers=readers) as engine:
        files = streamed(w.write(folder, max_shard_size, memory), engine, folder)
    for paths, expected in zip(files, w.expected(), strict=True):
        assert merged(reference.read_safetensors(path) for path in paths) == expected
        loaded = merged(load_file(path) for path in paths)  # safetensors' own reader takes it, and sees the same
        assert {n: (tuple(t.shape), t.view(-1).view(torch.uint8).numpy().tobytes()) for n, t in loaded.items()} == {
            n: (shape, data) for n, (_, shape, data) in expected.items()
        }
    return files


def merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One dict of several that have no key in common."""
    whole: dict[str, Any] = {}
    for part in parts:
        assert not whole.keys() & part.keys()
        whole |= part
    return whole


@given(weights(), st.integers(1, 4000))
def test_any_component_cut_into_files(
    tmp_path_factory: pytest.TempPathFactory, w: Weights, max_shard_size: int
) -> None:
    """Scales stay beside their weight, and what was aligned stays aligned."""
    folder = tmp_path_factory.mktemp("cut")
    crooked = {o.name for plan in w.write(folder) for o in plan.schedule.outputs if o.start % o.itemsize}
    for path in (path for paths in check(w, folder, max_shard_size=max_shard_size) for path in paths):
        header = read_header(path, path.name)
        dtypes = {t.name: t.dtype for t in header.tensors}
        assert {t.name for t in header.tensors if t.start % t.itemsize} <= crooked
        modules = decode_modules(header.metadata)
        assert {m + ".weight" for m in modules} == {n for n, dtype in dtypes.items() if dtype == "F8_E4M3"}
        for module, how in modules.items():
            assert dtypes[how.scale_key(module)] == "F32"


def test_a_cut_does_not_move_eight_byte_elements_off_their_multiples(tmp_path: Path) -> None:
    """Two FP32 numbers come before an FP64 one: a file that began with the second would hold it four bytes off."""
    numbers = {
        "a": random_tensor("F32", (1,), 1),
        "b": random_tensor("F32", (1,), 2),
        "c": random_tensor("F64", (2,), 3),
    }
    ((first, second),) = check(Weights([numbers], {}), tmp_path, max_shard_size=1)
    assert [sorted(reference.read_safetensors(path)) for path in (first, second)] == [["a", "b"], ["c"]]
    assert all(t.start % t.itemsize == 0 for t in read_header(second, "second").tensors)


@given(weights(), st.sampled_from(SIZES), st.integers(1, 4), st.integers(1, 3))
def test_any_component(
    tmp_path_factory: pytest.TempPathFactory, w: Weights, memory: Memory, workers: int, readers: int
) -> None:
    check(w, tmp_path_factory.mktemp("any"), workers, readers, memory=memory)


def test_one_engine_serves_shards_of_different_slot_sizes(tmp_path: Path) -> None:
    """A row of blocks larger than a slot makes larger slots, and only for its shard."""
    wide = random_tensor("BF16", (16, 32), 1)
    check(
        Weights([{"a": wide}, {"b.weight": wide}, {"c.weight": wide}], {"b.weight": fp8((8, 8)), "c.weight": fp8()}),
        tmp_path,
        memory=Memory(64, 512),
    )


# Fusion groups


def group_of(shards: Sequence[Sequence[str]], dtypes: Sequence[str] = ("BF16",)) -> Weights:
    """Members of one group, of very different magnitudes, with kept tensors between them."""
    decisions, tensors = {}, []
    for number, names in enumerate(shards):
        tensors.append({f"first{number}": random_tensor("F32", (5,), 99)})
        for i, name in enumerate(names):
            values = np.linspace(-1, 1, 24 * 16, dtype=np.float32) * np.float32(10.0 ** (i - number))
            dtype = dtypes[i % len(dtypes)]
            data = (values.view(np.uint32) >> 16).astype("<u2") if dtype == "BF16" else values.astype("<f4")
            tensors[-1][f"{name}.weight"] = (dtype, (24, 16), data.tobytes())
            tensors[-1][f"{name}.bias"] = random_tensor("BF16", (24,), i)
            decisions[f"{name}.weight"] = fp8(group="g")
    return Weights(tensors, decisions)


@pytest.mark.parametrize("memory", SIZES, ids=str)
@pytest.mark.parametrize(
    "w",
    [
        group_of([["q", "k", "v"]]),
        group_of([["q", "k", "v"]], ["BF16", "F32"]),
        group_of([["q", "k"], ["v"]]),
        group_of([["q"], ["k"], ["v"]]),
    ],
    ids=["one shard", "mixed dtypes", "two shards", "three shards"],
)
def test_a_group_shares_one_scale(tmp_path: Path, w: Weights, memory: Memory) -> None:
    check(w, tmp_path, memory=memory)
    outputs = [
        t for i in range(len(w.shards)) for t in reference.read_safetensors(tmp_path / f"out-{i}.safetensors").items()
    ]
    scales = {data for name, (_, _, data) in outputs if name.endswith("weight_scale")}
    largest = max(reference.amax(shard[n]) for shard in w.shards for n in shard if n in w.decisions)
    assert scales == {reference.tensor_scale(largest).tobytes()}


def test_a_group_larger_than_the_pool_is_measured(tmp_path: Path) -> None:
    w = group_of([["q", "k", "v"]])
    assert w.write(tmp_path)[0].schedule.measured == ()
    assert w.write(tmp_path, memory=Memory(64, 512))[0].schedule.measured == ("g",)


def test_amaxes_of_other_shards_change_nothing(tmp_path: Path) -> None:
    """transformer and transformer_2 have weights of the same names."""
    w = Weights([{"a.weight": random_tensor("BF16", (8, 8), 1)}], {"a.weight": fp8()})
    (plan,) = w.write(tmp_path)
    source = LocalFiles(tmp_path).open(plan.source.path)
    with Engine() as engine:
        parts = {
            c.name: c.data.numpy().tobytes()
            for c in stream_shard(plan, source, engine, amaxes={"a.weight": 1e9, "b.weight": 2.0})
        }
    assert parts == {name: data for name, (_, _, data) in w.expected()[0].items()}


def test_measure_over_shards_and_dtypes(tmp_path: Path) -> None:
    w = group_of([["q", "k"], ["v"]], ["BF16", "F32"])
    with Engine(readers=3) as engine:
        found = measure(w.write(tmp_path, memory=Memory(64, 320)), ["g"], FolderSupply(LocalFiles(tmp_path)), engine)
    assert found == {"g": max(reference.amax(s[n]) for s in w.shards for n in s if n in w.decisions)}


# What stops a stream


def poisoned(block: reference.Block, value: float, group: str | None = None) -> Weights:
    bad = np.ones((64, 16), np.float32)
    bad[40, 3] = value
    good = random_tensor("F32", (64, 16), 5)
    tensors = {"a.weight": good, "b.weight": ("F32", (64, 16), bad.tobytes()), "c.weight": good}
    return Weights([tensors], dict.fromkeys(tensors, fp8(block, group)))


@pytest.mark.parametrize("memory", SIZES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("block", "group"), [(None, None), (None, "g"), ("channel", None), ((8, 8), None)], ids=str)
def test_nan_and_inf_are_refused_by_name(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    block: reference.Block,
    group: str | None,
    value: float,
    memory: Memory,
) -> None:
    w = poisoned(block, value, group)
    with (
        pytest.raises(
            ConvertError, match=r"b\.weight in source-0\.safetensors holds NaN or Inf, which FP8 cannot scale"
        ),
        Engine() as engine,
    ):
        streamed(w.write(tmp_path, memory=memory), engine, tmp_path)
    assert capfd.readouterr().err == ""


def test_a_source_that_changed_since_it_was_planned(tmp_path: Path) -> None:
    w = Weights([{"a.weight": random_tensor("BF16", (8, 8), 1)}], {"a.weight": fp8()})
    (plan,) = w.write(tmp_path)
    source = LocalFiles(tmp_path).open(plan.source.path)
    content = bytearray(source.path.read_bytes())
    content[20] ^= 1
    source.path.write_bytes(content)
    with pytest.raises(ConvertError, match="changed since it was planned"), Engine() as engine:
        list(stream_shard(plan, source, engine))


@pytest.mark.parametrize("block", [None, "channel", (8, 8)], ids=str)
def test_a_source_cut_short_while_it_is_read(tmp_path: Path, block: reference.Block) -> None:
    w = Weights([{"a.weight": random_tensor("BF16", (64, 64), 1)}], {"a.weight": fp8(block)})
    (plan,) = w.write(tmp_path, memory=Memory(64, 576))
    os.truncate(tmp_path / plan.source.path, plan.source.size - 100)
    with pytest.raises(ConvertError, match="became shorter"), Engine() as engine:
        streamed([plan], engine, tmp_path)


def test_a_consumer_may_stop_early(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the only worker is busy: what it has not begun is cancelled, and nobody complains."""
    w = Weights(
        [{"k": random_tensor("U8", (4,), 1), "a.weight": random_tensor("BF16", (64, 64), 2)}], {"a.weight": fp8((8, 8))}
    )
    (plan,) = w.write(tmp_path)
    source = LocalFiles(tmp_path).open(plan.source.path)
    cancelled = threading.Event()
    with Engine(workers=1) as engine:
        engine.submit(cancelled.wait)
        with closing(stream_shard(plan, source, engine)) as stream:
            assert next(stream).name == "k"
        engine.submit(bool).add_done_callback(lambda _: cancelled.set())
    assert caplog.records == []


# Whole conversions of a component's folder

MANIFEST = """
name = "all"
optional = true
[components."*"]
classes = ["WanTransformer3DModel", "AutoencoderKL"]
mode = "w8a8"
kinds = ["Linear", "Conv2d", "Conv3d"]
[[components."*".eligible]]
pattern = "*"
why = "for tests"
[[components."*".fusion_groups]]
parent = "attn1"
members = ["to_q", "to_k", "to_v"]
why = "for tests"
"""
WAN = {"_class_name": "WanTransformer3DModel", "num_layers": 3, "num_attention_heads": 1, "attention_head_dim": 12}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [32], "norm_num_groups": 32}
ATTENTION = [f"blocks.{i}.attn1.to_{m}.weight" for i in range(3) for m in "qkv"]


class Folder:
    """A component's folder and its conversion; class names give module kinds, the shapes are the test's own."""

    def __init__(self, root: Path) -> None:
        self.root, self.source, self.output = root, root / "source", root / "output"
        self.source.mkdir()
        (root / "all.toml").write_text(MANIFEST)

    def write(self, config: Mapping[str, Any], *shards: Mapping[str, reference.Tensor]) -> None:
        (self.source / "config.json").write_text(json.dumps(config))
        if len(shards) == 1:
            reference.write_safetensors(self.source / "diffusion_pytorch_model.safetensors", shards[0])
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
            reference.write_safetensors(self.source / name, shard)
            weight_map |= dict.fromkeys(shard, name)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (self.source / "diffusion_pytorch_model.safetensors.index.json").write_text(index)

    def convert(self, **options: Any) -> dict[str, reference.Tensor]:
        """Every tensor of the output."""
        convert(self.source, self.output, manifest=str(self.root / "all.toml"), device="cpu", **options)
        return self.tensors()

    def tensors(self) -> dict[str, reference.Tensor]:
        return {
            n: t for p in sorted(self.output.glob("*.safetensors")) for n, t in reference.read_safetensors(p).items()
        }

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.output)): p.read_bytes() for p in self.output.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def every_finite(dtype: str, limit: float) -> npt.NDArray[np.uint16]:
    codes = np.arange(65_536, dtype="<u2")
    values = reference.floats(dtype, codes.tobytes())
    return np.where(np.isfinite(values) & ~(np.abs(values) > limit), codes, codes.dtype.type(0x8000))


@pytest.mark.parametrize("block", [None, (128, 128), (96, 100)], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_through_a_conversion(folder: Folder, dtype: str, block: tuple[int, int] | None) -> None:
    """All finite codes up to several limits, one tensor each, so under several scales; -0.0 fills the rest."""
    limits = [1e-39, 1e-7, 0.02, 1.0, 3000.0, np.inf]
    names = [f"blocks.{i}.ffn.net.{n}.weight" for i in range(3) for n in ("0.proj", "2")]
    source = {n: (dtype, (256, 256), every_finite(dtype, lim).tobytes()) for n, lim in zip(names, limits, strict=True)}
    folder.write(WAN, source)
    expected: dict[str, reference.Tensor] = {}
    for name, tensor in source.items():
        expected |= reference.fp8_weight(name, tensor, reference.amax(tensor), block)
    assert folder.convert(weight_block_size=block) == expected


@pytest.mark.parametrize("block", [None, (128, 128)], ids=str)
@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 0x7F80), ("BF16", 0xFFC1), ("F16", 0x7C00), ("F16", 0xFE01)])
def test_non_finite_values_leave_nothing_behind(
    folder: Folder, dtype: str, bits: int, block: tuple[int, int] | None
) -> None:
    """In the middle of the second shard's middle tensor."""
    good = random_tensor(dtype, (300, 70), 1)
    codes = np.frombuffer(good[2], "<u2").copy()
    codes[10_000] = bits
    names = [f"blocks.{i}.ffn.net.0.proj.weight" for i in range(3)]
    second = {names[1]: good, names[2]: (dtype, (300, 70), codes.tobytes()), "blocks.0.ffn.net.2.weight": good}
    folder.write(WAN, {names[0]: good}, second)
    message = r"blocks\.2\.ffn\.net\.0\.proj\.weight in .*00002-of-00002\.safetensors holds NaN or Inf"
    with pytest.raises(ConvertError, match=message):
        folder.convert(weight_block_size=block)
    assert not folder.output.exists()


EXTREMES = {
    "zeros": np.zeros(64, np.float32),
    "zeros of both signs": np.array([0.0, -0.0] * 32, np.float32),
    "smallest subnormal": np.array([2.0**-149, -0.0] * 32, np.float32),
    "subnormals": np.arange(64, dtype=np.uint32).view(np.float32) * np.float32(-1),
    "at the floor": np.linspace(-448, 448, 64, dtype=np.float32) * np.float32(2.0**-126),
    "largest": np.array([np.finfo(np.float32).max, 1.0] * 32, np.float32),
    "largest BF16": np.array([0x7F7F0000, 0xFF7F0000] * 32, np.uint32).view(np.float32),
}


@pytest.mark.parametrize("block", [None, (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_extremes(folder: Folder, dtype: str, block: tuple[int, int] | None) -> None:
    source: dict[str, reference.Tensor] = {}
    names = [f"blocks.{i}.ffn.net.{n}.weight" for i in range(3) for n in ("0.proj", "2")] + ["proj_out.weight"]
    for name, values in zip(names, EXTREMES.values(), strict=True):
        if dtype == "BF16":
            data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        elif dtype == "F16":
            data = np.clip(values, -65504, 65504).astype("<f2").tobytes()
        else:
            data = values.tobytes()
        source[name] = (dtype, (8, 8), data)
    folder.write(WAN, source)
    expected: dict[str, reference.Tensor] = {}
    for name, tensor in source.items():
        expected |= reference.fp8_weight(name, tensor, reference.amax(tensor), block)
    got = folder.convert(weight_block_size=block)
    assert got == expected
    assert got[names[0]][2] == bytes(64)
    assert got[names[1]][2] == bytes([0x00, 0x80] * 32)
    if block is None:
        assert got["blocks.0.ffn.net.0.proj.weight_scale"][2] == np.float32(1).tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_convolutions_per_tensor(folder: Folder, dtype: str) -> None:
    """4-D and 5-D weights of odd sizes, beside linears that are in blocks."""
    conv3d = {
        "patch_embedding.weight": random_tensor(dtype, (8, 3, 1, 2, 3), 1),
        "proj_out.weight": random_tensor(dtype, (9, 12), 2),
    }
    folder.write(WAN, conv3d)
    expected = reference.fp8_weight(
        "patch_embedding.weight",
        conv3d["patch_embedding.weight"],
        reference.amax(conv3d["patch_embedding.weight"]),
        None,
    )
    expected |= reference.fp8_weight("proj_out.weight", conv3d["proj_out.weight"], np.float32(0), (4, 4))
    assert folder.convert(weight_block_size=(4, 4)) == expected


def test_convolutions_of_a_vae(folder: Folder) -> None:
    name = "encoder.conv_in.weight"
    source = {
        name: random_tensor("F16", (4, 3, 3, 3), 1),
        "encoder.conv_norm_out.weight": random_tensor("F16", (5,), 2),
    }
    folder.write(VAE, source)
    expected = reference.fp8_weight(name, source[name], reference.amax(source[name]), None)
    assert folder.convert() == expected | {"encoder.conv_norm_out.weight": source["encoder.conv_norm_out.weight"]}


def grouped(folder: Folder) -> dict[str, reference.Tensor]:
    """Attention of three blocks, one block's members in both shards; returns what comes out."""
    source = {n: random_tensor("BF16", (48, 40), i) for i, n in enumerate(ATTENTION)}
    source["blocks.0.scale_shift_table"] = random_tensor("F32", (1, 6, 7), 77)
    order = list(source)
    folder.write(WAN, {n: source[n] for n in order[4:]}, {n: source[n] for n in order[:4]})
    expected: dict[str, reference.Tensor] = {"blocks.0.scale_shift_table": source["blocks.0.scale_shift_table"]}
    for name in ATTENTION:
        members = [source[n] for n in ATTENTION if n.startswith(name[: len("blocks.0.")])]
        expected |= reference.fp8_weight(name, source[name], reference.amax(*members), None)
    return expected


@pytest.mark.parametrize("memory", SIZES[1:], ids=str)
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("workers", [1, 3])
def test_groups_through_a_conversion(folder: Folder, memory: Memory, workers: int, shards: int) -> None:
    expected = grouped(folder)
    convert_in(memory, folder.source, folder.output, folder.root / "all.toml", workers, shards)
    assert folder.tensors() == expected


def test_a_group_is_kept_whole_when_one_member_is_named(folder: Folder) -> None:
    expected = grouped(folder)
    source = {n: t for p in folder.source.glob("*.safetensors") for n, t in reference.read_safetensors(p).items()}
    kept = [n for n in ATTENTION if n.startswith("blocks.1.")]
    for name in kept:
        del expected[name.replace(".weight", ".weight_scale")]
        expected[name] = source[name]
    assert folder.convert(ignored_layers=["blocks.1.attn1.to_v"]) == expected
    config = json.loads((folder.output / "config.json").read_text())["quantization_config"]
    assert config["ignored_layers"] == sorted(n.removesuffix(".weight") for n in kept)


def test_two_transformers_with_the_same_names_keep_their_own_scales(tmp_path: Path) -> None:
    """As in Wan2.2, with weights larger than the pool: amax is measured first, for each of the two."""
    index = {
        "_class_name": "WanPipeline",
        **{n: ["diffusers", WAN["_class_name"]] for n in ("transformer", "transformer_2")},
    }
    source = tmp_path / "source"
    (tmp_path / "all.toml").write_text(MANIFEST)
    expected = {}
    for seed, name in enumerate(("transformer", "transformer_2")):
        (source / name).mkdir(parents=True)
        (source / name / "config.json").write_text(json.dumps(WAN))
        weight, tensor = "blocks.0.ffn.net.2.weight", random_tensor("F32", (40, 40), seed)
        reference.write_safetensors(source / name / "diffusion_pytorch_model.safetensors", {weight: tensor})
        expected[name] = reference.fp8_weight(weight, tensor, reference.amax(tensor), None)
    (source / "model_index.json").write_text(json.dumps(index))
    convert_in(Memory(256, 1024), source, tmp_path / "output", tmp_path / "all.toml")
    assert expected["transformer"] != expected["transformer_2"]
    for name, tensors in expected.items():
        path = tmp_path / "output" / name / "diffusion_pytorch_model.safetensors"
        assert reference.read_safetensors(path) == tensors


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 4])
def test_a_full_disk_keeps_the_staging_and_a_rerun_resumes(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    expected = grouped(folder)
    folder.convert()
    undisturbed = folder.files()
    folder.output.rename(folder.root / "undisturbed")
    real, left = os.pwrite, iter(range(writes))

    def filling(fd: int, data: memoryview, offset: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        with pytest.raises(ResumableError, match=r"cannot be written \(No space left on device\).*to resume"):
            folder.convert()
    assert (folder.output / ".fp8-convert").is_dir()
    assert not (folder.output / "config.json").exists()
    assert not list(folder.output.rglob("*.tmp"))
    assert folder.convert() == expected
    assert folder.files() == undisturbed


def test_another_default_device_changes_nothing(folder: Folder) -> None:
    expected = grouped(folder)
    with torch.device("meta"):
        assert folder.convert() == expected
