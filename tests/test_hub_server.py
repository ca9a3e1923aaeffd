"""What no test that uses the loopback Hub would notice: leaks between tests, lost errors, faults that miss.

That real clients accept its answers is proved by every test that uses it.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Fault, HubServer, running_hub
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_api,
    hf_hub_url,
    hf_raise_for_status,
    model_info,
    snapshot_download,
)
from huggingface_hub.utils import build_hf_headers, http_backoff

REPO = "org/tiny-model"
WEIGHTS = "transformer/model.safetensors"
WEIGHT_BYTES = 300_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", seed=0)


@pytest.fixture
def other_source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "other", seed=1)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo(REPO, source)
        yield hub


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client meant to wait, instead of waiting."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def write_source(folder: Path, seed: int) -> Path:
    (folder / "transformer/a/b").mkdir(parents=True)
    (folder / "transformer/a/b/deep.txt").write_text("deep\n")
    (folder / "README.md").write_text(f"# Tiny model {seed}\n")
    (folder / "an empty file.txt").touch()
    (folder / "transformer/config.json").write_text(json.dumps({"seed": seed}))
    (folder / WEIGHTS).write_bytes(random.Random(seed).randbytes(WEIGHT_BYTES))
    return folder


def read_range(span: str, token: str | None = None) -> bytes:
    """As a reader of safetensors headers does it: through the redirect, with retries."""
    headers = build_hf_headers(token=token) | {"Range": span}
    response = http_backoff("GET", hf_hub_url(REPO, WEIGHTS), headers=headers)
    hf_raise_for_status(response)
    return response.content


def contents(folder: str | Path) -> dict[str, bytes]:
    folder = Path(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_cut_range_read_is_retried(hub: HubServer, source: Path, sleeps: list[float]) -> None:
    hub.faults.append(Fault("cut", match="*.safetensors", after=50))
    assert read_range("bytes=100-199") == (source / WEIGHTS).read_bytes()[100:200]
    assert [r.sent for r in hub.log if r.route == "cdn"] == [50, 100]


def test_wrong_bytes_wait_for_a_range_that_holds_them(hub: HubServer, source: Path) -> None:
    fault = Fault("wrong_bytes", match="*.safetensors", offset=150)
    hub.faults.append(fault)
    want = (source / WEIGHTS).read_bytes()
    assert read_range("bytes=0-99") == want[:100]
    assert fault.hits == 0
    assert read_range("bytes=100-199") != want[100:200]
    assert read_range("bytes=100-199") == want[100:200]


def test_a_branch_that_moves_midway(hub: HubServer, source: Path, other_source: Path) -> None:
    old = hub.commit(REPO)
    new = hub.move_branch(REPO, "main", other_source, after=2)
    assert hub.commit(REPO) == old
    url = hf_hub_url(REPO, "README.md")
    seen = [get_hf_file_metadata(url).commit_hash for _ in range(4)]
    assert seen == [old, old, new, new]


def test_a_subprocess_finds_the_hub_and_nothing_else(
    hub: HubServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = f"from huggingface_hub import snapshot_download; print(snapshot_download({REPO!r}))"

    def download(**more: str) -> subprocess.CompletedProcess[str]:
        env = hub.client_env(tmp_path / "home") | more
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    refused = download(HF_HUB_OFFLINE="1")
    assert "LocalEntryNotFoundError" in refused.stderr
    assert hub.log == []
    first = download()
    assert first.returncode == 0, first.stderr
    assert contents(first.stdout.strip()) == contents(source)
    assert {r.authorization for r in hub.log} == {None}
    hub.clear_log()
    assert download(HF_HUB_OFFLINE="1").stdout == first.stdout
    assert hub.log == []
    assert snapshot_download(REPO, local_files_only=True) == first.stdout.strip()  # one cache for both


def test_the_client_is_put_back(tmp_path: Path, source: Path) -> None:
    def settings() -> list[str]:
        return [HfApi().endpoint, hf_api.api.endpoint, constants.HF_HUB_CACHE, hf_hub_url(REPO, WEIGHTS)]

    before = settings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_of_the_user")
        patch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        with running_hub(patch, tmp_path / "home") as hub:
            hub.add_repo(REPO, source)
            assert not set(settings()) & set(before)
            assert model_info(REPO).sha == hub.commit(REPO)
            assert [r.authorization for r in hub.log] == [None]
    assert settings() == before


def test_an_error_inside_the_server_is_not_lost(hub: HubServer, source: Path, sleeps: list[float]) -> None:
    (source / WEIGHTS).write_bytes(b"short")
    with pytest.raises(Exception, match="peer closed"):
        read_range("bytes=0-99")
    with pytest.raises(RuntimeError, match="changed under the hub server"):
        hub.stop()
