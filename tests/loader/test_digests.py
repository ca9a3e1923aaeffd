"""verify=True: every byte is compared with the record before anything is loaded, or it is said why it cannot be."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pipelines
import pytest
from damage import LAYER, SHARD
from hub_server import HubServer, running_hub
from runs import converted
from safetensors.torch import load_file

from fp8_convert.converter import ConvertError
from fp8_convert.loader import LoadError, load_component, load_pipeline, report

REPO = "org/z-image-fp8"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted("z_image"), tmp_path / "snapshot"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        yield hub


def flip(file: Path, offset: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def test_whole_snapshots_load() -> None:
    assert report(load_pipeline(converted("z_image"), device="cpu", verify=True)).ok
    assert load_component(converted("z_image"), "text_encoder", device="cpu", verify=True) is not None


def test_a_flipped_code_is_found_only_then(snapshot: Path) -> None:
    assert f"{LAYER}.weight" in load_file(snapshot / SHARD)
    flip(snapshot / SHARD)
    flip(snapshot / "scheduler/scheduler_config.json")
    load_component(snapshot, "transformer", device="cpu")
    message = r"has another sha256 than the record says.* \(and 1 more\); .* lists all 2 findings"
    for load in (load_pipeline, lambda *a, **k: load_component(a[0], "text_encoder", **k)):
        with pytest.raises(LoadError, match=message):
            load(snapshot, device="cpu", verify=True)


def test_what_has_no_record_is_refused(snapshot: Path) -> None:
    for call in (
        lambda: load_component(snapshot / "transformer", device="cpu", verify=True),
        lambda: load_pipeline(snapshot, device="cpu", verify=True),
    ):
        (snapshot / "fp8_convert.json").unlink(missing_ok=True)
        with pytest.raises(LoadError, match=r"needs the record fp8_convert\.json, and .* has none; give the folder"):
            call()


def test_originals_are_refused_unless_a_snapshot_is_made_of_them(tmp_path: Path) -> None:
    source = pipelines.saved("z_image")
    with pytest.raises(ValueError, match="is not converted; leave it out, or write a snapshot with save_as=FOLDER"):
        load_pipeline(source, device="cpu", quantization="fp8", verify=True)
    with pytest.raises(ValueError, match="is not converted"):
        load_component(source, "transformer", device="cpu", quantization="fp8", verify=True)
    pipe = load_pipeline(source, device="cpu", quantization="fp8", verify=True, save_as=tmp_path / "out")
    assert report(pipe).ok


def test_a_damaged_record_is_one_sentence(snapshot: Path) -> None:
    record = snapshot / "fp8_convert.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content))
    with pytest.raises(LoadError, match=r"fp8_convert\.json was changed since it was written"):
        load_pipeline(snapshot, device="cpu", verify=True)
    record.write_text("[")
    with pytest.raises(ConvertError, match=r"fp8_convert\.json is damaged \(it is not valid JSON\)"):
        load_pipeline(snapshot, device="cpu", verify=True)


def test_from_the_hub_every_recorded_file_comes_along(hub: HubServer, snapshot: Path) -> None:
    hub.add_repo(REPO, snapshot)
    assert report(load_pipeline(REPO, device="cpu", verify=True)).ok
    hub.clear_log()
    assert report(load_pipeline(REPO, device="cpu", verify=True, local_files_only=True)).ok
    assert not hub.log


def test_what_only_the_record_lists_is_fetched_too(hub: HubServer, snapshot: Path) -> None:
    """Such as a file of another converter version's choosing, which this one would not have carried over."""
    from fp8_convert.converter.format.layout import encode_json
    from fp8_convert.converter.format.record import seal

    (snapshot / "notes.dat").write_bytes(b"kept")
    record = {k: v for k, v in json.loads((snapshot / "fp8_convert.json").read_text()).items() if k != "record_sha256"}
    digest = "59e8a17a3a8a2e2ee1a2ea8ea1ab2cc02a1b36c2bfd6cf4c3cbbd2b6f9e1d1e9"
    record["files"]["notes.dat"] = {"size": 4, "sha256": digest}
    (snapshot / "fp8_convert.json").write_bytes(encode_json(seal(record)))
    hub.add_repo(REPO, snapshot)
    with pytest.raises(LoadError, match=r"notes\.dat has another sha256 than the record says"):  # so it was there
        load_pipeline(REPO, device="cpu", verify=True)


def test_a_file_that_the_repository_lacks_is_found(hub: HubServer, snapshot: Path) -> None:
    (snapshot / "tokenizer/tokenizer_config.json").unlink()
    hub.add_repo(REPO, snapshot)
    with pytest.raises(LoadError, match=r"tokenizer/tokenizer_config\.json is missing"):
        load_pipeline(REPO, device="cpu", verify=True)
