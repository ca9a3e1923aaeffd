"""What the two sides are opened as: which commit of a Hub repository, and what a user is told of another one."""

from __future__ import annotations

import json
from pathlib import Path

import pipelines
import pytest
import torch
from hub_server import running_hub

from fp8_convert.converter import convert
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.loader.quality.sides import Placing, Side, open_sides

REPO = "org/model"
HERE = Placing(torch.device("cpu"))


def opened(fp8: Path, **access: str) -> tuple[Side, Side, tuple[str, ...]]:
    return open_sides(fp8, REPO, HERE, HubAccess(**access), None, {})


def test_a_repository_is_read_at_the_commit_of_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pipelines.copied(pipelines.saved("z_image"), tmp_path / "source")
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        commit = hub.add_repo(REPO, source)
        convert(REPO, tmp_path / "out", device="cpu")
        (source / "README.md").write_text("changed")
        later = hub.move_branch(REPO, "main", source)
        fp8, original, notes = opened(tmp_path / "out")
        assert (fp8.label, fp8.commit, original.label, original.commit, notes) == ("out", None, REPO, commit, ())
        _, original, notes = opened(tmp_path / "out", revision="main")
        assert original.commit == later
        assert len(notes) == 1
        assert f"was made from {REPO} at commit {commit}, and the original here is {REPO} at commit {later}" in notes[0]


def test_an_fp8_repository_has_a_revision_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(pipelines.saved("z_image"), tmp_path / "out", device="cpu")
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo(REPO, pipelines.saved("z_image"))
        commit = hub.add_repo("me/fp8", tmp_path / "out", revision="v1")
        sides = open_sides("me/fp8", REPO, HERE, HubAccess(), "v1", {})
    assert (sides[0].label, sides[0].commit) == ("me/fp8", commit)
    assert sides[0].record is not None


def test_a_scheduler_that_differs_is_told(tmp_path: Path) -> None:
    source = pipelines.copied(pipelines.saved("z_image"), tmp_path / "source")
    convert(source, tmp_path / "out", device="cpu")
    config = source / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "shift": 1.0}))
    notes = open_sides(tmp_path / "out", source, HERE, HubAccess(), None, {})[2]
    assert notes == ("scheduler/scheduler_config.json differs in shift (3.0 and 1.0)",)
