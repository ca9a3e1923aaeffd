"""Many conversions in one process: what jobs say, what stops none of the others, retries, and the summary."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pipelines import copied, saved

from fp8_convert.converter import Batch, ConvertError, SettingsError, batch, convert
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.jobs.job import KEYS, read_jobs
from fp8_convert.converter.output.writing import sha256_at
from fp8_convert.converter.telling.progress import Silent

CLI = [sys.executable, "-W", "ignore", "-c", "from fp8_convert.converter.cli.commands import main; main()"]


def large(folder: Path) -> str:
    """A source whose conversion takes long enough to be met midway: a tokenizer's file of zeros is carried over."""
    source = copied(saved("wan22", max_shard_size="100KB"), folder)
    with open(source / "tokenizer" / "large.json", "wb") as file:
        file.truncate(200_000_000)
    return str(source)


def tree(folder: Path) -> dict[str, str]:
    """Digests of all files."""
    return {str(path.relative_to(folder)): sha256_at(path, str(path)) for path in folder.rglob("*") if path.is_file()}


def job(output: Path, name: str = "z_image", **settings: Any) -> dict[str, Any]:
    return {"source": str(saved(name)), "output": str(output), **settings}


def jsonl(path: Path, *jobs: dict[str, Any] | str | bytes) -> Path:
    lines = [json.dumps(one) if isinstance(one, dict) else one for one in jobs]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\r\n" for line in lines))
    return path


class Told(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.total, self.done = 0, 0

    def start(self, total: int, unit: str = "B") -> None:
        self.total = total

    def advance(self, count: int) -> None:
        self.done += count

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_outputs_are_those_of_single_conversions(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"compact": True}, {"weight_block_size": [16, 16]}, {"max_shard_size": "2MB"}]
    told = Told()
    done = batch([job(tmp_path / f"{n}", **some) for n, some in enumerate(settings)], progress=told)
    assert done.ok
    assert done.counts == {"converted": 4}
    assert (told.total, told.done) == (4, 4)
    assert [line[:17] for line in told.lines if line[0] == "["] == [f"[{n}/4] converted: " for n in range(1, 5)]
    for number, some in enumerate(settings):
        single = convert(saved("z_image"), tmp_path / "single" / str(number), **some)
        assert tree(tmp_path / str(number)) == tree(single.output)
        assert done.outcomes[number].result["snapshot_sha256"] == single.snapshot_sha256
    again = batch([job(tmp_path / f"{n}", **some) for n, some in enumerate(settings)])
    assert again.counts == {"already done": 4}


