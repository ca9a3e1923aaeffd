"""The loopback Hub against the real huggingface_hub client.

Every test makes the client do something and looks at what it got and at what the server logged. Where the
client waits between tries its clock is replaced by a list: nothing here is timed.
"""

import hashlib
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
    get_session,
    hf_api,
    hf_hub_download,
    hf_hub_url,
    hf_raise_for_status,
    list_repo_files,
    list_repo_tree,
    model_info,
    resolve_revision,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder
from huggingface_hub.utils import build_hf_headers, http_backoff, http_stream_backoff

REPO = "org/tiny-model"
WEIGHTS = "transformer/model.safetensors"
WEIGHT_BYTES = 300_000
FOLDERS = ["transformer", "transformer/a", "transformer/a/b"]


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


# What is there


def test_snapshot_is_the_served_folder(hub: HubServer, source: Path) -> None:
    snapshot = snapshot_download(REPO)
    assert contents(snapshot) == contents(source)
    assert Path(snapshot).name == hub.commit(REPO)
    assert hub.bytes_sent() == sum(map(len, contents(source).values()))
    assert hub.bytes_sent(".safetensors") == WEIGHT_BYTES


def test_allow_patterns_transfer_nothing_else(hub: HubServer, source: Path) -> None:
    snapshot = snapshot_download(REPO, allow_patterns=["*.json"])
    assert list(contents(snapshot)) == ["transformer/config.json"]
    assert hub.bytes_sent() == (source / "transformer/config.json").stat().st_size
    assert hub.bytes_sent(".safetensors") == 0


def test_branches_and_commits(hub: HubServer, source: Path, other_source: Path) -> None:
    sha = hub.add_repo(REPO, other_source, revision="refs/pr/1")
    assert sha != hub.commit(REPO)
    assert len(sha) == 40
    assert sha == hub.add_repo(REPO, other_source, revision="same-content")
    by_branch = snapshot_download(REPO, revision="refs/pr/1")
    hub.clear_log()
    assert snapshot_download(REPO, revision=sha) == by_branch
    assert hub.log == []  # a commit that is in the cache needs no server
    assert contents(by_branch) == contents(other_source)
    assert contents(snapshot_download(REPO)) == contents(source)


def test_commit_hash_without_its_branch(hub: HubServer, source: Path, other_source: Path) -> None:
    old = hub.commit(REPO)
    new = hub.move_branch(REPO, "main", other_source)
    assert hub.commit(REPO) == new
    assert contents(snapshot_download(REPO, revision=old)) == contents(source)
    assert contents(snapshot_download(REPO)) == contents(other_source)


def test_cached_files_need_no_server(hub: HubServer) -> None:
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download(REPO, local_files_only=True)
    snapshot = snapshot_download(REPO)
    hub.stop()
    assert snapshot_download(REPO, local_files_only=True) == snapshot
    assert hf_hub_download(REPO, WEIGHTS, local_files_only=True) == f"{snapshot}/{WEIGHTS}"
    assert resolve_revision(REPO, local_files_only=True).resolved == Path(snapshot).name


def test_blob_names_are_git_oids_and_sha256(hub: HubServer, source: Path) -> None:
    readme = (source / "README.md").read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(readme) + readme).hexdigest()
    digest = hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest()
    assert Path(hf_hub_download(REPO, "README.md")).resolve().name == oid
    assert Path(hf_hub_download(REPO, WEIGHTS)).resolve().name == digest
    routes = [(r.method, r.route, r.status) for r in hub.log if r.file == WEIGHTS]
    assert routes == [("HEAD", "resolve", 302), ("GET", "cdn", 200)]
    assert hf_hub_download(REPO, "an empty file.txt")


def test_file_metadata(hub: HubServer, source: Path) -> None:
    meta = get_hf_file_metadata(hf_hub_url(REPO, WEIGHTS))
    assert meta.commit_hash == hub.commit(REPO)
    assert meta.etag == hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest()
    assert meta.size == WEIGHT_BYTES
    assert meta.location.startswith(hub.cdn_url)
    assert meta.xet_file_data is None
    assert get_session().get(hf_hub_url(REPO, WEIGHTS)).headers["ETag"] == f'"{meta.etag}"'


