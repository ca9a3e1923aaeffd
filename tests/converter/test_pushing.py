"""Pushing to a Hub served on loopback, with the real huggingface_hub client, and reading what was pushed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from foreign import WRITERS, as_file, linears
from hub_server import Fault, HubServer, running_hub
from huggingface_hub import HfApi, snapshot_download
from pipelines import copied, saved
from safetensors.torch import load_file

from fp8_convert.converter import (
    ConvertError,
    ResumableError,
    convert,
    dequantize,
    import_checkpoint,
    push,
    verify,
)
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.loader import load_component, load_pipeline

# The client hands httpx an open file in a way that httpx wants to be rid of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SOURCE = "Tongyi-MAI/Z-Image-Turbo"
TOKEN = "hf_ofMine"
REPO = "me/z-image-fp8"
DIT = "transformer/diffusion_pytorch_model.safetensors"
RECORD = "fp8_convert.json"
CARD = "---\nlicense: apache-2.0\npipeline_tag: text-to-image\nbase_model: other/base\n---\n# A model by others\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(saved("z_image"), tmp_path_factory.mktemp("source") / "z-image")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("a licence")
    return folder


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as a Hub repository, converted. Not to be changed."""
    folder = tmp_path_factory.mktemp("out") / "z-image-fp8"
    with pytest.MonkeyPatch.context() as patch, running_hub(patch, folder.parent / "home") as hub:
        hub.add_repo(SOURCE, source)
        convert(SOURCE, folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path / "home") as server:
        server.tokens[TOKEN] = "me"
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def on_hub(folder: Path, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    """What a download into `folder` gives, without what the client keeps there."""
    snapshot_download(repo, revision=revision, local_dir=folder)
    return {path: data for path, data in contents(folder).items() if not path.startswith(".cache/")}


def sent(hub: HubServer) -> int:
    """Bytes of large files that reached the server."""
    return sum(request.received for request in hub.log if request.method == "PUT")


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="fp8-convert", catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


# What arrives


def test_the_snapshot_arrives_in_one_commit_with_a_card_of_its_own(hub: HubServer, out: Path, tmp_path: Path) -> None:
    before = contents(out)
    pushed = push(out, REPO, message="first")
    assert contents(out) == before
    assert hub.messages == ["first"]
    assert (pushed.repo, pushed.branch, pushed.commit) == (REPO, "main", hub.commit(REPO))
    there = on_hub(tmp_path / "download")
    assert there.pop("README.md") == pushed.card.encode() != CARD.encode()
    assert there.pop("README.source.md") == CARD.encode() == before.pop("README.md")
    assert there.pop(".gitattributes")
    assert there == before
    assert pushed.files.keys() == {*before, "README.md", "README.source.md"}
    assert pushed.changed
    assert not pushed.deleted
    assert not pushed.notes


def test_a_download_verifies(hub: HubServer, out: Path, source: Path, tmp_path: Path) -> None:
    push(out, REPO)
    hub.add_repo(SOURCE, source)
    for folder in (Path(snapshot_download(REPO)), Path(snapshot_download(REPO, local_dir=tmp_path / "plain"))):
        found = verify(folder, source=SOURCE, options=HubAccess(cache_dir=tmp_path / "cache"))
        assert found.findings == ()
        assert found.notes[-1].startswith("README.md is not checked")
    (folder / "README.source.md").write_text("others")
    assert [(f.path, f.problem) for f in verify(folder).findings] == [
        ("README.source.md", f"has 6 bytes instead of {len(CARD)}")
    ]
    (folder / "README.source.md").unlink()
    assert [f.path for f in verify(folder).findings] == ["README.md"]


def test_a_download_can_be_pushed_again(hub: HubServer, out: Path, tmp_path: Path) -> None:
    first = push(out, REPO)
    folder = snapshot_download(REPO, local_dir=tmp_path / "download")
    again = push(folder, "me/copy")
    assert again.files.keys() == first.files.keys()
    assert on_hub(tmp_path / "copy", "me/copy")["README.source.md"] == CARD.encode()


def test_what_is_made_of_a_download_has_the_sources_card(hub: HubServer, out: Path, tmp_path: Path) -> None:
    """The FP8 snapshot's own card says nothing true of its dequantised weights, or of an import that it lends files."""
    push(out, REPO)
    download = Path(snapshot_download(REPO, local_dir=tmp_path / "download"))
    notes = dequantize(download, tmp_path / "plain").notes
    assert notes == ("README.md is left out: it presents the FP8 snapshot, and the source's card takes its place",)
    dequantize(out, tmp_path / "expected")
    assert contents(tmp_path / "plain") == contents(tmp_path / "expected")
    convert(tmp_path / "plain", tmp_path / "again")
    assert "README.source.md" in push(tmp_path / "again", REPO, dry_run=True).files
    weights = load_file(tmp_path / "plain" / DIT)
    file = as_file(WRITERS["ComfyUI"](weights, linears(weights)), tmp_path / "z.safetensors")
    import_checkpoint(file, tmp_path / "expected-import", base=out)
    files = contents(tmp_path / "expected-import")
    for number, base in enumerate((download, REPO)):
        result = import_checkpoint(file, tmp_path / f"import-{number}", base=base)
        assert notes[0] in result.plan.notes
        given = contents(tmp_path / f"import-{number}")
        assert given.keys() == files.keys()
        assert [path for path in files if given[path] != files[path]] == [RECORD][:number]  # the base's Hub id
        assert verify(tmp_path / f"import-{number}").ok


def test_a_card_of_an_fp8_snapshot_alone_is_left_out(hub: HubServer, tmp_path: Path) -> None:
    convert(saved("z_image") / "transformer", tmp_path / "dit")
    push(tmp_path / "dit", "me/dit")
    download = Path(snapshot_download("me/dit", local_dir=tmp_path / "download"))
    assert dequantize(download, tmp_path / "plain").notes == ("README.md is left out: it presents the FP8 snapshot",)
    assert not [path for path in contents(tmp_path / "plain") if "README" in path]
    (download / "README.source.md").write_text("of nobody")  # no push puts it there where the source has no card
    assert "README.source.md is not in the record, and is copied as it is" in dequantize(download, tmp_path / "b").notes


def test_the_cards_snippet_loads_it(hub: HubServer, out: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", push(out, REPO).card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert type(names["pipe"]).__name__ == "ZImagePipeline"


def test_it_loads_with_every_digest_checked(hub: HubServer, out: Path) -> None:
    push(out, REPO)
    assert load_pipeline(REPO, device="cpu", verify=True) is not None


def test_a_component_on_its_own(hub: HubServer, tmp_path: Path) -> None:
    convert(saved("z_image") / "transformer", tmp_path / "dit")
    pushed = push(tmp_path / "dit", "me/dit")
    assert 'load_component("me/dit")' in pushed.card
    assert "README.source.md" not in pushed.files
    assert verify(snapshot_download("me/dit", local_dir=tmp_path / "download")).ok
    assert type(load_component("me/dit", device="cpu")).__name__ == "ZImageTransformer2DModel"


def test_notes_say_what_the_card_lacks(hub: HubServer, converted: Path) -> None:
    notes = push(converted, REPO).notes
    assert len(notes) == 2
    assert "no licence was found" in notes[0]
    assert "names no base model" in notes[1]


def test_a_card_that_cannot_be_read_is_carried_and_said(hub: HubServer, tmp_path: Path) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    (source / "README.md").write_bytes(b"---\nlicense: [\n---\n# \xff")
    convert(source, tmp_path / "out")
    (note, *_) = push(tmp_path / "out", REPO).notes
    assert note.startswith("the head of the source's card cannot be read")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (
            "license: [a, {b: c}]",
            "license of the source's card is ['a', {'b': 'c'}], which is no name and is",
        ),
        ("license: 2024-01-01", "license of the source's card is datetime.date(2024, 1, 1), which is no name and is"),
        ("a: " + "[" * 5000, "the head of the source's card cannot be read (it is nested too deeply), so nothing is"),
    ],
)
def test_a_licence_that_is_not_taken_is_said(tmp_path: Path, head: str, said: str) -> None:
    source = copied(saved("z_image") / "transformer", tmp_path / "source")
    (source / "README.md").write_text(f"---\n{head}\n---\n")
    convert(source, tmp_path / "out")
    planned = push(tmp_path / "out", REPO, dry_run=True)
    assert planned.notes[0].startswith(said)
    assert planned.notes[1].startswith("no licence was found in the source, so the card states none")
    assert "license:" not in planned.card
    assert "No licence is known here" in planned.card


