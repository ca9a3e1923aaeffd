"""Manifests written as TOML read back as the same rules, and copies keep what they are told to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import own_manifests
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipelines import saved

from fp8_convert.converter import check_manifest, plan_conversion
from fp8_convert.converter.plan.manifest import Rule, parse_manifest, shipped
from fp8_convert.converter.plan.manifest_text import Changes, changed, to_toml

DIT = {"transformer": "ZImageTransformer2DModel"}
DITS = dict.fromkeys(("transformer", "transformer_2"), "WanTransformer3DModel")


@pytest.mark.parametrize("name", [*shipped()])
def test_shipped_manifests_read_back_as_the_same_rules(name: str) -> None:
    manifest = shipped()[name]
    again = parse_manifest(to_toml(manifest).encode(), f"{name}.toml")
    assert replace(again, sha256=manifest.sha256) == manifest


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_evidence_reads_back(why: str) -> None:
    manifest = parse_manifest(own_manifests.text().encode(), "own.toml")
    (table,) = manifest.components
    rules = replace(table, ignored_layers=(Rule(r're:a"\d+\.b', why, optional=True),), weight_block_size=(64, 32))
    again = parse_manifest(to_toml(replace(manifest, components=(rules,))).encode(), "own.toml")
    assert again.components == (rules,)


def kept_by(path: Path, source: Path, why: str) -> dict[str, list[str]]:
    plan = plan_conversion(source, manifest=str(path))
    return {
        c.source.name: [t.module for t in c.tensors if t.decision.why == why and not t.decision.fp8]
        for c in plan.components
        if c.rules is not None and c.rules.runs_in_fp8
    }


def test_a_copy_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    change = Changes((Rule("layers.0.feed_forward.w2", "measured"),))
    copy = changed(shipped()["z-image"], "mine", "a copy", {"transformer": change}, DIT)
    (tmp_path / "mine.toml").write_text(copy.text)
    assert check_manifest(str(tmp_path / "mine.toml"), saved("z_image")).ok
    kept = kept_by(tmp_path / "mine.toml", saved("z_image"), "measured")
    assert kept == {"transformer": ["layers.0.feed_forward.w2"]}


def test_one_table_for_two_dits_is_divided_where_they_differ(tmp_path: Path) -> None:
    first, second = Rule("blocks.0.ffn.net.2", "measured"), Rule("blocks.1.attn2.to_q", "measured")
    changes = {"transformer": Changes((first,)), "transformer_2": Changes((second,))}
    for name, wanted in (("apart", changes), ("alike", dict.fromkeys(changes, changes["transformer"]))):
        path = tmp_path / f"{name}.toml"
        path.write_text(changed(shipped()["wan2.2"], name, "a copy", wanted, DITS).text)
        assert check_manifest(str(path), saved("wan22")).ok
        kept = kept_by(path, saved("wan22"), "measured")
        assert kept == {c: [rule.pattern for rule in change.ignored_layers] for c, change in wanted.items()}


def test_blocks_take_the_place_of_scales_of_rows() -> None:
    rows = parse_manifest(Path(own_manifests.with_scales_of_rows("z-image")).read_bytes(), "rows")
    copy = changed(rows, "mine", "a copy", {"transformer": Changes(weight_block_size=(128, 128))}, DIT)
    assert copy.components[0].weight_block_size == (128, 128)
    assert copy.components[0].weight_scales == "tensor"