def test_a_bad_job_stops_no_other(tmp_path: Path) -> None:
    damaged = copied(saved("z_image"), tmp_path / "damaged")
    shard = next((damaged / "transformer").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    jobs = jsonl(
        tmp_path / "jobs.jsonl",
        job(tmp_path / "a"),
        "{not json",
        "",
        '["a list"]',
        {"source": str(saved("z_image"))},
        job(tmp_path / "b", compct=True),
        job(tmp_path / "c", token="hf_secret"),
        job(tmp_path / "d", activation_scheme="static"),
        job(tmp_path / "e", stream="yes"),
        job(tmp_path / "f", workers=0),
        job(tmp_path / "a" / "inside"),
        job(tmp_path / "g") | {"source": str(tmp_path / "nowhere")},
        job(tmp_path / "h") | {"source": str(damaged)},
        job(tmp_path),
        job(tmp_path / "last"),
        job(Path("~/i")),
        job(Path("nul\0")),
        job(saved("z_image") / "inside"),
        '{"source": "a", "source": "b", "output": "j"}',
        "[" * 200_000,
        '{"source": "a", "output": "\\ud800"}',
        b'{"source": "\xff"}',
    )
    done = batch(jobs)
    assert not done.ok
    assert [outcome.job.line for outcome in done.outcomes] == [1, 2, *range(4, 23)]
    assert {outcome.job.line for outcome in done.outcomes if outcome.status == "converted"} == {1, 15}
    said = {outcome.job.line: outcome.error for outcome in done.failed}
    for line, what in {
        2: "is not valid JSON",
        4: "no JSON object",
        5: "there is no output",
        6: "did you mean 'compact'",
        7: "a token belongs in no file",
        8: "--input-scales",
        9: "use true or false",
        10: "positive number",
        11: "not apart from that of line 1",
        12: "nowhere",
        13: shard.name,
        14: "not apart from that of line 1",
        16: "no shell reads it",
        17: "no shell reads it",
        18: "is inside it",
        19: "says 'source' twice",
        20: "nested too deeply",
        21: "half a surrogate pair",
        22: "not valid JSON in UTF-8",
    }.items():
        assert what in (said[line] or ""), said[line]
    assert "hf_secret" not in str(said)
    assert tree(tmp_path / "last") == tree(tmp_path / "a")
    assert not any((tmp_path / name).exists() for name in "bcdefgh")
    assert [outcome.attempts for outcome in done.outcomes] == [1, *[0] * 9, 1, 1, 0, 1, *[0] * 7]


def test_what_may_pass_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8_convert.converter.jobs import attempt
    from fp8_convert.converter.telling.errors import ResumableError

    calls: list[str] = []

    def flaky(source: str, output: str, **settings: Any) -> Any:
        calls.append(output)
        if calls.count(output) <= {"once": 1, "always": 99}.get(Path(output).name, 0):
            raise ResumableError("The disk is full.")
        return convert(source, output, **settings)

    monkeypatch.setattr(attempt, "convert", flaky)
    told = Told()
    names = ("once", "always", "never")
    done = batch([job(tmp_path / name) for name in names], retries=2, wait_s=0.01, progress=told)
    assert [outcome.attempts for outcome in done.outcomes] == [2, 3, 1]
    assert [outcome.status for outcome in done.outcomes] == ["converted", "failed", "converted"]
    assert done.failed[0].error == "The disk is full."
    assert sum(line.startswith("attempt ") for line in told.lines) == 3
    assert done.outcomes[1].hosts == (socket.gethostname(),) * 3
    assert list(done.lines())[1].endswith("(3 attempts)")
    assert tree(tmp_path / "once") == tree(tmp_path / "never")


def test_a_bug_in_one_job_is_told_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8_convert.converter.jobs import attempt

    def broken(source: str, output: str, **settings: Any) -> Any:
        if Path(output).name == "a":
            raise ZeroDivisionError("one\nover none")
        return convert(source, output, **settings)

    monkeypatch.setattr(attempt, "convert", broken)
    done = batch([job(tmp_path / "a"), job(tmp_path / "b")])
    assert [outcome.status for outcome in done.outcomes] == ["failed", "converted"]
    assert "ZeroDivisionError at " in (done.failed[0].error or "")
    assert "(one over none): a bug" in (done.failed[0].error or "")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = batch([job(tmp_path / "a"), job(tmp_path / "b", compact=True, device="cpu", force=True)], dry_run=True)
    assert done.counts == {"planned": 2}
    assert not list(tmp_path.iterdir())
    made = convert(saved("z_image"), tmp_path / "a")
    assert done.outcomes[0].result["bytes_after"] == made.bytes_after
    assert done.outcomes[0].result["bytes_before"] == made.bytes_before


def test_notes_are_told(tmp_path: Path) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    (source / "old.zip").touch()
    told = Told()
    jobs = [{"source": str(source), "output": str(tmp_path / "out")}]
    for dry_run in (True, False):
        told.lines.clear()
        assert "old.zip" in str(batch(jobs, dry_run=dry_run, progress=told).outcomes[0].result["notes"])
        assert sum("  note: " in line and "old.zip" in line for line in told.lines) == 1, told.lines


def test_the_command(tmp_path: Path) -> None:
    jobs = jsonl(tmp_path / "jobs.jsonl", job(tmp_path / "a"), job(tmp_path / "b", compct=True))
    run = CliRunner().invoke(main, ["batch", str(jobs), "--json"])
    assert run.exit_code == 1
    summary = json.loads(run.stdout)
    assert summary["counts"] == {"converted": 1, "failed": 1}
    assert [one["status"] for one in summary["jobs"]] == ["converted", "failed"]
    assert summary["jobs"][0]["result"]["snapshot_sha256"]
    assert "[1/2] failed: line 2" in run.stderr
    jobs = jsonl(jobs, job(tmp_path / "a"))
    run = CliRunner().invoke(main, ["batch", str(jobs), "-q"])
    assert run.exit_code == 0
    assert "1 job in " in run.stdout
    assert "1 already done" in run.stdout
    assert run.stderr == ""


def test_a_signal_stops_the_second_job_too(tmp_path: Path) -> None:
    """The first has ended, and with it what could not be stopped any more."""
    source = large(tmp_path / "large")
    jobs = jsonl(tmp_path / "jobs.jsonl", *[{"source": source, "output": name} for name in "abc"])
    command = [*CLI, "batch", str(jobs)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not (tmp_path / "b").exists():
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "stopped; run the same command again to resume." in err
    assert (tmp_path / "a" / "fp8_convert.json").exists()
    assert not (tmp_path / "b" / "fp8_convert.json").exists()
    assert not (tmp_path / "c").exists()


def test_words_in_the_wrong_place(tmp_path: Path) -> None:
    jobs = str(jsonl(tmp_path / "jobs.jsonl", job(tmp_path / "a")))
    for words, what in {
        ("--ray", jobs): f"Put {jobs} before --ray",
        (jobs, "--cpus-per-job", "4"): "pass --ray too",
        (jobs, "--ray", ""): "address of the Ray cluster is empty",
    }.items():
        run = CliRunner().invoke(main, ["batch", *words])
        assert run.exit_code in (1, 2)
        assert what in " ".join(run.stderr.split())
    assert not (tmp_path / "a").exists()


def test_files_and_arguments_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"none\.jsonl"):
        batch(tmp_path / "none.jsonl")
    with pytest.raises(ConvertError, match="has no jobs"):
        batch(jsonl(tmp_path / "jobs.jsonl"))
    with pytest.raises(ConvertError, match="The list has no jobs"):
        batch([])
    with pytest.raises(SettingsError, match="retries is -1"):
        batch([job(tmp_path / "a")], retries=-1)
    with pytest.raises(SettingsError, match="cpus_per_job is 0"):
        batch([job(tmp_path / "a")], cpus_per_job=0)


def test_the_result_at_a_prompt(tmp_path: Path) -> None:
    done = batch([job(tmp_path / "a"), {"output": "<b>"}])
    assert repr(done).startswith("<Batch 2 jobs in ")
    assert "<td>failed</td>" in done._repr_html_()


def test_every_argument_of_a_conversion_is_a_key() -> None:
    assert {"source", "output", "merge_lora", "target", "revision", "device", "shards"} <= set(KEYS)
    assert not {"progress", "quiet", "token"} & set(KEYS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=5),
    lambda some: st.lists(some, max_size=2),
)