def test_model_info_with_sizes_and_digests(hub: HubServer, source: Path) -> None:
    info = model_info(REPO, files_metadata=True)
    assert info.sha == hub.commit(REPO)
    assert info.siblings is not None
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    assert {name: s.size for name, s in siblings.items()} == {n: len(c) for n, c in contents(source).items()}
    lfs = siblings[WEIGHTS].lfs
    assert lfs is not None
    assert lfs.sha256 == hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest()
    assert lfs.size == WEIGHT_BYTES
    assert siblings["README.md"].lfs is None
    assert model_info(REPO, revision=hub.commit(REPO)).sha == hub.commit(REPO)


@pytest.mark.parametrize("page_size", [1, 2, 1000])
@pytest.mark.parametrize("expand", [False, True])
def test_tree(hub: HubServer, source: Path, page_size: int, expand: bool) -> None:
    hub.page_size = page_size
    entries = list(list_repo_tree(REPO, recursive=True, expand=expand))
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    assert {path: file.size for path, file in files.items()} == {n: len(c) for n, c in contents(source).items()}
    lfs = files[WEIGHTS].lfs
    assert lfs is not None
    assert lfs.sha256 == hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest()
    assert [entry.path for entry in entries if isinstance(entry, RepoFolder)] == FOLDERS
    assert len(hub.log) == -(-len(entries) // page_size)
    assert all((file.last_commit is not None) == expand for file in files.values())


def test_tree_of_one_folder(hub: HubServer, source: Path) -> None:
    assert sorted(entry.path for entry in list_repo_tree(REPO)) == [
        "README.md",
        "an empty file.txt",
        "transformer",
    ]
    paths = sorted(entry.path for entry in list_repo_tree(REPO, "transformer"))
    assert paths == ["transformer/a", "transformer/config.json", WEIGHTS]
    assert [entry.path for entry in list_repo_tree(REPO, "transformer/a")] == ["transformer/a/b"]
    assert sorted(list_repo_files(REPO)) == sorted(contents(source))
    with pytest.raises(EntryNotFoundError):
        list(list_repo_tree(REPO, "nowhere"))


def test_commit_hash_is_the_same_in_every_answer(hub: HubServer) -> None:
    sha = hub.commit(REPO)
    assert resolve_revision(REPO).resolved == sha
    for name in ("README.md", WEIGHTS):
        assert get_hf_file_metadata(hf_hub_url(REPO, name)).commit_hash == sha


# Ranges


@pytest.mark.parametrize(
    ("span", "start", "stop"),
    [
        ("bytes=0-7", 0, 8),
        ("bytes=1000-1999", 1000, 2000),
        ("bytes=299990-", 299_990, WEIGHT_BYTES),
        ("bytes=299990-999999", 299_990, WEIGHT_BYTES),
        ("bytes=-10", 299_990, WEIGHT_BYTES),
    ],
)
def test_range(hub: HubServer, source: Path, span: str, start: int, stop: int) -> None:
    response = get_session().get(hf_hub_url(REPO, WEIGHTS), headers=build_hf_headers() | {"Range": span})
    assert response.status_code == 206
    assert response.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{WEIGHT_BYTES}"
    assert response.content == (source / WEIGHTS).read_bytes()[start:stop]
    assert hub.bytes_sent(".safetensors") == stop - start
    assert [(r.route, r.status, r.range) for r in hub.log] == [("resolve", 302, span), ("cdn", 206, span)]


@pytest.mark.parametrize("name", [WEIGHTS, "an empty file.txt"])
def test_range_past_the_end(hub: HubServer, name: str) -> None:
    headers = build_hf_headers() | {"Range": f"bytes={WEIGHT_BYTES}-"}
    response = get_session().get(hf_hub_url(REPO, name), headers=headers)
    assert response.status_code == 416
    assert response.headers["Content-Range"] == f"bytes */{WEIGHT_BYTES if name == WEIGHTS else 0}"
    with pytest.raises(HfHubHTTPError, match="Requested range"):
        hf_raise_for_status(response)
    assert hub.bytes_sent() == 0


def test_the_token_stays_with_the_hub(hub: HubServer) -> None:
    read_range("bytes=0-7", token="hf_secret")
    assert [(r.route, r.authorization) for r in hub.log] == [("resolve", "Bearer hf_secret"), ("cdn", None)]
    hub.clear_log()
    snapshot_download(REPO, token="hf_secret")
    assert {r.authorization for r in hub.log if r.route != "cdn"} == {"Bearer hf_secret"}
    assert {r.authorization for r in hub.log if r.route == "cdn"} == {None}


# Refusals


@pytest.mark.parametrize("token", [None, "hf_wrong"])
@pytest.mark.parametrize("repo", ["org/missing", "missing", "org/private"])
def test_missing_repo(hub: HubServer, source: Path, repo: str, token: str | None) -> None:
    hub.add_repo("org/private", source, private_token="hf_right")
    for call in (
        lambda: model_info(repo, token=token),
        lambda: list(list_repo_tree(repo, token=token)),
        lambda: snapshot_download(repo, token=token),
        lambda: hf_hub_download(repo, "README.md", token=token),
    ):
        hub.clear_log()
        with pytest.raises(RepositoryNotFoundError) as caught:
            call()
        assert not isinstance(caught.value, GatedRepoError)
        assert caught.value.response.status_code == (401 if token is None else 404)
        assert hub.log[-1].status == caught.value.response.status_code


def test_private_repo_with_its_token(hub: HubServer, source: Path) -> None:
    hub.add_repo("org/private", source, private_token="hf_right")
    assert model_info("org/private", token="hf_right").private
    assert contents(snapshot_download("org/private", token="hf_right")) == contents(source)


@pytest.mark.parametrize("revision", ["nowhere", "0" * 40])
def test_missing_revision(hub: HubServer, revision: str) -> None:
    for call in (
        lambda: model_info(REPO, revision=revision),
        lambda: list(list_repo_tree(REPO, revision=revision)),
        lambda: snapshot_download(REPO, revision=revision),
        lambda: hf_hub_download(REPO, "README.md", revision=revision),
    ):
        with pytest.raises(RevisionNotFoundError):
            call()


def test_missing_file(hub: HubServer) -> None:
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "nowhere.json")
    assert not HfApi().file_exists(REPO, "nowhere.json")
    assert HfApi().file_exists(REPO, WEIGHTS)


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_wrong", 403)])
def test_gated_repo(hub: HubServer, source: Path, token: str | None, status: int) -> None:
    hub.add_repo("org/gated", source, gated=True, access_token="hf_right")
    assert model_info("org/gated", token=token).gated == "manual"
    assert WEIGHTS in list_repo_files("org/gated", token=token)
    for call in (snapshot_download, lambda repo, token: hf_hub_download(repo, WEIGHTS, token=token)):
        with pytest.raises(GatedRepoError, match="restricted") as caught:
            call("org/gated", token=token)
        assert caught.value.response.status_code == status
    assert hub.bytes_sent() == 0
    assert contents(snapshot_download("org/gated", token="hf_right")) == contents(source)