# Again


def test_a_second_push_sends_nothing(hub: HubServer, out: Path) -> None:
    first = push(out, REPO)
    assert sent(hub) == sum(size for path, size in first.files.items() if path.endswith(".safetensors"))
    hub.clear_log()
    again = push(out, REPO)
    assert again.commit == first.commit
    assert not again.changed
    assert sent(hub) == 0


def test_another_conversion_replaces_it_whole(hub: HubServer, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "cut", max_shard_size="3MB")
    convert(source, tmp_path / "whole")
    push(tmp_path / "cut", REPO)
    first = on_hub(tmp_path / "first")
    pushed = push(tmp_path / "whole", REPO)
    assert pushed.deleted == tuple(sorted(path for path in first if "-of-" in path or ".index." in path))
    there = on_hub(tmp_path / "second")
    assert there.keys() == {*contents(tmp_path / "whole"), "README.source.md", ".gitattributes"}
    assert b"`max_shard_size` | `none`" in there["README.md"]


def test_an_upload_that_broke_off_goes_on(hub: HubServer, out: Path, tmp_path: Path, no_waiting: None) -> None:
    digest = json.loads((out / RECORD).read_text())["files"][DIT]["sha256"]
    size = (out / DIT).stat().st_size
    fault = Fault("broken", match=digest, after=100_000, times=None)
    hub.faults.append(fault)
    with pytest.raises(ResumableError, match=r"The upload to me/z-image-fp8 broke off .*; run the same command again"):
        push(out, REPO)
    assert hub.messages == []
    assert on_hub(tmp_path / "nothing").keys() == {".gitattributes"}
    hub.faults.clear()
    hub.clear_log()
    assert push(out, REPO).changed
    assert sent(hub) == size
    assert verify(snapshot_download(REPO)).ok


