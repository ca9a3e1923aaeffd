"""One component's conversion: every shard in order, and groups measured once, whichever shards are asked for."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import reference
from shards import Weights, fp8, random_tensor, whole

from fp8_convert.converter.plan.plan import ComponentPlan
from fp8_convert.converter.snapshot.files import LocalFiles, SourceFile
from fp8_convert.converter.snapshot.snapshot import Shard
from fp8_convert.converter.stream import component_stream
from fp8_convert.converter.stream.component_stream import begin_shards, convert_component
from fp8_convert.converter.stream.engine import Engine
from fp8_convert.converter.stream.supply import FolderSupply

GROUP = Weights(
    [{f"{name}.weight": random_tensor("BF16", (8, 16), seed)} for seed, name in enumerate("qkv")],
    {f"{name}.weight": fp8(group="g") for name in "qkv"},
)


class FarSupply(FolderSupply):
    """Has a file from when it is opened; until then its bytes come by range, as those of a Hub."""

    def __init__(self, files: LocalFiles) -> None:
        super().__init__(files)
        self.opened: list[str] = []
        self.ranges: list[str] = []

    def open(self, shard: Shard) -> SourceFile:
        self.opened.append(shard.path)
        return super().open(shard)

    def find(self, shard: Shard) -> SourceFile | None:
        return super().open(shard) if shard.path in self.opened else None

    def range(self, shard: Shard, start: int, stop: int) -> bytes:
        self.ranges.append(shard.path)
        return (self.files.root / shard.path).read_bytes()[start:stop]


@pytest.fixture
def component(tmp_path: Path) -> ComponentPlan:
    return whole(GROUP.write(tmp_path))


def converted(
    component: ComponentPlan, supply: FolderSupply, only: Sequence[int] | None = None
) -> list[dict[str, bytes]]:
    """Bytes by output tensor, for each shard."""
    shards = None if only is None else [component.shards[i] for i in only]
    found = []
    with Engine() as engine:
        for stream in convert_component(component, supply, engine, shards=shards):
            parts: dict[str, bytes] = {}
            for chunk in stream.chunks:
                parts[chunk.name] = parts.get(chunk.name, b"") + chunk.data.numpy().tobytes()
            found.append(parts)
    return found


def expected() -> list[dict[str, bytes]]:
    return [{name: data for name, (_, _, data) in shard.items()} for shard in GROUP.expected()]


def test_a_group_over_three_shards_is_measured_once(
    component: ComponentPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    measure = component_stream.measure
    monkeypatch.setattr(component_stream, "measure", lambda *a: (asked.append(a[1]), measure(*a))[1])
    assert converted(component, FolderSupply(LocalFiles(tmp_path))) == expected()
    assert asked == [["g"]]


def test_one_shard_alone_has_the_scale_of_all(component: ComponentPlan, tmp_path: Path) -> None:
    assert converted(component, FolderSupply(LocalFiles(tmp_path)), [2]) == expected()[2:]


def test_members_that_have_not_arrived_are_measured_by_range(component: ComponentPlan, tmp_path: Path) -> None:
    supply = FarSupply(LocalFiles(tmp_path))
    assert converted(component, supply) == expected()
    assert supply.opened == [shard.source.path for shard in component.shards]
    assert supply.ranges == supply.opened[1:]


def test_bytes_that_were_measured_are_told(component: ComponentPlan, tmp_path: Path) -> None:
    told: list[int] = []
    with Engine() as engine:
        supply = FolderSupply(LocalFiles(tmp_path))
        for stream in begin_shards(component, supply, engine, hashed=True, on_measured=told.append):
            assert list(stream.chunks)
            assert stream.sha256 == hashlib.sha256((tmp_path / stream.plan.source.path).read_bytes()).hexdigest()
    assert told == [3 * 8 * 16 * 2]


def test_scales_are_the_group_s(component: ComponentPlan, tmp_path: Path) -> None:
    parts = converted(component, FolderSupply(LocalFiles(tmp_path)))
    largest = max(reference.amax(tensor) for shard in GROUP.shards for tensor in shard.values())
    scales = {data for shard in parts for name, data in shard.items() if name.endswith("weight_scale")}
    assert scales == {reference.tensor_scale(largest).tobytes()}
