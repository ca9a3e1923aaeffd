"""A plan is data: the same wherever the files lie, without any place and without what would read them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import own_manifests
import pytest
from hub_server import running_hub
from pipelines import copied, saved

from fp8_convert.converter import HubAccess, convert, plan_conversion
from fp8_convert.converter.plan.plan import Plan
from fp8_convert.converter.snapshot.files import LocalFiles

DATA = {str, bytes, bool, int, float, type(None)}


def leaves(value: Any) -> Iterator[Any]:
    """All that is reachable and is neither a dataclass nor a collection."""
    if is_dataclass(value) or isinstance(value, Mapping):
        contents = value if isinstance(value, Mapping) else vars(value)  # what it computed once is a part of it
        for key, item in contents.items():
            yield from leaves(key)
            yield from leaves(item)
    elif isinstance(value, Collection) and not isinstance(value, str | bytes):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def kinds(plan: Plan) -> set[type]:
    assert plan.bytes_to_write > plan.bytes_read_twice >= 0
    return {type(leaf) for leaf in leaves(plan)}


def test_a_plan_of_a_folder_knows_no_place(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(own_manifests.text())
    plan = plan_conversion(saved("z_image"), manifest=str(tmp_path / "own.toml"))
    assert kinds(plan) <= DATA
    seen = kinds(replace(plan, notes=(LocalFiles(tmp_path), tmp_path)))  # type: ignore[arg-type]
    assert {LocalFiles, type(tmp_path)} <= seen


def test_a_plan_of_a_hub_id_knows_no_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither one that is yet to be downloaded, nor one in the cache."""
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("a/b", saved("z_image"))
        plan = plan_conversion("a/b")
        assert kinds(plan) <= DATA
        convert("a/b", tmp_path / "out")
        cached = plan_conversion("a/b", options=HubAccess(local_files_only=True))
        assert kinds(cached) <= DATA
        assert (cached.paths, cached.sidecars) == (plan.paths, plan.sidecars)
        assert cached.bytes_to_write == plan.bytes_to_write


def test_the_plans_of_two_folders_with_the_same_files_are_equal(tmp_path: Path) -> None:
    here, there = plan_conversion(saved("z_image")), plan_conversion(copied(saved("z_image"), tmp_path / "copy"))
    assert here != there
    assert replace(there, snapshot=replace(there.snapshot, label=here.snapshot.label)) == here


def test_blocks_that_replace_the_manifests_scales_are_said() -> None:
    rows = own_manifests.with_scales_of_rows("z-image")
    said = "--weight-block-size takes the place of the manifest's channel scales in transformer"
    assert said in plan_conversion(saved("z_image"), manifest=rows, weight_block_size=(128, 128)).notes
    assert said not in plan_conversion(saved("z_image"), manifest=rows).notes
    assert said not in plan_conversion(saved("z_image"), weight_block_size=(128, 128)).notes