def test_a_signal_stops_it_and_leaves_the_branch_alone(hub: HubServer, out: Path, tmp_path: Path) -> None:
    digest = json.loads((out / RECORD).read_text())["files"][DIT]["sha256"]
    hub.faults.append(Fault("status", match=digest, method="PUT", times=None))  # the client tries again and again
    command = [sys.executable, "-c", "from fp8_convert.converter.cli import main; main()", "push", str(out), REPO]
    environment = hub.client_env(tmp_path / "home") | {"HF_TOKEN": TOKEN}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not hub.faults[0].hits:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert hub.faults[0].hits < 3  # it does not wait until the client gives up
    assert said.endswith("stopped; run the same command again; what the Hub has is not sent twice.\n")
    assert hub.messages == []
    hub.faults.clear()
    assert push(out, REPO).changed


def test_a_file_that_changes_while_it_goes_up(
    hub: HubServer, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(out, tmp_path / "changing")
    monkeypatch.setattr(time, "sleep", lambda _seconds: os.utime(folder / DIT))  # while the client waits to try again
    digest = json.loads((out / RECORD).read_text())["files"][DIT]["sha256"]
    hub.faults.append(Fault("status", match=digest, method="PUT"))
    with pytest.raises(ResumableError, match=f"{DIT} changed while it was read; run again"):
        push(folder, REPO)
    assert hub.messages == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault("status", "*/commit/*", status=412),
            r"me/z-image-fp8 changed while the upload ran; run the same",
        ),
        (Fault("status", "*/commit/*", status=503), r"The Hub answered 503 for me/z-image-fp8.*; run the same command"),
        (Fault("status", "*/preupload/*", status=429, times=None), r"The Hub answered 429"),
    ],
)
def test_what_passes_by_itself(hub: HubServer, out: Path, fault: Fault, message: str, no_waiting: None) -> None:
    hub.faults.append(fault)
    with pytest.raises(ResumableError, match=message):
        push(out, REPO)
    hub.faults.clear()
    assert push(out, REPO).changed


