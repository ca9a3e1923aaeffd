"""Batches on real Ray, on this machine: outputs, planted failures, killed workers and heads, what tasks declare."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipelines import copied, saved
from test_batching import CLI, job, jsonl, large, tree

from fp8_convert.converter import ConvertError, batch, convert, verify
from fp8_convert.converter.format.layout import RECORD_FILE, STAGING
from fp8_convert.converter.jobs import on_ray
from fp8_convert.converter.jobs.attempt import plan_job
from fp8_convert.converter.jobs.job import Job
from fp8_convert.converter.jobs.on_ray import Need
from fp8_convert.converter.output.capacity import memory_bound
from fp8_convert.converter.plan.recipe import tool_version

RAY = Path(sys.executable).with_name("ray")
WAIT_S = 120


@pytest.fixture(name="environment")
def _environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home folder of its own, where Ray keeps its token."""
    home = tmp_path_factory.mktemp("home")
    own = {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}  # not a minute
    return {**os.environ, **own}


def begun(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if found := what():
            return found
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


def stopped_writer_of(folder: Path) -> psutil.Process | None:
    """The worker that writes below `folder`, stopped; None if there is none."""
    for process in psutil.process_iter(["cmdline"]):
        if not (process.info["cmdline"] or [""])[0].startswith("ray::_in_folder"):
            continue
        process.suspend()
        if any(Path(file.path).is_relative_to(folder) for file in process.open_files()):
            return process
        process.resume()
    return None


def finished_below(folder: Path) -> list[Path]:
    """The outputs that are at their end: the record is there, and then what tells of a conversion under way is gone."""
    found = (path.parent for path in folder.glob(f"*/{RECORD_FILE}"))
    return [output for output in found if not (output / STAGING).exists()]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"compact": True},
    {"weight_block_size": [16, 16]},
    {"max_shard_size": "2MB"},
    {"components": ["text_encoder"]},
    {"components": ["transformer"]},
    {"read_back": True},
    {"device": "cpu", "workers": 2},
]