def test_a_hub_that_is_down(hub: HubServer, sleeps: list[float]) -> None:
    hub.stop()
    with pytest.raises(RevisionResolutionError):
        resolve_revision(REPO)
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download(REPO)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, WEIGHTS)


# Faults, and what the client makes of them


@pytest.mark.parametrize("status", [429, 503])
def test_backoff_waits_as_told(hub: HubServer, source: Path, sleeps: list[float], status: int) -> None:
    fault = Fault("status", match="*.safetensors", route="cdn", status=status, retry_after=7, times=2)
    hub.faults.append(fault)
    assert read_range("bytes=0-99") == (source / WEIGHTS).read_bytes()[:100]
    assert [r.status for r in hub.log if r.route == "cdn"] == [status, status, 206]
    assert sleeps == [8, 8]  # Retry-After and one second
    assert fault.hits == 2
    assert hub.bytes_sent(".safetensors") == 100


def test_backoff_gives_up(hub: HubServer, sleeps: list[float]) -> None:
    hub.faults.append(Fault("status", match=WEIGHTS, status=503, times=None))
    with pytest.raises(HfHubHTTPError) as caught:
        read_range("bytes=0-99")
    assert caught.value.response.status_code == 503
    assert len(hub.log) == 6
    assert sleeps == [1, 2, 4, 8, 8]