def test_two_pushes_do_not_mix(hub: HubServer, out: Path, tmp_path: Path, source: Path) -> None:
    """Somebody else commits between the look at the branch and the commit."""
    for repo in ("me/first", REPO):
        hub.add_repo(repo, source / "scheduler")
    push(out, "me/first")
    asked = [request.path for request in hub.log if request.repo == "me/first"]
    moves = next(i for i, path in enumerate(asked) if "/preupload/" in path)
    theirs = hub.move_branch(REPO, "main", source / "tokenizer", after=moves)
    with pytest.raises(ResumableError, match="changed while the upload ran"):
        push(out, REPO)
    assert hub.commit(REPO) == theirs


# Branches, privacy, names


def test_a_branch_is_created_and_main_is_left_alone(hub: HubServer, out: Path, tmp_path: Path) -> None:
    pushed = push(out, REPO, revision="fp8/v2")
    assert pushed.commit == hub.commit(REPO, "fp8/v2")
    assert on_hub(tmp_path / "main").keys() == {".gitattributes"}
    assert on_hub(tmp_path / "branch", revision="fp8/v2").keys() == {*pushed.files, ".gitattributes"}
    assert not push(out, REPO, revision="fp8/v2").changed


def test_private_is_private_from_the_first_byte(hub: HubServer, out: Path) -> None:
    push(out, REPO, private=True)
    assert HfApi(token=TOKEN).repo_info(REPO).private
    assert not HfApi(token=False).repo_exists(REPO)
    assert not push(out, REPO, private=True).changed


def test_private_is_refused_where_the_repository_is_public(hub: HubServer, out: Path) -> None:
    push(out, REPO)
    with pytest.raises(ConvertError, match=r"me/z-image-fp8 exists and is public; make it private in its settings"):
        push(out, REPO, private=True)


def test_a_name_alone_is_in_the_users_namespace(hub: HubServer, out: Path) -> None:
    pushed = push(out, "z-image-fp8")
    assert pushed.repo == REPO
    assert f'load_pipeline("{REPO}")' in pushed.card


# Cards that are there


def start(hub: HubServer, folder: Path, files: dict[str, str | bytes]) -> None:
    """A repository with these files."""
    for path, data in {".gitattributes": "", **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data.encode() if isinstance(data, str) else data)
    hub.add_repo(REPO, folder)


@pytest.mark.parametrize(
    "card", ["---\nlicense: mit\n---\n", "\n", CARD], ids=["made on the website", "empty", "source's"]
)
def test_a_card_that_says_nothing_is_replaced(hub: HubServer, out: Path, tmp_path: Path, card: str) -> None:
    start(hub, tmp_path / "repo", {"README.md": card, "pictures/one.png": b"png"})
    pushed = push(out, REPO)
    there = on_hub(tmp_path / "download")
    assert there["README.md"] == pushed.card.encode()
    assert there["pictures/one.png"] == b"png"
    assert not pushed.notes


