"""Reading ahead of the plan: the shards that come first, until it is there, and never an error of its own."""

import os
import threading
from pathlib import Path

import pytest
from pipelines import copied, saved

from fp8_convert.converter import ConvertError, convert, plan_conversion
from fp8_convert.converter.snapshot import paging
from fp8_convert.converter.snapshot.files import LocalFiles
from fp8_convert.converter.snapshot.paging import paging_in

WAIT_S = 30


class Advice:
    """What the system is told of files: the bytes that are wanted, by path, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wanted: dict[str, int] = {}
        self.slow = threading.Event()
        self.slow.set()
        self._real = os.posix_fadvise
        monkeypatch.setattr(os, "posix_fadvise", self)

    def __call__(self, fd: int, start: int, length: int, how: int) -> None:
        if how == os.POSIX_FADV_WILLNEED:
            path = os.readlink(f"/proc/self/fd/{fd}")
            self.wanted[path] = start + length
            self.slow.wait(WAIT_S)
        self._real(fd, start, length, how)


def ended() -> None:
    for thread in threading.enumerate():
        if thread.name == "fp8-page-in":
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.fixture
def source() -> Path:
    return saved("z_image", max_shard_size="2MB")


def test_shards_come_in_the_order_of_the_plan(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = Advice(monkeypatch)
    with paging_in(LocalFiles(source)):
        ended()
    shards = plan_conversion(source).shards
    assert [*advice.wanted] == [str(source / s.source.path) for s in shards]
    assert all(advice.wanted[str(source / s.source.path)] >= s.source.size for s in shards)


def test_a_lone_component(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = Advice(monkeypatch)
    with paging_in(LocalFiles(source / "transformer")):
        ended()
    assert [*advice.wanted] == [str(p) for p in sorted((source / "transformer").glob("*.safetensors"))]


def test_it_ends_with_the_plan(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = Advice(monkeypatch)
    advice.slow.clear()
    with paging_in(LocalFiles(source)):
        while not advice.wanted:
            pass
    advice.slow.set()
    ended()
    assert len(advice.wanted) == 1


def test_a_conversion_does_it(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = Advice(monkeypatch)
    convert(source, tmp_path / "out")
    ended()
    assert advice.wanted


def test_what_is_wrong_is_said_by_the_plan(tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = copied(source, tmp_path / "broken")
    shard = min((broken / "transformer").glob("*.safetensors"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(ConvertError, match="is a FIFO instead of a file"):
        convert(broken, tmp_path / "out")
    ended()
    (broken / "model_index.json").write_text("{")
    with pytest.raises(ConvertError):
        convert(broken, tmp_path / "out")
    ended()
    assert "Traceback" not in capfd.readouterr().err


def test_no_more_than_some_gigabytes(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = copied(source, tmp_path / "large")
    first, second, *_ = (large / s.source.path for s in plan_conversion(large).shards)
    os.truncate(first, paging._MOST_BYTES - 1000)  # sparse, and told by size alone
    os.truncate(second, 5000)
    advice = Advice(monkeypatch)
    monkeypatch.setattr(advice, "_real", lambda *_: None)
    with paging_in(LocalFiles(large)):
        ended()
    assert advice.wanted == {str(first): paging._MOST_BYTES - 1000, str(second): 1000}
