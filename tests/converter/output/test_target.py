"""The output folder: nothing is written through links or over what is not ours, a finished run stays, bytes repeat."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from hub_server import running_hub
from pipelines import copied, saved

from fp8_convert.converter import ConvertError, ResumableError, convert, verify
from fp8_convert.converter.format.layout import STAGING
from fp8_convert.converter.output import run
from fp8_convert.converter.output.target import Target
from fp8_convert.converter.plan.recipe import parse_size
from fp8_convert.converter.plan.settings import Settings
from fp8_convert.converter.stream import component_stream
from fp8_convert.converter.telling.progress import Silent

DIT = "transformer/diffusion_pytorch_model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def output(converted: Path, tmp_path: Path) -> Path:
    """A finished conversion of the tiny Z-Image that the test may change."""
    return Path(shutil.copytree(converted, tmp_path / "out"))


# Links, and what is not ours


@pytest.mark.parametrize("link", ["text_encoder", "transformer", "tokenizer", STAGING])
def test_nothing_is_written_through_a_linked_folder(output: Path, tmp_path: Path, link: str) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    (source / STAGING).mkdir()
    shutil.rmtree(output / link, ignore_errors=True)
    (output / link).symlink_to(source / link)
    before = contents(source)
    with pytest.raises(ConvertError, match=f"{link} is a symbolic link"):
        convert(source, output, force=True)
    assert contents(source) == before


def test_a_link_inside_the_staging_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / STAGING).mkdir(parents=True)
    (tmp_path / "out" / STAGING / "new").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConvertError, match=r"new is a symbolic link; remove the folder"):
        convert(saved("z_image"), tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_linked_file_is_replaced_and_its_target_is_not_touched(output: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("kept")
    (output / "model_index.json").unlink()
    (output / "model_index.json").symlink_to(kept)
    convert(saved("z_image"), output, force=True)
    assert kept.read_text() == "kept"
    assert verify(output).ok


@pytest.mark.parametrize("path", ["model_index.json", "fp8_convert.json", DIT])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_removed(output: Path, path: str) -> None:
    (output / path).unlink()
    (output / path).mkdir()
    before = contents(output)
    with pytest.raises(ConvertError, match="is a folder, and a file of the output goes there; remove it"):
        convert(saved("z_image"), output, force=True)
    assert contents(output) == before


def test_a_file_in_the_place_of_a_folder_is_refused(output: Path) -> None:
    shutil.rmtree(output / "transformer")
    (output / "transformer").write_text("mine")
    with pytest.raises(ConvertError, match="transformer is not a folder"):
        convert(saved("z_image"), output, force=True)
    assert (output / "transformer").read_text() == "mine"


@pytest.mark.parametrize("name", ["README.md", "model_index.json", "notes/thesis.txt"])
def test_files_put_beside_an_unfinished_conversion_are_refused(tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    stop_before_the_end(output)
    mine = output / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ConvertError, match=f"holds {name}, which fp8-convert did not write there"):
        convert(saved("z_image"), output)
    assert mine.read_text() == "mine"
    mine.unlink()
    assert convert(saved("z_image"), output).resumed_shards > 0
    assert verify(output).ok


@pytest.mark.parametrize("again", ["z_image", "qwen_image"])
@pytest.mark.parametrize("name", ["README.md", "vae/config.json", DIT])
def test_a_users_file_with_the_name_of_a_staged_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, again: str
) -> None:
    """Journalled is not renamed: what stands in the folder meanwhile is somebody else's."""
    source, output = with_readme(tmp_path / "source"), tmp_path / "out"
    with monkeypatch.context() as stopped:
        stopped.setattr(Target, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, output)
    assert (output / STAGING / "new" / name).is_file()
    mine = output / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ConvertError, match=f"holds {name}, which fp8-convert did not write there; move what you need"):
        convert(source if again == "z_image" else saved(again), output)
    assert mine.read_text() == "mine"
    mine.unlink()
    result = convert(source, output)
    assert result.resumed_shards == len(result.plan.shards)
    assert verify(output, source=source).ok


@pytest.mark.parametrize("name", ["notes.txt", "new/notes.txt", "drafts/one.txt"])
def test_a_staging_folder_that_no_conversion_left_is_refused(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "out" / STAGING / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ConvertError, match=f"holds {STAGING}/{name}, which fp8-convert did not write there; move what"):
        convert(saved("z_image"), tmp_path / "out")
    assert contents(tmp_path / "out") == {f"{STAGING}/{name}": b"mine"}


