"""Conversion from a Hub served on loopback, with the real huggingface_hub client."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from hub_server import Fault, HubServer, running_hub
from pipelines import copied, saved
from safetensors.torch import load_file, save_file

from fp8_convert.converter import ConvertError, ResumableError, convert, plan_conversion, verify
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.cli.demo import build_tiny_pipeline
from fp8_convert.converter.output.run import run
from fp8_convert.converter.output.work import Work
from fp8_convert.converter.plan import planning
from fp8_convert.converter.snapshot import locate
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.converter.snapshot.files import file_stat
from fp8_convert.converter.snapshot.hub import HubFiles, translated
from fp8_convert.converter.snapshot.locate import describe_source, open_files
from fp8_convert.converter.stream.supply import StreamedSupply
from fp8_convert.converter.telling.progress import Silent

REPO = "Tongyi-MAI/Z-Image-Turbo"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with what Hub repositories carry beside it: pickles, duplicates, pictures."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    build_tiny_pipeline(folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(weights, folder / "z_image_single_file.safetensors")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "LICENSE").write_text("a licence")
    (folder / "README.md").write_text("a card")
    (folder / "assets").mkdir()
    (folder / "assets" / "sample.png").write_bytes(b"png")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path / "home") as server:
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weight_bytes(folder: Path) -> int:
    return sum(c.stat().st_size for c in folder.glob("*/*.safetensors") if ".fp16." not in c.name)


def test_an_id_is_described_and_planned_once(
    hub: HubServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(REPO, tiny)
    calls: list[str] = []
    for module, name in ((locate, "describe"), (planning, "make_plan"), (planning, "module_map")):
        counted = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=counted, **k: (calls.append(n), f(*a, **k))[1])
    convert(REPO, tmp_path / "out")
    assert calls.count("describe") == calls.count("make_plan") == 1
    assert calls.count("module_map") == 2  # transformer and text_encoder, each built once


def test_a_download_that_is_cut_short_is_refused_before_the_work(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, tiny)
    convert(REPO, tmp_path / "out")
    (weights,) = (tmp_path / "home").rglob("snapshots/*/transformer/*.safetensors")
    os.truncate(weights.resolve(), weights.stat().st_size - 4)
    with pytest.raises(ConvertError, match=r"transformer/diffusion_pytorch_model\.safetensors in .* is truncated"):
        convert(REPO, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_by_id_equals_by_folder(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, tiny)
    convert(REPO, tmp_path / "by-id")
    convert(tiny, tmp_path / "by-folder")
    by_id, by_folder = contents(tmp_path / "by-id"), contents(tmp_path / "by-folder")
    record = json.loads(by_id.pop("fp8_convert.json"))
    del by_folder["fp8_convert.json"]
    assert by_id == by_folder
    source = {"repo": REPO, "commit": hub.commit(REPO), "pipeline": "ZImagePipeline"}
    assert record["source"] == source | {"base_repo": None, "base_commit": None}
    assert record["recipe"]["manifest"] == "z-image"


def test_downloads_only_what_it_needs(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, tiny)
    convert(REPO, tmp_path / "out")
    asked = {r.file for r in hub.log if r.route != "api" and r.method == "GET"}
    assert not [f for f in asked if f.endswith((".bin", ".png")) or ".fp16." in f or f.startswith("z_image_single")]
    assert {"LICENSE", "README.md", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"} <= asked
    assert hub.bytes_sent(".safetensors") < weight_bytes(tiny) * 1.05
    assert (tmp_path / "out" / "LICENSE").read_text() == "a licence"


def test_dry_run_transfers_headers_alone(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, tiny)
    plan = plan_conversion(REPO)
    assert hub.bytes_sent(".safetensors") < 0.05 * weight_bytes(tiny)
    assert plan.to_json()["components"] == plan_conversion(tiny).to_json()["components"]
    assert plan.bytes_to_write == plan_conversion(tiny).bytes_to_write
    result = CliRunner().invoke(main, [REPO, "--dry-run", "--json"])
    assert json.loads(result.stdout)["commit"] == hub.commit(REPO)


def test_revision(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_tiny_pipeline(other, seed=1)
    hub.add_repo(REPO, tiny)
    hub.add_repo(REPO, other, revision="v2")
    convert(REPO, tmp_path / "by-branch", revision="v2")
    convert(REPO, tmp_path / "by-commit", revision=hub.commit(REPO, "v2"))
    convert(other, tmp_path / "by-folder")
    path = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "by-branch" / path).read_bytes() == (tmp_path / "by-folder" / path).read_bytes()
    assert contents(tmp_path / "by-branch") == contents(tmp_path / "by-commit")


def test_offline_from_the_cache(hub: HubServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, tiny)
    convert(REPO, tmp_path / "online")
    hub.clear_log()
    convert(REPO, tmp_path / "local-only", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    convert(REPO, tmp_path / "offline")
    assert hub.log == []
    assert contents(tmp_path / "online") == contents(tmp_path / "local-only") == contents(tmp_path / "offline")


def test_variant(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, tiny)
    convert(REPO, tmp_path / "out", variant="fp16")
    asked = {r.file for r in hub.log if r.route == "cdn" and r.method == "GET"}
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in asked
    assert "vae/diffusion_pytorch_model.safetensors" in asked  # has no fp16 variant
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()


def test_token_reaches_the_hub_and_not_the_cdn(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, tiny, private_token="hf_secret")
    plan_conversion(REPO, options=HubAccess(token="hf_secret"))
    assert {r.authorization for r in hub.log if r.route != "cdn"} == {"Bearer hf_secret"}
    assert {r.authorization for r in hub.log if r.route == "cdn"} == {None}


SECRET = "hf_s3cret"


@pytest.mark.parametrize("token", [f"{SECRET}\r\n", f" {SECRET}\n", f"{SECRET}\r"])
@pytest.mark.parametrize("where", ["option", "HF_TOKEN", "file"])
def test_token_with_the_line_end_of_its_file(
    hub: HubServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, where: str
) -> None:
    hub.add_repo(REPO, tiny, private_token=SECRET)
    options = store_token(token, where, tmp_path, monkeypatch)
    result = CliRunner().invoke(main, [REPO, "--dry-run", "--json", *options])
    assert result.exit_code == 0, result.stderr
    assert {r.authorization for r in hub.log if r.route != "cdn"} == {f"Bearer {SECRET}"}


@pytest.mark.parametrize(
    "token",
    [f"{SECRET}\x01x", f"{SECRET} {SECRET}", f"{SECRET}é", f"{SECRET}\0", f"\ufeff{SECRET}", f"{SECRET}\x80"],
    ids=ascii,
)
@pytest.mark.parametrize("where", ["option", "HF_TOKEN", "file"])
def test_token_that_no_header_can_carry(
    hub: HubServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, where: str
) -> None:
    """The client's own error has the token in it."""
    if where == "HF_TOKEN" and "\0" in token:
        pytest.skip("no environment can hold it")
    hub.add_repo(REPO, tiny)
    options = store_token(token, where, tmp_path, monkeypatch)
    result = CliRunner().invoke(main, [REPO, "--dry-run", *options])
    assert result.exit_code == 1, result.exception
    assert result.stderr.startswith("error: The Hub token")
    assert result.stderr.count("\n") == 1
    assert "s3cret" not in result.output + result.stderr
    assert hub.log == []