@pytest.mark.parametrize("status", [429, 503])
def test_model_info_is_not_retried_and_a_tree_is(hub: HubServer, sleeps: list[float], status: int) -> None:
    hub.faults.append(Fault("status", match="/api/*", status=status))
    with pytest.raises(HfHubHTTPError) as caught:
        model_info(REPO)
    assert caught.value.response.status_code == status
    hub.faults[:] = [Fault("status", match="/api/*", status=status)]
    assert WEIGHTS in list_repo_files(REPO)
    assert sleeps == [1]


@pytest.mark.parametrize("status", [429, 503])
def test_a_download_retries_its_head(hub: HubServer, sleeps: list[float], status: int) -> None:
    hub.faults.append(Fault("status", method="HEAD", status=status, times=2))
    assert hf_hub_download(REPO, WEIGHTS)
    assert [(r.method, r.status) for r in hub.log] == [
        ("HEAD", status),
        ("HEAD", status),
        ("HEAD", 302),
        ("GET", 200),
    ]


def test_a_download_retries_its_get_on_429_alone(hub: HubServer, source: Path, sleeps: list[float]) -> None:
    hub.faults.append(Fault("status", match=WEIGHTS, method="GET", status=429, retry_after=2))
    assert hf_hub_download(REPO, "transformer/config.json")
    assert sleeps == []
    assert Path(hf_hub_download(REPO, WEIGHTS)).read_bytes() == (source / WEIGHTS).read_bytes()
    assert sleeps == [3]
    hub.faults.append(Fault("status", match="README.md", method="GET", status=503))
    with pytest.raises(HfHubHTTPError):
        hf_hub_download(REPO, "README.md")


