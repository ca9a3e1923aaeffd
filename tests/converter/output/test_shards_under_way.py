"""Whole conversions with several shards under way: the bytes, record, journal and errors of one after the other."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import copied, saved
from reference import read_safetensors
from safetensors.torch import save_file

from fp8_convert.converter import ConvertError, ResumableError, convert, plan_conversion, verify
from fp8_convert.converter.output import run
from fp8_convert.converter.output.journal import journal_file
from fp8_convert.converter.output.target import Target
from fp8_convert.converter.telling.progress import Silent


@pytest.fixture(scope="module")
def source() -> Path:
    """Some twenty shards; fusion groups have members in several of them."""
    folder = saved("z_image", max_shard_size="300KB")
    assert len(plan_conversion(folder).shards) > 10
    assert any(s.schedule.measured for s in plan_conversion(folder).shards)
    return folder


@pytest.fixture(autouse=True)
def joined() -> Any:
    """Whatever happens, no thread of a conversion outlives it."""
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("fp8-")] == []


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def journalled(folder: Path) -> list[str]:
    """The paths of the journal's lines."""
    lines = journal_file(folder).read_text().splitlines()
    return [path for line in lines if (path := json.loads(line).get("path"))]


def scales_of(source: Path, file: Path) -> Path:
    modules = [t.module for s in plan_conversion(source).shards for t in s.tensors if t.decision.fp8]
    save_file({f"{m}.input_scale": torch.tensor(0.01 * (1 + i)) for i, m in enumerate(modules)}, file)
    return file


@pytest.mark.parametrize("settings", ["tensor", "block", "static", "cut", "comfyui"])
def test_the_same_bytes_record_and_journal(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str
) -> None:
    options: dict[str, Any] = {
        "tensor": {},
        "block": {"weight_block_size": [32, 48]},
        "static": {"activation_scheme": "static"},
        "cut": {"max_shard_size": "100KB"},
        "comfyui": {"target": "comfyui"},
    }[settings]
    if settings == "static":
        source = source / "transformer"
        options["input_scales"] = scales_of(source, tmp_path / "scales.safetensors")
    journals: dict[str, str] = {}
    publish = Target.publish

    def publishing(target: Target, paths: Any, before_the_last: Callable[[], None]) -> None:
        journals[target.folder.name] = journal_file(target.folder).read_text()
        publish(target, paths, before_the_last)

    monkeypatch.setattr(Target, "publish", publishing)
    for shards in (1, 2, 4, 8):
        convert(source, tmp_path / str(shards), shards=shards, workers=shards, **options)
    expected = files(tmp_path / "1")
    assert len(expected) > 2
    for shards in ("2", "4", "8"):
        assert files(tmp_path / shards) == expected
        assert journals[shards] == journals["1"]