def store_token(token: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a token where the client finds it; returns the options that name it."""
    if where == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", token)
    elif where == "file":
        (tmp_path / "home").mkdir(exist_ok=True)
        (tmp_path / "home" / "token").write_bytes(token.encode())
    return ["--token", token] if where == "option" else []


def test_token_file_that_is_no_text(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, tiny)
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_bytes(b"hf_s3cret\xff\xfe")
    with pytest.raises(ConvertError, match=r"The Hub token of this machine .* is not text; log in") as caught:
        plan_conversion(REPO)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))
    plan_conversion(REPO, options=HubAccess(token=False))
    plan_conversion(REPO, options=HubAccess(token="hf_other"))


def test_token_that_is_empty(hub: HubServer, tiny: Path) -> None:
    """Such as a secret that a CI job does not have."""
    hub.add_repo(REPO, tiny)
    result = CliRunner().invoke(main, [REPO, "--dry-run", "--token", ""])
    assert (result.exit_code, result.stderr) == (1, "error: The Hub token is empty; pass one, or none at all.\n")


def test_token_true_and_false(hub: HubServer, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo(REPO, tiny)
    with pytest.raises(ConvertError, match="token=True asks for the Hub token of this machine, and it has none"):
        plan_conversion(REPO, options=HubAccess(token=True))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for token, sent in ((True, f"Bearer {SECRET}"), (None, f"Bearer {SECRET}"), (False, None)):
        hub.clear_log()
        plan_conversion(REPO, options=HubAccess(token=token))
        assert {r.authorization for r in hub.log if r.route != "cdn"} == {sent}


@pytest.mark.parametrize(
    "text",
    [
        "Illegal header value b'Bearer my-own-token'",
        "authorization: Bearer abc.def/ghi",
        "my-own-token is no token",
        "stored-token is no token",
        "GET https://user:pass-word@host/x failed",
        "GET https://cdn.host/x?Signature=abc&Key=def failed",
        "the token hf_ABCdef012 was refused",
    ],
)
def test_what_the_client_says_is_passed_on_without_secrets(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("my-own-token", "stored-token", "abc", "pass-word", "ABCdef012", "def")
    monkeypatch.setenv("HF_TOKEN", "stored-token")
    own = None if text.startswith("stored") else "my-own-token"
    with pytest.raises(ResumableError, match="cannot be reached") as caught, translated(REPO, HubAccess(token=own)):
        raise OSError(text)
    shown = "".join(traceback.format_exception(caught.value)).split("ResumableError: ")[-1]
    assert not any(secret in shown for secret in secrets), shown
    assert "my-own-token" not in repr(HubAccess(token="my-own-token"))


def test_something_else_answers_for_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A portal or proxy sends its own page."""

    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Log in</html>")

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Portal) as portal:
        thread = threading.Thread(target=portal.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{portal.server_address[1]}")
        result = CliRunner().invoke(main, [REPO, "--dry-run"])
        portal.shutdown()
        thread.join()
    assert result.exit_code == 1, result.exception
    assert "What answers for the Hub about Tongyi-MAI/Z-Image-Turbo is not understood" in result.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("HF_ENDPOINT", ":::"), ("HTTP_PROXY", ":bad:"), ("HF_OIDC_RESOURCE", "x")], ids=str
)
def test_settings_of_the_client_that_it_cannot_use(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    if name == "HF_ENDPOINT":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", value)
    result = CliRunner().invoke(main, [REPO, "--dry-run"])
    assert result.exit_code == 1, result.exception
    assert result.stderr.startswith(f"error: The Hub cannot be reached for {REPO} (")


def test_a_config_beyond_its_limit_is_not_downloaded(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path / "large")
    os.truncate(folder / "transformer" / "config.json", 4 * 2**20 + 1)
    hub.add_repo(REPO, folder)
    with pytest.raises(ConvertError, match=r"transformer/config.json in .* has 4194305 bytes, and at most 4194304"):
        plan_conversion(REPO)
    assert "transformer/config.json" not in {r.file for r in hub.log}


def test_files_are_opened_before_they_are_described(hub: HubServer, tiny: Path) -> None:
    """So that source and commit can be shown first; the repository is listed once."""
    hub.add_repo(REPO, tiny)
    files = open_files(REPO, HubAccess())
    assert (files.repo, files.commit) == (REPO, hub.commit(REPO))
    assert {r.route for r in hub.log} == {"api"}
    listed = len(hub.log)
    snapshot = describe_source(files, HubAccess())
    assert (snapshot.repo, snapshot.commit) == (REPO, hub.commit(REPO))
    assert len([r for r in hub.log if r.route == "api"]) == listed
    with pytest.raises(ConvertError, match="does not exist"):
        open_files("./nowhere", HubAccess())


def test_a_component_s_folder_in_the_hub_cache_is_a_source(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, tiny)
    convert(REPO, tmp_path / "out")
    (folder,) = (tmp_path / "home").glob("hub/models--*/snapshots/*/transformer")
    assert (folder / "config.json").is_symlink()
    assert len(plan_conversion(folder).shards) == 1
    other = copied(tiny, tmp_path / "models--a--b" / "snapshots" / "main")
    (other / "transformer" / "config.json").unlink()
    (other / "transformer" / "config.json").symlink_to("../../../blobs/x")
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "x").write_text("{}")
    with pytest.raises(ConvertError, match="links outside the snapshot"):
        plan_conversion(other)