def test_a_cut_download_resumes(
    hub: HubServer, source: Path, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client keeps whole chunks only (of 10 MiB): with the usual size a small file starts over.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults.append(Fault("cut", match="*.safetensors", after=100_000, times=2))
    path = hf_hub_download(REPO, WEIGHTS)
    assert Path(path).read_bytes() == (source / WEIGHTS).read_bytes()
    gets = [r for r in hub.log if r.method == "GET"]
    assert [(r.status, r.range, r.sent) for r in gets] == [
        (200, None, 100_000),
        (206, "bytes=100000-", 100_000),
        (206, "bytes=200000-", 100_000),
    ]
    assert hub.bytes_sent(".safetensors") == WEIGHT_BYTES


def test_a_cut_download_of_less_than_a_chunk_starts_over(hub: HubServer, sleeps: list[float]) -> None:
    hub.faults.append(Fault("cut", match="*.safetensors", after=100_000))
    assert hf_hub_download(REPO, WEIGHTS)
    assert [(r.range, r.sent) for r in hub.log if r.method == "GET"] == [
        (None, 100_000),
        (None, WEIGHT_BYTES),
    ]


def test_a_download_cut_every_time_fails_and_leaves_no_blob(
    hub: HubServer, sleeps: list[float], tmp_path: Path
) -> None:
    hub.faults.append(Fault("cut", match="*.safetensors", after=100_000, times=None))
    with pytest.raises(Exception, match="peer closed connection"):
        hf_hub_download(REPO, WEIGHTS)
    assert [p for p in (tmp_path / "home/hub").rglob("*") if "blobs" in p.parts and p.is_file()] == []
    assert len(sleeps) == 5


def test_a_cut_range_read_is_retried(hub: HubServer, source: Path, sleeps: list[float]) -> None:
    hub.faults.append(Fault("cut", match="*.safetensors", after=50))
    assert read_range("bytes=100-199") == (source / WEIGHTS).read_bytes()[100:200]
    assert [r.sent for r in hub.log if r.route == "cdn"] == [50, 100]


def test_a_cut_stream_is_the_readers_affair(hub: HubServer, sleeps: list[float]) -> None:
    """Retries end where the body begins: that a stream stays whole is for its reader to see to."""
    hub.faults.append(Fault("cut", match="*.safetensors", after=50))

    def read() -> None:
        url, headers = hf_hub_url(REPO, WEIGHTS), build_hf_headers()
        # By default it would catch the reader's exception, ask again, and fail as a context manager.
        with http_stream_backoff("GET", url, headers=headers, retry_on_exceptions=()) as response:
            for _ in response.iter_bytes():
                pass

    with pytest.raises(Exception, match="peer closed connection"):
        read()
    assert [r.sent for r in hub.log if r.route == "cdn"] == [50]
    assert sleeps == []


def test_a_reset_download_fails(hub: HubServer, sleeps: list[float]) -> None:
    hub.faults.append(Fault("reset", match="*.safetensors", after=100_000))
    with pytest.raises(Exception, match="reset by peer"):
        hf_hub_download(REPO, WEIGHTS)
    assert hf_hub_download(REPO, WEIGHTS)


def test_wrong_bytes_reach_the_cache(hub: HubServer, source: Path) -> None:
    """The client compares sizes alone: whoever needs the right bytes compares digests."""
    hub.faults.append(Fault("wrong_bytes", match="*.safetensors", offset=123_456))
    got = Path(hf_hub_download(REPO, WEIGHTS)).read_bytes()
    want = (source / WEIGHTS).read_bytes()
    assert [i for i in range(WEIGHT_BYTES) if got[i] != want[i]] == [123_456]
    findings = HfApi().verify_repo_checksums(REPO)
    assert [mismatch["path"] for mismatch in findings.mismatches] == [WEIGHTS]


def test_wrong_bytes_wait_for_a_range_that_holds_them(hub: HubServer, source: Path) -> None:
    fault = Fault("wrong_bytes", match="*.safetensors", offset=150)
    hub.faults.append(fault)
    want = (source / WEIGHTS).read_bytes()
    assert read_range("bytes=0-99") == want[:100]
    assert fault.hits == 0
    assert read_range("bytes=100-199") != want[100:200]
    assert read_range("bytes=100-199") == want[100:200]


def test_skip_lets_requests_pass(hub: HubServer) -> None:
    hub.faults.append(Fault("status", match=WEIGHTS, route="cdn", status=403, skip=2, times=1))
    url = hf_hub_url(REPO, WEIGHTS)
    headers = build_hf_headers() | {"Range": "bytes=0-7"}
    assert [get_session().get(url, headers=headers).status_code for _ in range(4)] == [206, 206, 403, 206]


def test_a_branch_that_moves_midway(hub: HubServer, source: Path, other_source: Path) -> None:
    old = hub.commit(REPO)
    new = hub.move_branch(REPO, "main", other_source, after=2)
    assert hub.commit(REPO) == old
    url = hf_hub_url(REPO, "README.md")
    seen = [get_hf_file_metadata(url).commit_hash for _ in range(4)]
    assert seen == [old, old, new, new]


def test_a_snapshot_keeps_to_the_commit_it_began_with(hub: HubServer, source: Path, other_source: Path) -> None:
    hub.move_branch(REPO, "main", other_source, after=1)
    assert contents(snapshot_download(REPO)) == contents(source)
    assert contents(snapshot_download(REPO)) == contents(other_source)


# The server itself


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


def test_two_hubs_beside_each_other(hub: HubServer, other_source: Path) -> None:
    with HubServer({REPO: other_source}) as other:
        assert HfApi(endpoint=other.url).model_info(REPO).sha == other.commit(REPO)
        assert model_info(REPO).sha == hub.commit(REPO) != other.commit(REPO)
        assert [len(other.log), len(hub.log)] == [1, 1]


def test_an_address_nobody_knows(hub: HubServer) -> None:
    assert get_session().get(f"{hub.url}/api/whoami-v2").status_code == 404
    assert get_session().get(f"{hub.cdn_url}/{REPO}/resolve/main/README.md").status_code == 404
    unsigned = f"/cdn/org%2Ftiny-model/{'0' * 64}/{WEIGHTS}"
    assert get_session().get(hub.cdn_url + unsigned).status_code == 403
    assert [(r.route, r.path) for r in hub.log] == [
        ("api", "/api/whoami-v2"),
        ("cdn", f"/{REPO}/resolve/main/README.md"),
        ("cdn", unsigned),
    ]


def test_an_error_inside_the_server_is_not_lost(hub: HubServer, source: Path, sleeps: list[float]) -> None:
    (source / WEIGHTS).write_bytes(b"short")
    with pytest.raises(Exception, match="peer closed"):
        read_range("bytes=0-99")
    with pytest.raises(RuntimeError, match="changed under the hub server"):
        hub.stop()