def test_twenty_jobs_with_failures_and_a_killed_worker(tmp_path: Path, environment: dict[str, str]) -> None:
    """The summary tells the truth, and outputs have the bytes of single conversions."""
    damaged = copied(saved("z_image"), tmp_path / "damaged")
    shard = next((damaged / "transformer").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    victim = {"source": large(tmp_path / "large"), "output": "out/victim"}
    jobs: list[Any] = [victim]
    for number, settings in enumerate(SETTINGS):
        jobs += [job(Path("out") / f"z{number}", **settings), job(Path("out") / f"q{number}", "qwen_image", **settings)]
    planted = [job(Path("out/typo"), compct=True), {"source": str(damaged), "output": "out/damaged"}, "{"]
    jobs = [*jobs[:5], planted[0], *jobs[5:9], planted[1], *jobs[9:], planted[2]]
    assert len(jobs) == 20
    command = [*CLI, "batch", str(jsonl(tmp_path / "jobs.jsonl", *jobs)), "--ray", "--cpus-per-job", "1", "--json"]
    run = begun(command, tmp_path, environment)
    with run:
        wait_for((tmp_path / "out" / "victim").exists, run)
        wait_for(lambda: stopped_writer_of(tmp_path / "out" / "victim"), run).kill()
        out, err = run.communicate(timeout=WAIT_S)
    assert run.returncode == 1
    summary = json.loads(out)
    assert summary["counts"] == {"converted": 17, "failed": 3}, err
    assert [one["line"] for one in summary["jobs"]] == [*range(1, 21)]
    failed = {one["line"]: one["error"] for one in summary["jobs"] if one["status"] == "failed"}
    assert [*failed] == [6, 11, 20]
    assert "did you mean 'compact'" in failed[6]
    assert shard.name in failed[11]
    assert [one["attempts"] for one in summary["jobs"]] == [2, *[1] * 4, 0, *[1] * 4, 1, *[1] * 8, 0]
    assert "attempt 1 of 3 on a machine that was lost, failed: line 1" in err
    assert err.count("/20] ") == 20
    for stated, told in zip(jobs, summary["jobs"], strict=True):
        if told["status"] == "failed":
            continue
        settings = {key: value for key, value in stated.items() if key not in ("source", "output")}
        single = convert(stated["source"], tmp_path / "single" / stated["output"], **settings)
        assert tree(tmp_path / stated["output"]) == tree(single.output)
        assert told["result"]["snapshot_sha256"] == single.snapshot_sha256
        assert told["hosts"] == [None] * (told["attempts"] - 1) + [socket.gethostname()]
        # What the task declared: the process, PyTorch and all, stays below it.
        assert told["result"]["peak_rss"] <= memory_bound(1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        Path(one["output"]).name for one in summary["jobs"] if one["status"] == "converted"
    }


@pytest.fixture(name="head")
def _head(environment: dict[str, str]) -> Iterator[tuple[str, psutil.Process]]:
    """A Ray cluster of this machine: its address, and the process whose descendants it is."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    start = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", "--include-dashboard=false"]
    with subprocess.Popen(
        [*start, "--disable-usage-stats"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        assert any("Ray runtime started" in line for line in running.stdout)
        yield f"127.0.0.1:{port}", psutil.Process(running.pid)
        kill_all(psutil.Process(running.pid))


def kill_all(head: psutil.Process) -> None:
    """Kill the head with all that belongs to it, as when its machine is lost."""
    for process in [*head.children(recursive=True), head]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_killed_head_leaves_nothing_half_done(
    tmp_path: Path, environment: dict[str, str], head: tuple[str, psutil.Process]
) -> None:
    source = {"source": large(tmp_path / "large")}
    jobs = jsonl(tmp_path / "jobs.jsonl", *[{**source, "output": f"out/{n}"} for n in range(4)])
    command = [*CLI, "batch", str(jobs)]
    run = begun([*command, "--ray", head[0], "--cpus-per-job", "1"], tmp_path, environment)
    with run:
        wait_for(lambda: finished_below(tmp_path / "out"), run)
        wait_for(lambda: stopped_writer_of(tmp_path / "out"), run)
        kill_all(head[1])
        run.communicate(timeout=WAIT_S)  # Ray ends it
    assert run.returncode == 1
    whole = finished_below(tmp_path / "out")
    assert 0 < len(whole) < 4
    assert all(verify(folder).ok for folder in whole)
    again = subprocess.run([*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    summary = json.loads(again.stdout)
    assert summary["counts"] == {"already done": len(whole), "converted": 4 - len(whole)}
    single = convert(source["source"], tmp_path / "single")
    assert all(tree(tmp_path / "out" / str(number)) == tree(single.output) for number in range(4))


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 MB, where mounting is allowed."""
    mount = tmp_path / "disk"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=300m", "tmpfs"]
    if subprocess.run(["mount", *options, str(mount)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_jobs_that_fill_the_disk_leave_room_for_each_other(
    tmp_path: Path, environment: dict[str, str], disk: Path
) -> None:
    """Each fits alone. At the same time both would meet a full disk midway; one after the other, one is refused."""
    source = large(tmp_path / "large")
    jobs = jsonl(tmp_path / "jobs.jsonl", *[{"source": source, "output": name} for name in ("a", "b")])
    command = [*CLI, "batch", str(jobs), "--ray", "--cpus-per-job", "1", "--json"]
    run = subprocess.run(command, cwd=disk, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    summary = json.loads(run.stdout)
    assert summary["counts"] == {"converted": 1, "failed": 1}, run.stderr
    for told in summary["jobs"]:
        output = disk / told["output"]
        assert told["attempts"] == 1
        if told["status"] == "converted":
            assert verify(output).ok
        else:
            assert "not enough disk space" in told["error"]
            assert not output.exists()
    again = subprocess.run(command, cwd=disk, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert json.loads(again.stdout)["counts"] == {"already done": 1, "failed": 1}, again.stderr


def test_a_cluster_that_does_not_answer(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run(
        [*CLI, "batch", str(jsonl(tmp_path / "jobs.jsonl", job(tmp_path / "a"))), "--ray", "127.0.0.1:1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert run.returncode == 1
    assert "error: No Ray cluster answers at 127.0.0.1:1" in run.stderr
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConvertError, match=r"pip install 'fp8-convert\[ray\]'"):
        batch([job(tmp_path / "a")], ray=True)


def test_what_a_task_declares() -> None:
    need = Need(cpus=2, memory=10**9, disk=5 * 10**9, gpus=1)
    small, large_one = {"CPU": 2.0, "memory": 2e9, "GPU": 1.0}, {"CPU": 64.0, "memory": 1e8}
    assert need.options([small]) == {"num_cpus": 2, "memory": 10**9, "num_gpus": 1, "resources": {}}
    assert need.options([small, {"disk_mb": 1e5}])["resources"] == {"disk_mb": 5000}
    assert need.options([{"disk_mb": 7.0}])["resources"] == {
        "disk_mb": 7
    }  # its conversion will say that it is too little
    assert need.options([{"disk_mb": 0.0}])["resources"] == {}
    assert need.missing([large_one, small]) is None
    assert need.missing([large_one]) == "2 CPUs, 1.00 GB of memory, 1 GPU"
    assert Need(4, 10**9).missing([small]) == "4 CPUs, 1.00 GB of memory"


def test_more_than_any_machine_has_is_refused(tmp_path: Path, environment: dict[str, str]) -> None:
    jobs = jsonl(tmp_path / "jobs.jsonl", job(tmp_path / "a"))
    command = [*CLI, "batch", str(jobs), "--ray", "--cpus-per-job", "1000"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert run.returncode == 1
    assert "error: A job takes 1000 CPUs, " in run.stderr
    assert "pass --cpus-per-job" in run.stderr


def test_a_worker_of_another_kind_says_so(tmp_path: Path) -> None:
    def found(version: str, folder: Path) -> str:
        outcome = on_ray._in_folder(version, str(folder), plan_job, Job(1, "a", "b"))
        assert (outcome.status, outcome.again, outcome.hosts) == ("failed", False, (socket.gethostname(),))
        return outcome.error or ""

    assert "let machines share it" in found(tool_version(), tmp_path / "gone")
    assert "install the same one everywhere" in found("0.0.1", tmp_path)


def test_a_worker_that_lacks_the_code_says_so(tmp_path: Path, environment: dict[str, str]) -> None:
    """As with another fp8-convert than here: what is to run cannot be imported there."""
    code = """
import os, pathlib
pathlib.Path("other.py").write_text("def attempt(job): ...")
from other import attempt
from fp8_convert.converter.jobs.job import Job
from fp8_convert.converter.jobs.on_ray import Need, OnRay
os.remove("other.py")
place = OnRay(None, 1, False, None)
print(place._conversion({}, 0).cpus, place._conversion({"workers": 4}, 0).cpus)
place._submit(Job(1, "a", "b"), attempt, Need(1, 10**8))
(outcome,) = place.finished(60)
place.close()
print(outcome.again, outcome.error)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    declared, said = run.stdout.split("\n", 1)
    assert declared == "1 4"
    assert said.startswith("False its worker could not begin it ("), run
    assert "install the same fp8-convert everywhere" in run.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_ray_and_leaves_what_can_be_taken_up(
    tmp_path: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    jobs = jsonl(tmp_path / "jobs.jsonl", {"source": large(tmp_path / "large"), "output": "out/a"})
    command = [*CLI, "batch", str(jobs)]
    run = begun([*command, "--ray", "--cpus-per-job", "1"], tmp_path, environment)
    with run:
        worker = wait_for(lambda: stopped_writer_of(tmp_path / "out"), run)
        below = psutil.Process(run.pid).children(recursive=True)
        worker.resume()
        run.send_signal(number)
        _, err = run.communicate(timeout=WAIT_S)
    assert run.returncode == 130
    assert "stopped; run the same command again to resume." in err
    _, alive = psutil.wait_procs(below, timeout=WAIT_S)
    assert not alive
    assert not (tmp_path / "out" / "a" / "fp8_convert.json").exists()
    again = subprocess.run([*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert json.loads(again.stdout)["counts"] == {"converted": 1}
    assert verify(tmp_path / "out" / "a").ok