@given(st.lists(st.dictionaries(st.sampled_from([*KEYS, "other"]), VALUES, max_size=2), min_size=1, max_size=4))
def test_whatever_jobs_say_they_are_read(odd: list[dict[str, Any]]) -> None:
    """Each is a job, or has a sentence about it: jobs that make sense but for one or two of their values."""
    given_jobs = [{"source": "a/b", "output": f"out{number}"} | some for number, some in enumerate(odd)]
    jobs = read_jobs(given_jobs)
    assert [one.line for one in jobs] == list(range(1, len(given_jobs) + 1))
    for one, stated in zip(jobs, given_jobs, strict=True):
        assert str(one).isprintable()
        assert one.problem is None or one.problem.endswith((".", "?"))
        if one.problem is None:
            said = {key: value for key, value in stated.items() if value is not None}
            assert {"source": one.source, "output": one.output, **one.settings} == said


def test_none_is_not_said_and_paths_are_paths(tmp_path: Path) -> None:
    (one,) = read_jobs([{"source": tmp_path / "a", "output": tmp_path / "b", "revision": None, "workers": None}])
    assert (one.problem, one.source, one.settings) == (None, str(tmp_path / "a"), {})
    assert read_jobs([{"source": "a", "output": None}])[0].problem


def test_a_batch_of_one_failure_has_bytes_of_none() -> None:
    done = batch([{"source": "x"}])
    assert isinstance(done, Batch)
    assert done.to_json()["bytes_before"] == 0