class Told(Silent):
    """What a conversion tells, and which threads there were when it did."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.steps = 0, list[int]()
        self.threads: set[str] = set()
        self.closed = 0
        self._now = threading.Lock()

    def start(self, total: int, unit: str = "B") -> None:
        self.total = total

    def advance(self, count: int) -> None:
        assert self._now.acquire(blocking=False), "told by two threads at once"
        time.sleep(0.0005)  # long enough for another thread to come
        self.steps.append(count)
        self.threads |= {t.name for t in threading.enumerate() if t.name.startswith("fp8-")}
        self._now.release()

    def close(self) -> None:
        self.closed += 1

    def count(self, kind: str) -> int:
        return sum(name.startswith(f"fp8-{kind}_") for name in self.threads)


@pytest.mark.parametrize("shards", [1, 4])
def test_progress_is_one_bar_that_only_grows(source: Path, tmp_path: Path, shards: int) -> None:
    told = Told()
    convert(source, tmp_path / "out", shards=shards, progress=told)
    assert min(told.steps) >= 0
    assert sum(told.steps) == told.total > 0
    assert told.closed == 1


@pytest.mark.parametrize(("workers", "shards"), [(1, 1), (1, 3), (3, 1), (2, 4)])
def test_as_many_threads_as_were_asked_for(source: Path, tmp_path: Path, workers: int, shards: int) -> None:
    told = Told()
    before = torch.get_num_threads()
    convert(source, tmp_path / "out", workers=workers, shards=shards, device="cpu", progress=told)
    assert told.count("quantize") == workers
    assert told.count("shard") == shards
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("shards", [1, 4])
def test_an_error_in_a_later_shard(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Those before it are finished and journalled; what is behind it is not."""
    output = tmp_path / "out"
    plan = plan_conversion(source)
    paths = [file.path for shard in plan.shards for file in shard.files]
    write_shard = run._write_shard

    def failing(stream: run.ShardStream, *arguments: Any) -> Any:
        if stream.plan.source.path == plan.shards[2].source.path:
            raise ResumableError("the disk is full")
        return write_shard(stream, *arguments)

    with monkeypatch.context() as full:
        full.setattr(run, "_write_shard", failing)
        with pytest.raises(ResumableError, match="the disk is full"):
            convert(source, output, shards=shards)
    assert journalled(output) == paths[:2]
    assert convert(source, output, shards=shards).resumed_shards == 2
    convert(source, tmp_path / "fresh", shards=1)
    assert files(output) == files(tmp_path / "fresh")


def test_the_first_bad_weight_is_named(source: Path, tmp_path: Path) -> None:
    """Of two, and nothing stays."""
    bad = copied(source, tmp_path / "bad")
    alone = [
        (shard, tensor)
        for shard in plan_conversion(bad).shards
        for tensor in shard.tensors
        if tensor.decision.fp8 and tensor.decision.group not in shard.schedule.measured  # else found by measuring
    ]
    first, second = alone[2], alone[3]
    for shard, tensor in (first, second):
        with open(bad / shard.source.path, "r+b") as file:
            file.seek(shard.source.header.data_start + tensor.info.start)
            file.write(np.array([0x7FC0], "<u2").tobytes())
    with pytest.raises(ConvertError, match=rf"{re.escape(first[1].info.name)} in .* holds NaN"):
        convert(bad, tmp_path / "out", shards=8)
    assert not (tmp_path / "out").exists()


def test_a_source_that_changes_stops_the_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changing, output = copied(source, tmp_path / "source"), tmp_path / "out"
    last = plan_conversion(changing).shards[5].source.path
    write_shard = run._write_shard

    def touching(stream: run.ShardStream, *arguments: Any) -> Any:
        if stream.plan.source.path == last:
            os.utime(changing / last, ns=(1, 1))
        return write_shard(stream, *arguments)

    with monkeypatch.context() as touched:
        touched.setattr(run, "_write_shard", touching)
        with pytest.raises(ResumableError, match="changed while it was read"):
            convert(changing, output, shards=4)
    assert not (output / "model_index.json").exists()
    assert convert(changing, output, shards=4).resumed_shards == 5
    assert verify(output, source=changing).ok


def test_read_back_is_done_where_it_is_asked_for(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that gives other bytes than were written is found with it; without it `verify` finds it."""
    real = os.pwrite

    def flipping(fd: int, data: memoryview, offset: int) -> int:
        done = real(fd, data, offset)
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".tmp") and offset == 0 and len(data) > 100_000:
            other = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)  # this one is for whole sectors
            real(other, bytes([data[50_000] ^ 1]), 50_000)
            os.close(other)
        return done

    with monkeypatch.context() as bad:
        bad.setattr(os, "pwrite", flipping)
        with pytest.raises(ResumableError, match="reads back other bytes than were written; check the disk"):
            convert(source, tmp_path / "checked", read_back=True)
        convert(source, tmp_path / "unchecked")
    assert not verify(tmp_path / "unchecked").ok
    convert(source, tmp_path / "good", read_back=True)
    assert read_safetensors(next((tmp_path / "good").rglob("*.safetensors")))