@pytest.mark.parametrize("mine", [lambda card: "# My own card\n", lambda card: card.replace("Nothing was", "All was")])
def test_a_card_by_hand_stays(hub: HubServer, out: Path, tmp_path: Path, mine: Callable[[str], str]) -> None:
    card = mine(push(out, "me/other").card)
    start(hub, tmp_path / "repo", {"README.md": card})
    pushed = push(out, REPO)
    there = on_hub(tmp_path / "download")
    assert there["README.md"] == card.encode()
    assert there["README.source.md"] == CARD.encode()
    assert pushed.notes == (
        "README.md of me/z-image-fp8 was written or edited by hand and stays as it is: delete it on the Hub and push "
        "again for a new one",
    )
    assert verify(tmp_path / "download").ok


# What is refused


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model_index.json": "{}"}, r"holds a model that fp8-convert did not push \(model_index\.json\)"),
        ({"unet/weights.safetensors": b"x"}, r"did not push \(unet/weights\.safetensors\)"),
        ({RECORD: "{}"}, r"What me/z-image-fp8 holds cannot be told, since its record cannot be read; push to another"),
    ],
)
def test_a_repository_with_something_else(
    hub: HubServer, out: Path, tmp_path: Path, files: dict[str, str | bytes], message: str
) -> None:
    start(hub, tmp_path / "repo", files)
    commit = hub.commit(REPO)
    with pytest.raises(ConvertError, match=message):
        push(out, REPO)
    assert hub.commit(REPO) == commit


def test_a_repository_with_a_snapshot_of_another_model(hub: HubServer, out: Path, tmp_path: Path) -> None:
    convert(saved("wan22"), tmp_path / "wan")
    push(tmp_path / "wan", REPO)
    with pytest.raises(ConvertError, match=r"holds the FP8 snapshot of 'WanPipeline', and this is one of 'ZImageP"):
        push(out, REPO)


def test_a_repository_with_a_snapshot_of_another_repository(
    hub: HubServer, out: Path, source: Path, tmp_path: Path, converted: Path
) -> None:
    hub.add_repo("others/Z-Image", source)
    convert("others/Z-Image", tmp_path / "other")
    push(tmp_path / "other", REPO)
    with pytest.raises(ConvertError, match=r"holds the FP8 snapshot of 'others/Z-Image', and this is one of 'Tongyi"):
        push(out, REPO)
    assert push(converted, REPO).changed  # of a folder nobody knows which repository it was


def test_no_token(hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, True, False):
        with pytest.raises(ConvertError, match=r"log in with `hf auth login` or pass --token"):
            push(out, REPO, token=token)
    assert hub.log == []


def test_a_token_that_the_hub_does_not_know(hub: HubServer, out: Path) -> None:
    with pytest.raises(ConvertError, match=r"The Hub does not accept the token \(.*\); make a new one") as caught:
        push(out, REPO, token="hf_wrongOne")
    assert "hf_wrongOne" not in str(caught.value)


def test_a_namespace_of_others(hub: HubServer, out: Path, source: Path) -> None:
    with pytest.raises(ConvertError, match=r"does not let this token write to org/new \(You don't have the rights to"):
        push(out, "org/new")
    hub.add_repo("org/empty", source / "scheduler")
    with pytest.raises(ConvertError, match=r"does not let this token write to org/empty \(You don't have the required"):
        push(out, "org/empty")


def test_a_hidden_repository_of_others(hub: HubServer, out: Path, tmp_path: Path) -> None:
    start(hub, tmp_path / "repo", {})
    hub._repos[REPO].private_token = "hf_another"
    with pytest.raises(ConvertError, match=r"The Hub cannot create me/z-image-fp8 \(You already created this"):
        push(out, REPO)


@pytest.mark.parametrize("repo", ["a/b/c", "me/z image", "", "me/..", "https://huggingface.co/me/z"])
def test_a_name_that_no_repository_has(hub: HubServer, out: Path, repo: str) -> None:
    with pytest.raises(ConvertError, match=r"cannot be a Hub repository's name; give one such as me/qwen-image-fp8"):
        push(out, repo, dry_run=True)


