"""Faults: kills, full disks, read errors, damage. After each, a rerun gives the undisturbed bytes or one clear error.

With one shard under way and with several. A dozen random kills run by default; FP8_CONVERT_FAULTS=N sets another number
for a long run (`make faults`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from pipelines import copied, saved

from fp8_convert.converter import ConvertError, ResumableError, convert, plan_conversion, verify
from fp8_convert.converter.format.layout import STAGING
from fp8_convert.converter.output.run import run
from fp8_convert.converter.output.target import Target, open_target
from fp8_convert.converter.output.work import Work
from fp8_convert.converter.plan.plan import ShardPlan
from fp8_convert.converter.snapshot.files import LocalFiles, SourceFile
from fp8_convert.converter.stream import component_stream
from fp8_convert.converter.stream.shard_stream import Chunk, stream_shard
from fp8_convert.converter.telling.progress import Silent

TRIES = int(os.environ.get("FP8_CONVERT_FAULTS", "12"))
# Forks a conversion for each line "STOP_AT SHARDS OUTPUT": a kill is to land in the conversion and not in its imports.
# STOP_AT >= 0 ends the process at that rename of the last step.
_NURSERY = """
import os, sys
from fp8_convert.converter import convert
from fp8_convert.converter.output import target
from fp8_convert.converter.snapshot.modules import module_map
from fp8_convert.converter.snapshot.describing import describe
from fp8_convert.converter.snapshot.files import LocalFiles
from pathlib import Path

for component in describe(LocalFiles(Path(sys.argv[1]))).components:
    module_map(component)

def die_at(stop_at):
    moved, replace = 0, os.replace
    def dying(a, b):
        nonlocal moved
        if ".fp8-convert" not in str(b):
            if moved == stop_at:
                os._exit(9)
            moved += 1
        replace(a, b)
    target.os.replace = dying

for line in sys.stdin:
    stop_at, shards, output = line.rstrip().split(" ", 2)
    child = os.fork()
    if child == 0:
        if int(stop_at) >= 0:
            die_at(int(stop_at))
        convert(sys.argv[1], output, workers=2, shards=int(shards))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


under_way = pytest.mark.parametrize("shards", [1, 4])


class Nursery:
    """Conversions in processes of their own, one at a time."""

    def __init__(self, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _NURSERY, str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, output: Path, stop_at: int = -1, shards: int = 1) -> int:
        """Start a conversion; returns its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{stop_at} {shards} {output}\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """The conversion's exit code, negative for a signal."""
        return int(self._line())

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@pytest.fixture(scope="module")
def source() -> Path:
    return saved("z_image", max_shard_size="2MB")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    convert(source, output)
    return digests(output)


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def nursery(source: Path) -> Iterator[Nursery]:
    nursery = Nursery(source)
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def duration(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a conversion takes, to know when to kill one."""
    times = []
    for _ in range(2):
        started = time.monotonic()
        nursery.start(tmp_path_factory.mktemp("timing") / "out")
        assert nursery.wait() == 0
        times.append(time.monotonic() - started)
    return min(times)


@under_way
def test_kill_at_random_points(
    nursery: Nursery,
    shards: int,
    source: Path,
    undisturbed: dict[str, str],
    duration: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random(int(os.environ.get("FP8_CONVERT_SEED", "0")))
    killed = resumed = 0
    for attempt in range(TRIES):
        output = tmp_path / f"out{attempt}"
        process = nursery.start(output, shards=shards)
        time.sleep(rng.random() * duration)
        with contextlib.suppress(ProcessLookupError):  # it may have finished already
            os.kill(process, signal.SIGKILL)
        was_killed = nursery.wait() == -signal.SIGKILL
        killed += was_killed
        if was_killed and not (output / "fp8_convert.json").exists():
            assert not (output / "model_index.json").exists(), "an unfinished snapshot looks like one"
        if was_killed and ((output / STAGING).exists() or not output.exists()):
            resumed += convert(source, output, shards=shards).resumed_shards
        assert digests(output) == undisturbed
        assert verify(output).ok
        shutil.rmtree(output)
    with capsys.disabled():
        print(
            f"\nkills, {shards} shards under way: {TRIES} tried, {killed} hit a running conversion, all survived; "
            f"{resumed} shards resumed"
        )


def test_kill_while_the_snapshot_appears(
    nursery: Nursery, source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Stop after each rename of the last step in turn; the rerun completes it."""
    for stop_at in range(0, len(undisturbed), 2):
        output = tmp_path / f"out{stop_at}"
        nursery.start(output, stop_at)
        assert nursery.wait() == 9
        assert not (output / "fp8_convert.json").exists()
        convert(source, output)
        assert digests(output) == undisturbed
        shutil.rmtree(output)


def test_a_kill_after_the_last_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, undisturbed: dict[str, str]
) -> None:
    """All is there, and signs of a conversion under way too: `verify` says what to do, and the rerun does it."""
    output = tmp_path / "out"
    with monkeypatch.context() as killed:
        killed.setattr(Target, "_remove_staging", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, output)
    [(path, problem)] = [(finding.path, finding.problem) for finding in verify(output).findings]
    assert path == f"{STAGING}/"
    assert problem == "is not in the record (2 files): a conversion was interrupted, run its command again"
    assert not convert(source, output).already_done
    assert digests(output) == undisturbed
    assert verify(output).ok