def test_a_users_file_in_the_staging_folder_of_a_conversion_is_refused(tmp_path: Path) -> None:
    stop_before_the_end(tmp_path / "out")
    mine = tmp_path / "out" / STAGING / "notes.txt"
    mine.write_text("mine")
    with pytest.raises(ConvertError, match=rf"holds {STAGING}/notes\.txt, which fp8-convert did not write there"):
        convert(saved("z_image"), tmp_path / "out")
    assert mine.read_text() == "mine"
    mine.unlink()
    assert convert(saved("z_image"), tmp_path / "out").resumed_shards > 0
    assert not mine.parent.exists()


def test_a_users_file_that_comes_while_a_conversion_runs_is_refused(tmp_path: Path) -> None:
    source, output = with_readme(tmp_path / "source"), tmp_path / "out"

    class Writing(Silent):
        def close(self) -> None:
            (output / "README.md").write_text("mine")

    with pytest.raises(ResumableError, match=r"holds README\.md, which fp8-convert did not write there; move it away"):
        convert(source, output, progress=Writing())
    assert (output / "README.md").read_text() == "mine"
    (output / "README.md").unlink()
    assert convert(source, output).resumed_shards > 0
    assert verify(output, source=source).ok


def test_a_file_that_was_edited_after_it_was_renamed_is_refused(tmp_path: Path) -> None:
    source, output = with_readme(tmp_path / "source"), tmp_path / "out"

    class Killed(Silent):
        def finishing(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, output, progress=Killed())
    (output / "README.md").write_text("mine")
    with pytest.raises(ConvertError, match=r"holds README\.md, which fp8-convert did not write there"):
        convert(source, output)
    assert (output / "README.md").read_text() == "mine"
    (output / "README.md").unlink()
    convert(source, output)
    assert verify(output, source=source).ok


def with_readme(folder: Path) -> Path:
    source = copied(saved("z_image"), folder)
    (source / "README.md").write_text("The source's.")
    return source