def test_offline(hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConvertError, match=r"HF_HUB_OFFLINE is set, and a push needs the Hub; unset it"):
        push(out, REPO)


def test_a_file_that_the_hub_leaves_out(hub: HubServer, out: Path) -> None:
    hub.ignored.add("LICENSE")
    with pytest.raises(ConvertError, match=r"but LICENSE is not in it as it was sent; look at the repository's \.giti"):
        push(out, REPO)


def _flip(folder: Path) -> None:
    data = bytearray((folder / DIT).read_bytes())
    data[-1] ^= 1
    (folder / DIT).write_bytes(data)


def _edit_record(folder: Path) -> None:
    (folder / RECORD).write_text((folder / RECORD).read_text().replace('"compact": false', '"compact": true'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, f"{DIT} has another sha256 than the record says; nothing was pushed"),
        (lambda folder: (folder / DIT).unlink(), f"{DIT} is missing"),
        (lambda folder: (folder / "LICENSE").write_text("x"), "LICENSE has 1 bytes instead of 9"),
        (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt is not in the record"),
        (_edit_record, f"{RECORD} was changed since it was written"),
        (lambda folder: (folder / RECORD).unlink(), "is not a snapshot that fp8-convert finished"),
    ],
    ids=["flipped bit", "missing", "size", "foreign file", "record", "no record"],
)
def test_a_damaged_snapshot_leaves_no_trace(
    hub: HubServer, out: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = copied(out, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ConvertError, match=re.escape(message)):
        push(folder, REPO)
    assert not HfApi(token=TOKEN).repo_exists(REPO)


def test_an_original_snapshot(hub: HubServer, source: Path) -> None:
    with pytest.raises(ConvertError, match=r"is not a snapshot that fp8-convert finished; give the folder that"):
        push(source, REPO)
    assert hub.log == []


def test_a_source_that_was_pushed_before(hub: HubServer, source: Path, tmp_path: Path) -> None:
    original = copied(source, tmp_path / "source")
    (original / "README.source.md").write_text("of its own source")
    convert(original, tmp_path / "out")
    with pytest.raises(ConvertError, match=r"has a README\.source\.md of its source, where a push puts the"):
        push(tmp_path / "out", REPO)


# The command


def test_a_dry_run_asks_nobody(hub: HubServer, out: Path, tmp_path: Path) -> None:
    planned = push(out, REPO, dry_run=True)
    text = run("push", out, REPO, "--dry-run").stdout
    assert hub.log == []
    pushed = push(out, REPO)
    assert (planned.files, planned.card) == (pushed.files, pushed.card)
    for line in planned.card.splitlines():
        assert line in text
    assert text.endswith(f"would push {out} to {REPO}: 15 files, {sum(planned.files.values()) / 1e6:.1f} MB\n")


def test_the_command(hub: HubServer, out: Path, tmp_path: Path) -> None:
    result = run("push", out, REPO, "--private", "--message", "by hand", "--revision", "new", "--token", TOKEN)
    commit = hub.commit(REPO, "new")
    assert result.stdout == f"{push(out, REPO, revision='new').summary.replace('already there:', 'pushed')}\n"
    assert commit[:12] in result.stdout
    assert hub.messages == ["by hand"]
    again = json.loads(run("push", out, REPO, "--revision", "new", "--json").stdout)
    assert again["commit"] == commit
    assert again["changed"] is False
    assert again["url"] == f"{hub.url}/{REPO}"


def test_the_commands_notes_and_errors(hub: HubServer, converted: Path, tmp_path: Path) -> None:
    assert "note: the snapshot was made from a folder" in run("push", converted, REPO).stderr
    assert run("push", converted, REPO, "--quiet").stderr == ""
    error = run("push", tmp_path, REPO, code=1).stderr
    assert error.startswith(f"error: {tmp_path} has no fp8_convert.json")
    assert error.count("\n") == 1