@under_way
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_with_a_word_on_resuming(
    source: Path, tmp_path: Path, signum: signal.Signals, shards: int
) -> None:
    slow = (
        "import time\nfrom fp8_convert.converter.output import writing\n"
        "write = writing.os.pwrite\n"
        "writing.os.pwrite = lambda *a: (print('writing', flush=True), time.sleep(0.2), write(*a))[2]\n"
        "from fp8_convert.converter.cli.commands import main\nmain()"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", slow, str(source), "-o", str(tmp_path / "out"), "--shards", str(shards)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "stopped; run the same command again to resume."
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "model_index.json").exists()
    convert(source, tmp_path / "out")
    assert verify(tmp_path / "out").ok


class Disk:
    """Lets `os.pwrite` of the writer fail once `budget` bytes were written, as a full or failing disk does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, budget: int, code: int) -> None:
        self.left, self.code = budget, code
        self._write = os.pwrite
        monkeypatch.setattr("fp8_convert.converter.output.writing.os.pwrite", self)

    def __call__(self, fd: int, data: memoryview, offset: int) -> int:
        if self.left <= 0:
            raise OSError(self.code, os.strerror(self.code))
        done = self._write(fd, data, offset)
        self.left -= done
        return done


@under_way
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_write_errors_at_random_offsets(
    source: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    shards: int,
) -> None:
    rng = random.Random(code)
    total = sum(p.stat().st_size for p in source.rglob("*"))
    for attempt in range(TRIES // 2):
        output = tmp_path / f"out{attempt}"
        with monkeypatch.context() as patched:
            Disk(patched, rng.randrange(total // 2), code)
            with pytest.raises(ResumableError, match=r"cannot be written .*run the same command again to resume"):
                convert(source, output, shards=shards)
        convert(source, output, shards=shards)
        assert digests(output) == undisturbed
        shutil.rmtree(output)
    with capsys.disabled():
        which = f"{errno.errorcode[code]}, {shards} shards under way"
        print(f"\nwrite errors ({which}): {TRIES // 2} tried, all survived")


@under_way
def test_read_errors_and_short_reads(
    source: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shards: int,
) -> None:
    rng = random.Random(5)
    read = os.preadv
    for attempt in range(TRIES // 2):
        left = [rng.randrange(2, 60)]

        def failing(fd: int, buffers: list[memoryview], offset: int, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(fd, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)  # a legal short read

        output = tmp_path / f"out{attempt}"
        with monkeypatch.context() as patched:
            patched.setattr("fp8_convert.converter.stream.reading.os.preadv", failing)  # also read back
            with pytest.raises(ResumableError, match=r"cannot be (read|written) \(Input/output error\)"):
                convert(source, output, shards=shards, read_back=True)
        convert(source, output, shards=shards)
        assert digests(output) == undisturbed
        shutil.rmtree(output)
    with capsys.disabled():
        which = f"{shards} shards under way"
        print(f"\nread errors and short reads, {which}: {TRIES // 2} tried, all survived")


def interrupted(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, budget: int = 5_000_000, **settings: Any
) -> list[Path]:
    """Stop a conversion midway by a full disk; returns the shards it finished."""
    with monkeypatch.context() as patched:
        Disk(patched, budget, errno.ENOSPC)
        with pytest.raises(ResumableError):
            convert(source, output, **settings)
    finished = sorted((output / STAGING / "new").rglob("*.safetensors"))
    assert finished
    return finished


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damaged_finished_shards_are_done_again(
    source: Path, undisturbed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    output = tmp_path / "out"
    shard = interrupted(source, output, monkeypatch)[0]
    if damage == "truncate":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "flip":
        flip(shard, 1000)
    else:
        shard.unlink()
    convert(source, output)
    assert digests(output) == undisturbed


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def test_a_changed_source_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    changed = copied(source, tmp_path / "source")
    output = tmp_path / "out"
    done = interrupted(changed, output, monkeypatch)[0].relative_to(output / STAGING / "new").as_posix()
    flip(changed / done, 8 * ((changed / done).stat().st_size - 1001))
    convert(changed, output)
    convert(changed, tmp_path / "fresh")
    assert digests(output) == digests(tmp_path / "fresh")


def test_a_disk_that_is_full_on_resuming_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    output = tmp_path / "out"
    done = interrupted(source, output, monkeypatch)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(ConvertError, match="not enough disk space"):
            convert(source, output)
    assert all(path.is_file() for path in done)
    assert convert(source, output).resumed_shards == len(done)


def test_a_source_that_vanishes_midway_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    vanishing, output = copied(source, tmp_path / "source"), tmp_path / "out"
    done = len(interrupted(vanishing, output, monkeypatch))
    begin = Target.begin

    def vanish(target: Target, key: str, **settings: Any) -> bool:
        shutil.rmtree(vanishing / "transformer")
        return begin(target, key, **settings)

    with monkeypatch.context() as gone:
        gone.setattr(Target, "begin", vanish)
        with pytest.raises(ResumableError, match="cannot be opened"):
            convert(vanishing, output)
    shutil.rmtree(vanishing)
    copied(source, vanishing)
    assert convert(vanishing, output).resumed_shards == done


def test_a_forced_run_that_was_interrupted_leaves_the_snapshot_protected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    output = tmp_path / "out"
    convert(source, output)
    before = digests(output)
    interrupted(source, output, monkeypatch, ignored_layers=["layers.0"], force=True)
    with pytest.raises(ConvertError, match=r"made otherwise \(ignored_layers was .*; pass --force"):
        convert(source, output, ignored_layers=["layers.1"])
    assert {p: d for p, d in digests(output).items() if STAGING not in p} == before
    assert convert(source, output, ignored_layers=["layers.0"]).resumed_shards > 0
    assert verify(output).ok


def test_a_kill_while_a_snapshot_is_replaced_leaves_no_stale_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    output = tmp_path / "out"
    convert(saved("qwen_image", max_shard_size="400KB"), output)
    removed: list[Path] = []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.parent.parent == output and removed:
            raise KeyboardInterrupt
        removed.append(path)
        if path.exists():
            os.unlink(path)

    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            convert(source, output, force=True)
    assert not (output / "model_index.json").exists()
    convert(source, output, force=True)
    convert(source, tmp_path / "fresh")
    assert digests(output) == digests(tmp_path / "fresh")


def test_a_lock_that_its_holder_removed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, how: int) -> None:
        shutil.rmtree(tmp_path / "out" / STAGING)  # the holder finishes between our open and our lock

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ConvertError, match="Another fp8-convert is writing"):
        open_target(tmp_path / "out", [], force=False)


@under_way
def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, shards: int
) -> None:
    changing, output = copied(source, tmp_path / "source"), tmp_path / "out"

    def touching(shard: ShardPlan, source: SourceFile, *arguments: Any, **settings: Any) -> Iterator[Chunk]:
        yield from stream_shard(shard, source, *arguments, **settings)
        if shard.component == "transformer":
            os.utime(source.path, ns=(1, 1))

    with monkeypatch.context() as touched:
        touched.setattr(component_stream, "stream_shard", touching)
        with pytest.raises(ResumableError, match=r"transformer/.* changed while it was read; run again"):
            convert(changing, output, shards=shards)
    convert(changing, output, shards=shards)
    assert verify(output, source=changing).ok


def test_another_recipe_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    output = tmp_path / "out"
    interrupted(source, output, monkeypatch)
    assert convert(source, output, ignored_layers=["layers.0"]).resumed_shards == 0
    convert(source, tmp_path / "fresh", ignored_layers=["layers.0"])
    assert digests(output) == digests(tmp_path / "fresh")


def test_resuming_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    output = tmp_path / "out"
    finished = interrupted(source, output, monkeypatch)
    inodes = [path.stat().st_ino for path in finished]
    result = convert(source, output)
    assert result.resumed_shards == len(finished)
    moved = [output / path.relative_to(output / STAGING / "new") for path in finished]
    assert [path.stat().st_ino for path in moved] == inodes


def is_sound(output: Path) -> bool:
    try:
        return verify(output).ok
    except ConvertError as error:
        if "fp8_convert.json is damaged" not in str(error):
            raise
        return False  # damaged beyond reading, and said so


def test_verify_finds_every_flip(
    source: Path, undisturbed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    convert(source, output)
    rng = random.Random(1)
    files = sorted(p for p in output.rglob("*") if p.is_file())
    for path in files:
        for _ in range(1 + TRIES // 6):
            bit = rng.randrange(path.stat().st_size * 8)
            flip(path, bit)
            assert not is_sound(output), f"{path} bit {bit}"
            flip(path, bit)
    assert verify(output).ok
    assert digests(output) == undisturbed
    with capsys.disabled():
        print(f"\nbit flips: {len(files) * (1 + TRIES // 6)} tried, all found")


def test_two_runs_at_once(source: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    outcomes: list[str] = []

    def run() -> None:
        try:
            convert(source, output)
            outcomes.append("converted")
        except ConvertError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes.count("converted") >= 1
    refused = [o for o in outcomes if o != "converted"]
    assert all("Another fp8-convert is writing" in o or "finished FP8 snapshot" in o for o in refused), refused
    assert digests(output) == undisturbed


def test_the_lock_dies_with_its_process(source: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib\nfrom fp8_convert.converter.output.target import open_target\n"
            "t = open_target(pathlib.Path(sys.argv[1]), [], force=False)\nprint('held', flush=True)\nsys.stdin.read()",
            str(output),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConvertError, match="Another fp8-convert is writing"):
        convert(source, output)
    holder.kill()
    holder.communicate()
    convert(source, output)
    assert digests(output) == undisturbed


def test_a_vanished_source(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vanishing = copied(source, tmp_path / "source")
    interrupted(vanishing, tmp_path / "out", monkeypatch)
    shutil.rmtree(vanishing)
    with pytest.raises(ConvertError, match="does not exist"):
        convert(vanishing, tmp_path / "out")
    copied(source, vanishing)
    convert(vanishing, tmp_path / "out")
    assert verify(tmp_path / "out").ok


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB, where mounting is allowed."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_small_disk_is_refused_from_the_plan(source: Path, small_disk: Path) -> None:
    with pytest.raises(ConvertError, match="not enough disk space"):
        convert(source, small_disk / "out")
    assert not (small_disk / "out").exists()


def test_a_disk_that_fills_up_midway(source: Path, small_disk: Path) -> None:
    """A real ENOSPC: the check beforehand is told that there is room."""
    with pytest.raises(ResumableError, match="No space left on device"):
        run(plan_conversion(source), LocalFiles(source), small_disk / "out", Work(), Silent(), spare_bytes=-(1 << 40))
    assert not (small_disk / "out" / "model_index.json").exists()