_FETCH = """
import sys
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.converter.snapshot.locate import describe_source, fetch, open_files
options = HubAccess(cache_dir=sys.argv[2], quiet="quiet" in sys.argv)
files = open_files(sys.argv[1], options)
fetch(describe_source(files, options), files)
"""


@pytest.mark.parametrize(
    ("terminal", "options", "bars"), [(False, [], False), (True, [], True), (True, ["quiet"], False)], ids=str
)
def test_bars_of_the_client_are_for_terminals(
    hub: HubServer, tiny: Path, tmp_path: Path, terminal: bool, options: list[str], bars: bool
) -> None:
    hub.add_repo(REPO, tiny)
    reader, writer = os.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # a bar of no width is empty
    command = [sys.executable, "-W", "ignore", "-c", _FETCH, REPO, str(tmp_path / "cache"), *options]
    with subprocess.Popen(command, stderr=writer, env=hub.client_env(tmp_path / "home")) as child:
        os.close(writer)
        said = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while piece := os.read(reader, 4096):
                said += piece
    os.close(reader)
    assert child.returncode == 0, said
    assert (b"Fetching" in said) == bars
    assert bars or said == b""


def test_a_branch_that_moves_midway_is_not_mixed(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_tiny_pipeline(other, seed=1)
    hub.add_repo(REPO, tiny)
    hub.move_branch(REPO, "main", other, after=6)
    convert(REPO, tmp_path / "out")
    convert(tiny, tmp_path / "by-folder")
    path = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "by-folder" / path).read_bytes()