def stop(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_what_is_not_ours_stays_under_force(output: Path) -> None:
    (output / "thesis.txt").write_text("mine")
    before = contents(output)
    with pytest.raises(ConvertError, match=r"holds thesis\.txt, which fp8-convert did not write there"):
        convert(saved("z_image"), output, force=True)
    assert contents(output) == before


def stop_before_the_end(output: Path, source: Path | None = None, **settings: object) -> None:
    """Run a conversion until all its shards are done, and no further."""

    class Stopping(Silent):
        def close(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source or saved("z_image"), output, progress=Stopping(), **settings)  # type: ignore[arg-type]


def test_stale_files_of_an_interrupted_replacement_go_with_a_third_recipe(tmp_path: Path) -> None:
    """Killed while it published, then run with other settings: what the first run left is removed, not forgotten."""
    output = tmp_path / "out"
    convert(saved("qwen_image", max_shard_size="400KB"), output)

    class Killed(Silent):
        def finishing(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(saved("z_image", max_shard_size="2MB"), output, force=True, progress=Killed())
    stop_before_the_end(output)  # which drops what the killed run had staged, and is stopped in turn
    convert(saved("z_image"), output, ignored_layers=["layers.0"])
    convert(saved("z_image"), tmp_path / "fresh", ignored_layers=["layers.0"])
    assert contents(output) == contents(tmp_path / "fresh")
    assert verify(output).ok


# A source that changes


def rewrite(file: Path) -> None:
    """Other weights in a file of the same size: every BF16 gets one bit more in its exponent."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + 1 :: 2] = bytes(b ^ 1 for b in data[start + 1 :: 2])
    file.write_bytes(data)


def shards_of_one_group(source: Path) -> list[Path]:
    """The source shards over which a fusion group is spread, in order."""
    plan = convert(source, source.with_name("planned")).plan
    group = next(g for s in plan.shards for g in s.schedule.measured)
    return [source / s.source.path for s in plan.shards if group in s.schedule.measured]


@pytest.fixture
def spread(tmp_path: Path) -> Path:
    """A source whose fusion groups have members in several shards."""
    return copied(saved("z_image", max_shard_size="300KB"), tmp_path / "spread")


def test_a_sibling_that_changed_between_two_runs_is_not_mixed_in(
    spread: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_, last = shards_of_one_group(spread)
    output = tmp_path / "out"
    write_shard = run._write_shard

    def until_the_last(stream: run.ShardStream, *arguments: object) -> object:
        if stream.source.path == last:
            raise ResumableError("the disk is full")
        return write_shard(stream, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as full:
        full.setattr(run, "_write_shard", until_the_last)
        with pytest.raises(ResumableError, match="the disk is full"):
            convert(spread, output)
    assert first.relative_to(spread).as_posix() in (output / STAGING / "journal.jsonl").read_text()
    rewrite(last)
    convert(spread, output)
    convert(spread, tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh")
    assert verify(output, source=spread).ok


def test_a_sibling_that_changes_after_it_was_measured_stops_the_run(
    spread: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, last = shards_of_one_group(spread)
    measured = component_stream.measure

    def then_rewritten(*arguments: Any) -> object:
        found = measured(*arguments)
        if not done:
            done.append(1)
            rewrite(last)
        return found

    done: list[int] = []
    with monkeypatch.context() as changing:
        changing.setattr(component_stream, "measure", then_rewritten)
        with pytest.raises(ResumableError, match=f"{last.name} changed while it was read; run again"):
            convert(spread, tmp_path / "out")
    convert(spread, tmp_path / "out")
    convert(spread, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_source_that_changes_after_its_conversion_stops_the_run(spread: Path, tmp_path: Path) -> None:
    first = shards_of_one_group(spread)[0]

    class Rewriting(Silent):
        def close(self) -> None:
            rewrite(first)

    with pytest.raises(ResumableError, match=f"{first.name} changed while it was read"):
        convert(spread, tmp_path / "out", progress=Rewriting())
    assert not (tmp_path / "out" / "model_index.json").exists()
    convert(spread, tmp_path / "out")
    assert verify(tmp_path / "out", source=spread).ok


def test_a_touched_source_keeps_what_is_done(tmp_path: Path) -> None:
    """Other times and the same bytes: the digest decides."""
    source = copied(saved("z_image", max_shard_size="2MB"), tmp_path / "source")
    stop_before_the_end(tmp_path / "out", source)
    for shard in source.rglob("*.safetensors"):
        os.utime(shard, ns=(1, 1))
    result = convert(source, tmp_path / "out")
    assert result.resumed_shards == len(result.plan.shards)


# The same command again


def test_a_finished_run_repeated_is_done_already(output: Path) -> None:
    before = contents(output)
    again = convert(saved("z_image"), output)
    assert again.already_done
    assert again.to_json()["already_done"]
    assert again.snapshot_sha256 == json.loads((output / "fp8_convert.json").read_text())["record_sha256"]
    assert contents(output) == before
    assert convert(saved("z_image"), output, check=True).already_done


def test_another_recipe_says_what_differs(output: Path) -> None:
    with pytest.raises(ConvertError, match=r"made otherwise \(compact was False and is now True\); pass --force"):
        convert(saved("z_image"), output, compact=True)


def test_another_source_says_what_differs(output: Path, tmp_path: Path) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    rewrite(source / DIT)
    with pytest.raises(ConvertError, match=rf"made otherwise \(its source's {DIT} has changed\)"):
        convert(source, output)
    rewrite(source / DIT)
    (source / "tokenizer" / "chat_template.jinja").write_text("{# another #}")
    with pytest.raises(ConvertError, match=r"its source's tokenizer/chat_template\.jinja has changed"):
        convert(source, output)


def test_a_config_of_the_source_that_changed_says_so(output: Path, tmp_path: Path) -> None:
    """What is written for a converted component is no copy of a source's file."""
    source = copied(saved("z_image"), tmp_path / "source")
    assert convert(source, output).already_done
    config = source / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    with pytest.raises(ConvertError, match=r"its source gives another text_encoder/config\.json now"):
        convert(source, output)
    convert(source, output, force=True)
    assert json.loads((output / "text_encoder" / "config.json").read_text())["rms_norm_eps"] == 0.5


def test_a_source_with_other_sidecars_says_so(tmp_path: Path) -> None:
    source, output = with_readme(tmp_path / "source"), tmp_path / "out"
    convert(source, output)
    (source / "README.md").unlink()
    with pytest.raises(ConvertError, match=r"made otherwise \(its source had README\.md\); pass --force"):
        convert(source, output)
    (source / "LICENSE").write_text("new")
    with pytest.raises(ConvertError, match=r"\(its source had no LICENSE; its source had README\.md\)"):
        convert(source, output)
    convert(source, output, force=True)
    assert not (output / "README.md").exists()


def test_another_version_says_so(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("finished", "plan.recipe"):
        monkeypatch.setattr(f"fp8_convert.converter.{module}.tool_version", lambda: "9.9")
    with pytest.raises(ConvertError, match=r"by version \S+, and this is 9\.9"):
        convert(saved("z_image"), output)


def test_a_finished_run_that_was_damaged(output: Path) -> None:
    file = output / DIT
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert convert(saved("z_image"), output).already_done  # sizes alone are looked at
    with pytest.raises(ConvertError, match=f"it is damaged: {DIT} is not as it was written"):
        convert(saved("z_image"), output, check=True)
    file.unlink()
    with pytest.raises(ConvertError, match=f"it is damaged: {DIT} is not as it was written"):
        convert(saved("z_image"), output)
    convert(saved("z_image"), output, force=True)
    assert verify(output).ok


def test_a_users_file_in_a_finished_run_is_no_damage(output: Path) -> None:
    mine = output / "transformer" / "notes.txt"
    mine.write_text("mine")
    assert convert(saved("z_image"), output).already_done
    told = r"holds transformer/notes\.txt, which fp8-convert did not write there; move what you need away"
    with pytest.raises(ConvertError, match=told):
        convert(saved("z_image"), output, check=True)
    (output / DIT).unlink()
    with pytest.raises(ConvertError, match=told):  # and not --force, which would refuse it
        convert(saved("z_image"), output)
    assert mine.read_text() == "mine"


def test_the_same_commit_of_a_hub_repository_is_not_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("org/model", saved("z_image"))
        convert("org/model", tmp_path / "out", cache_dir=tmp_path / "cache")
        assert convert("org/model", tmp_path / "out", cache_dir=tmp_path / "other").already_done
        assert not list((tmp_path / "other").rglob("*.safetensors"))
        other = copied(saved("z_image"), tmp_path / "other-source")
        rewrite(other / DIT)
        hub.add_repo("org/model", other)
        with pytest.raises(ConvertError, match=r"its source's commit was \w+ and is now \w+"):
            convert("org/model", tmp_path / "out", cache_dir=tmp_path / "cache")


# The same archive


def archive_sha256(folder: Path) -> str:
    """The digest of a tar of the folder, sorted by name, as image layers are made."""
    tar = folder.with_name(folder.name + ".tar")

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(folder, ".", filter=anonymous)
    return hashlib.sha256(tar.read_bytes()).hexdigest()


def test_two_conversions_give_the_same_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(saved("z_image"), tmp_path / "one")
    time.sleep(1.1)  # tar counts seconds
    stop_before_the_end(tmp_path / "two")
    convert(saved("z_image"), tmp_path / "two")
    assert archive_sha256(tmp_path / "one") == archive_sha256(tmp_path / "two")
    times = {int(p.stat().st_mtime) for p in [tmp_path / "one", *(tmp_path / "one").rglob("*")]}
    assert times == {315532800}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    convert(saved("z_image"), tmp_path / "three")
    assert {int(p.stat().st_mtime) for p in [tmp_path / "three", *(tmp_path / "three").rglob("*")]} == {1700000000}
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ConvertError, match="SOURCE_DATE_EPOCH is 'yesterday'"):
        convert(saved("z_image"), tmp_path / "four")


# Sizes of files


def test_max_shard_size_cuts_the_output(tmp_path: Path) -> None:
    source = saved("z_image", max_shard_size="3MB")
    convert(source, tmp_path / "whole")
    result = convert(source, tmp_path / "cut", max_shard_size="700KB")
    files = sorted((tmp_path / "cut" / "transformer").glob("*.safetensors"))
    assert len(files) > len(list((tmp_path / "whole" / "transformer").glob("*.safetensors")))
    assert max(f.stat().st_size for f in files) <= 700_000
    assert [f.name for f in files] == [
        f"diffusion_pytorch_model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert tensors_of(tmp_path / "cut") == tensors_of(tmp_path / "whole")
    assert result.bytes_after == sum(p.stat().st_size for p in (tmp_path / "cut").rglob("*.safetensors"))
    assert verify(tmp_path / "cut", source=source).ok
    assert convert(source, tmp_path / "cut", max_shard_size=700_000).already_done


def test_a_cut_conversion_resumes_and_stops_at_damage(tmp_path: Path) -> None:
    stop_before_the_end(tmp_path / "out", max_shard_size="700KB")
    damaged = sorted((tmp_path / "out" / STAGING / "new" / "transformer").glob("*.safetensors"))[1]
    damaged.unlink()
    result = convert(saved("z_image"), tmp_path / "out", max_shard_size="700KB")
    assert result.resumed_shards == len(result.plan.shards) - 1
    assert verify(tmp_path / "out", source=saved("z_image")).ok


def test_a_cut_file_that_differs_is_named(tmp_path: Path) -> None:
    convert(saved("z_image"), tmp_path / "out", max_shard_size="700KB")
    file = sorted((tmp_path / "out" / "transformer").glob("*.safetensors"))[2]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = verify(tmp_path / "out", source=saved("z_image")).findings
    assert {f.path for f in found} == {file.relative_to(tmp_path / "out").as_posix()}
    assert any("differs from what the source gives" in f.problem for f in found)


def tensors_of(folder: Path) -> dict[str, bytes]:
    from reference import read_safetensors

    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.parent.name}/{n}": t[2] for f in files for n, t in read_safetensors(f).items()}


@pytest.mark.parametrize(
    ("size", "count"),
    [("5GB", 5 * 10**9), ("1.5 GB", 15 * 10**8), ("200kb", 200_000), ("7", 7), (12, 12), (None, None)],
)
def test_sizes_are_read_as_diffusers_writes_them(size: int | str | None, count: int | None) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["", "0", "-5GB", "5 apples", "5GiB", "1e9", 0, -1, "0.1", "5GBB", "9" * 400])
def test_sizes_that_are_none(size: int | str) -> None:
    with pytest.raises(ConvertError, match=r"^max_shard_size is .*; use a size such as 5GB"):
        Settings.read({"max_shard_size": size})


# Stopping


SLOW_END = """
import sys, time
from fp8_convert.converter.output import publishing
rename = publishing._rename
def slowly(folder, new, paths, mtime):
    rename(folder, new, paths, mtime)
    if "fp8_convert.json" in paths:
        print("renamed", flush=True)
        time.sleep(1)
publishing._rename = slowly
from fp8_convert.converter.cli.commands import main
main()
"""


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_last_rename_comes_too_late(tmp_path: Path, number: signal.Signals) -> None:
    process = started(SLOW_END, saved("z_image"), "-o", tmp_path / "out")
    assert process.stdout is not None
    assert process.stdout.readline() == "renamed\n"
    process.send_signal(number)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.startswith("wrote ")
    assert "stopped" not in complained
    assert verify(tmp_path / "out").ok


SLOW_CLEANUP = """
import sys, time
from fp8_convert.converter.output import run
from fp8_convert.converter.output.target import Target
from fp8_convert.converter.output import target
write, leave = run._write_shard, target.Target.__exit__
run._write_shard = lambda *a: (print("writing", flush=True), time.sleep(0.2), write(*a))[2]
def slowly(self, *a):
    print("cleaning", flush=True)
    try:
        time.sleep(60)
    except BaseException:  # as cleanup may that goes on whatever happens
        time.sleep(60)
    leave(self, *a)
target.Target.__exit__ = slowly
from fp8_convert.converter.cli.commands import main
main()
"""


def test_a_second_signal_ends_the_cleanup_without_a_traceback(tmp_path: Path) -> None:
    process = started(SLOW_CLEANUP, saved("z_image"), "-o", tmp_path / "out")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    assert "cleaning\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGINT)
    _, complained = process.communicate(timeout=20)
    assert process.returncode == 130
    assert complained.count("stopped; run the same command again to resume.") == 1
    assert "Traceback" not in complained
    convert(saved("z_image"), tmp_path / "out")
    assert verify(tmp_path / "out").ok


def test_children_heed_signals_where_the_parent_ignores_them() -> None:
    """The suite's own precaution: it is to pass in a background shell too."""
    code = "import conftest, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    shown = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    child = subprocess.run(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-W", "ignore", "-c", code, shown],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout == "True\n"