@pytest.mark.parametrize("stream", [False, True])
def test_wrong_bytes_are_refused(
    hub: HubServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """One bad download costs its own shard alone: what was finished before it is kept for the next run."""
    monkeypatch.chdir(tmp_path)
    output = Path("out")  # as users name it: not absolute
    hub.add_repo(REPO, tiny)
    hub.faults.append(Fault("wrong_bytes", "transformer/*.safetensors", offset=5_000_000, route="cdn", times=None))
    with pytest.raises(ResumableError, match=r"transformer/.*differs from the Hub's digest") as caught:
        convert(REPO, output, stream=stream)
    assert not (output / "model_index.json").exists()
    hub.faults.clear()
    if not stream:
        (bad,) = re.findall("delete (.*) and run again", str(caught.value))
        Path(bad).unlink()
    assert convert(REPO, output, stream=stream).resumed_shards == 1
    assert verify(output, source=tiny).ok


@pytest.mark.parametrize("stream", [False, True])
def test_a_scale_that_a_corrupt_sibling_gave_is_not_kept(
    hub: HubServer, sharded: Path, tmp_path: Path, stream: bool
) -> None:
    """A group's members are measured in all shards before one is converted; a corrupt one is noticed only later."""
    plan = plan_conversion(sharded)
    spread = next(g for s in plan.shards for g in s.schedule.measured)
    last = [s for s in plan.shards if spread in s.schedule.measured][-1]
    weight = next(t for t in last.tensors if t.decision.group == spread)
    exponent = last.source.header.data_start + weight.info.start + 1  # of its first number: largest of all by far
    hub.add_repo(REPO, sharded)
    hub.faults.append(Fault("wrong_bytes", last.source.path, offset=exponent, route="cdn", times=None))
    with pytest.raises(ResumableError, match="differs from the Hub's digest") as caught:
        convert(REPO, tmp_path / "out", stream=stream)
    hub.faults.clear()
    for bad in re.findall("delete (.*) and run again", str(caught.value)):
        Path(bad).unlink()
    convert(REPO, tmp_path / "out", stream=stream)
    assert verify(tmp_path / "out", source=sharded).ok


class Watch(Silent):
    """Counts the source shards beside the output whenever the conversion reports progress."""

    def __init__(self, output: Path) -> None:
        super().__init__()
        self.folder = output / ".fp8-convert" / "source"
        self.most = 0

    def advance(self, count: int) -> None:
        self.most = max(self.most, len(list(self.folder.rglob("*.safetensors"))))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose DiT lies in many shards, with fusion groups across them."""
    return saved("z_image", max_shard_size="300KB")


def test_stream_keeps_two_source_shards_at_most(hub: HubServer, sharded: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, sharded)
    convert(sharded, tmp_path / "by-folder")
    watch = Watch(tmp_path / "out")
    result = convert(REPO, tmp_path / "out", stream=True, progress=watch)
    assert any(s.schedule.measured for s in result.plan.shards)  # groups in far shards, fetched by range
    assert 0 < watch.most <= 2
    streamed, local = contents(tmp_path / "out"), contents(tmp_path / "by-folder")
    del streamed["fp8_convert.json"], local["fp8_convert.json"]
    assert streamed == local
    assert not list((tmp_path / "home").rglob("*.safetensors"))  # nothing went through the cache


def test_a_streamed_shard_knows_its_file_once_it_has_arrived(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO, tiny)
    files = HubFiles(REPO, HubAccess())
    first, *others = [shard.source for shard in plan_conversion(REPO).shards]
    with StreamedSupply(files, tmp_path) as supply:
        supply.want([first, *others])
        assert supply.find(first) is None
        arrived = supply.open(first)
        assert arrived.stat == file_stat(arrived.path)
        assert supply.find(first) == arrived
        assert supply.range(first, 0, 8) == arrived.path.read_bytes()[:8]
        supply.done(first)
        assert not arrived.path.exists()
        assert supply.find(first) is None


@pytest.mark.parametrize("kind", ["cut", "reset", "status"])
def test_stream_resumes_after_a_lost_connection(hub: HubServer, sharded: Path, tmp_path: Path, kind: str) -> None:
    hub.add_repo(REPO, sharded)
    convert(sharded, tmp_path / "by-folder")
    fault = Fault(
        kind,
        "transformer/*00015-of-*.safetensors",
        after=20_000,
        status=503,
        times=None,
        method="GET",
        route="cdn",
        skip=1,
    )  # type: ignore[arg-type]
    hub.faults.append(fault)
    with pytest.raises(ResumableError):
        convert(REPO, tmp_path / "out", stream=True)
    assert fault.hits
    assert not (tmp_path / "out" / "model_index.json").exists()
    hub.faults.clear()
    hub.clear_log()
    result = convert(REPO, tmp_path / "out", stream=True)
    assert result.resumed_shards > 5
    streamed, local = contents(tmp_path / "out"), contents(tmp_path / "by-folder")
    del streamed["fp8_convert.json"], local["fp8_convert.json"]
    assert streamed == local


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "not streamed"])
def test_partial_downloads_of_a_killed_run_are_deleted(
    hub: HubServer, sharded: Path, tmp_path: Path, stream: bool
) -> None:
    """A kill leaves them where the client does not look again; they would fill the disk."""
    hub.add_repo(REPO, sharded)

    class Stop(Silent):
        def advance(self, count: int) -> None:
            if len(list((tmp_path / "out" / ".fp8-convert" / "new").rglob("*.safetensors"))) > 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(REPO, tmp_path / "out", stream=True, progress=Stop())
    partial = tmp_path / "out" / ".fp8-convert" / "source" / ".cache" / "huggingface" / "download" / "x.1.incomplete"
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(b"gigabytes")
    seen: list[bool] = []

    class Look(Silent):
        def advance(self, count: int) -> None:
            seen.append(partial.exists())

    assert convert(REPO, tmp_path / "out", stream=stream, progress=Look()).resumed_shards > 3
    assert seen
    assert not any(seen[1:])  # the first report is of what was finished before


def test_stream_waits_out_429_and_503(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    """What the client retries by itself needs no rerun."""
    hub.add_repo(REPO, tiny)
    hub.faults.append(
        Fault("status", "transformer/*.safetensors", status=429, retry_after=0, method="GET", route="cdn")
    )
    hub.faults.append(Fault("status", "vae/*.safetensors", status=503, retry_after=0, method="GET", route="resolve"))
    convert(REPO, tmp_path / "out", stream=True)
    assert [fault.hits for fault in hub.faults] == [1, 1]
    assert verify(tmp_path / "out", source=tiny).ok


def test_stream_keeps_to_its_commit(hub: HubServer, tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_tiny_pipeline(other, seed=1)
    hub.add_repo(REPO, tiny)
    hub.move_branch(REPO, "main", other, after=12)
    convert(REPO, tmp_path / "out", stream=True)
    assert hub.commit(REPO) != json.loads((tmp_path / "out" / "fp8_convert.json").read_text())["source"]["commit"]
    assert verify(tmp_path / "out", source=tiny).ok


def test_an_error_stops_the_download_that_is_under_way(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    build_tiny_pipeline(broken)
    path = broken / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights["layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    hub.add_repo(REPO, broken)
    arrived: list[str] = []
    download = HubFiles.download_into

    def slow(files: HubFiles, path: str, folder: Path, stopped: threading.Event) -> Path:
        if not path.startswith("text_encoder/"):
            stopped.wait(30)
        local = download(files, path, folder, stopped)
        arrived.append(path)
        return local

    monkeypatch.setattr(HubFiles, "download_into", slow)
    with pytest.raises(ConvertError, match="holds NaN or Inf"):
        convert(REPO, tmp_path / "out", stream=True)
    assert arrived == ["text_encoder/model.safetensors"]
    assert not [t.name for t in threading.enumerate() if t.name.startswith("fp8-")]
    assert not (tmp_path / "out").exists()


def test_room_for_the_download_is_checked(
    hub: HubServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo(REPO, tiny)
    plan, files = plan_conversion(REPO), HubFiles(REPO, HubAccess())
    room = plan.bytes_to_write + plan.bytes_to_read // 2
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=room))
        with pytest.raises(ConvertError, match=r"the download takes 0.01 GB .* or pass --stream"):
            run(plan, files, tmp_path / "out", Work(), Silent(), spare_bytes=0)
        assert not (tmp_path / "out").exists()
        assert not list((tmp_path / "home").rglob("*.safetensors"))
        largest = sum(sorted(s.source.size for s in plan.shards)[-2:])  # what streaming keeps beside the output
        spare = room - plan.bytes_to_write - largest
        run(plan, files, tmp_path / "out", Work(stream=True), Silent(), spare_bytes=spare)
    convert(REPO, tmp_path / "again")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=plan.bytes_to_write))
    run(plan, files, tmp_path / "from-the-cache", Work(), Silent(), spare_bytes=0)  # nothing is left to download


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        ("missing", [], "does not exist on the Hub"),
        ("gated", [], "is gated"),
        ("present", ["--revision", "v9"], "has no revision 'v9'"),
        ("present", ["--local-files-only"], "is not in the cache"),
        ("unavailable", [], "The Hub answered 503"),
    ],
)
def test_failures_are_one_sentence(
    hub: HubServer, tiny: Path, tmp_path: Path, prepare: str, arguments: list[str], message: str
) -> None:
    if prepare != "missing":
        hub.add_repo(REPO, tiny, gated=prepare == "gated")
    if prepare == "unavailable":
        hub.faults.append(Fault("status", "/api/*", status=503, times=None))
    result = CliRunner().invoke(main, [REPO, "-o", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_down(hub: HubServer, tmp_path: Path) -> None:
    hub.stop()
    result = CliRunner().invoke(main, [REPO, "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "cannot be reached" in result.stderr
    hub.start()


def test_no_id_and_no_folder(hub: HubServer, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["./nowhere", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "The folder ./nowhere does not exist" in result.stderr
