"""Planted faults are found and named, the ranking foretells what keeping helps, and a proposal is a manifest."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import saved
from runs import bf16, converted
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp8_convert.converter import ConvertError, SettingsError, check_manifest, convert, plan_conversion
from fp8_convert.loader import LoadError, load_component, sensitivity
from fp8_convert.loader.quality.influence import Calls
from fp8_convert.loader.quality.layer_errors import decibels
from fp8_convert.loader.quality.prompts import Prompt
from fp8_convert.loader.quality.ranking import Ranked
from fp8_convert.loader.quality.running import Case, Sampling, generate
from fp8_convert.loader.quality.sensitivity import Sensitivity

SMALL: dict[str, Any] = {
    "prompts": [Prompt("a red cube")], "steps": 3, "guidance": 0.0, "height": 64, "width": 64, "device": "cpu",
    "extra": {"max_sequence_length": 32},
}  # fmt: skip
SHARD = Path("transformer") / "diffusion_pytorch_model.safetensors"
DOUBLED, NOISED = "layers.1.feed_forward.w1", "noise_refiner.0.attention.to_out.0"


@functools.cache
def ranking() -> Sensitivity:
    return sensitivity(saved("z_image"), **SMALL)


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A converted snapshot with one layer's scale doubled, and noise of a tenth of its size in another's weights."""
    folder = Path(shutil.copytree(converted("z_image"), tmp_path / "faulty"))
    tensors = load_file(folder / SHARD)
    with safe_open(folder / SHARD, "pt") as file:
        metadata = file.metadata()
    tensors[f"{DOUBLED}.weight_scale"] *= 2
    weight = tensors[f"{NOISED}.weight"].float()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1 * weight.std()
    tensors[f"{NOISED}.weight"] = (weight + noise).clamp(-448, 448).to(torch.float8_e4m3fn)
    save_file(tensors, folder / SHARD, metadata=metadata)
    return folder


def test_planted_faults_are_named_and_lead_the_ranking(faulty: Path) -> None:
    found = sensitivity(saved("z_image"), fp8=faulty, **SMALL)
    assert not found.ok
    assert [suspect.layer for suspect in found.suspects] == [f"transformer.{DOUBLED}", f"transformer.{NOISED}"]
    assert decibels(found.suspects[0].error) == pytest.approx(0, abs=0.5)
    assert decibels(found.suspects[1].error) == pytest.approx(20, abs=1.5)
    units = {"layers.1.feed_forward.(w1|w3)", NOISED}
    assert {ranked.name for ranked in found.ranked[:2]} == units
    assert {ranked.name for ranked in sorted(found.ranked, key=lambda ranked: -ranked.own.both)[:2]} == units
    assert f"SUSPECT transformer.{DOUBLED}: its weights in the snapshot give its output -0.0 dB" in str(found)


def test_a_sound_snapshot_is_as_good_as_its_plan() -> None:
    found = sensitivity(saved("z_image"), fp8=converted("z_image"), by="block", **SMALL)
    assert found.ok
    assert found.plain["transformer"] == pytest.approx(ranking().plain["transformer"], rel=1e-3)
    assert all(r.own.expected == pytest.approx(r.own.weights) for r in found.ranked)


def test_every_layer_has_its_place() -> None:
    found = ranking()
    plan = plan_conversion(saved("z_image"), components=["transformer"])
    w8a8 = sorted(t.module for c in plan.components for t in c.tensors if t.decision.mode == "w8a8")
    assert sorted(layer for ranked in found.ranked for layer in ranked.layers) == w8a8
    assert sum(ranked.share for ranked in found.ranked) == pytest.approx(1)
    assert [r.error for r in found.ranked] == sorted((r.error for r in found.ranked), reverse=True)
    assert all(sorted(ranked.steps) == [0, 1, 2] for ranked in found.ranked)
    for ranked in found.ranked:
        assert 28 < decibels(ranked.own.weights) < 36, "what E4M3 of a bell gives"
        assert ranked.own.both >= 0.9 * max(ranked.own.weights, ranked.own.activations)
    assert found.rounding["transformer"] < 1e-9, "float32"


def test_errors_of_units_add_up_to_what_all_do_together() -> None:
    found = ranking()
    whole = sum(ranked.error for ranked in found.ranked)
    assert decibels(whole) == pytest.approx(decibels(found.plain["transformer"]), abs=1)


def kept(chosen: Sequence[Ranked]) -> float:
    """The measured output error with these units kept in the source's dtype."""
    layers = [layer for one in chosen for layer in one.layers]
    return sensitivity(saved("z_image"), ignored_layers=layers, by="block", **SMALL).plain["transformer"]


def test_keeping_the_worst_helps_as_much_as_the_ranking_says() -> None:
    found = ranking()
    plain, share = found.plain["transformer"], sum(ranked.share for ranked in found.ranked[:5])
    without_the_worst = kept(found.ranked[:5])
    assert without_the_worst == pytest.approx(plain * (1 - share), rel=0.25)
    assert without_the_worst < 0.75 * kept(found.ranked[-5:])


QWEN: dict[str, Any] = {**SMALL, "by": "pattern", "guidance": 4.0}


def test_a_proposal_is_a_manifest_that_does_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    found = sensitivity(saved("qwen_image"), budget="62dB", output=file, check=True, **QWEN)
    proposal = found.proposal
    assert proposal is not None
    assert proposal.met
    assert not proposal.blocks
    assert decibels(proposal.measured["transformer"]) >= 62
    assert abs(proposal.off_db) < 1
    assert not proposal.wrong
    assert check_manifest(str(file), saved("qwen_image")).ok
    plan = plan_conversion(saved("qwen_image"), manifest=str(file))
    by_label = {ranked.label: ranked for ranked in found.ranked}
    wanted = sorted(layer for label in proposal.kept for layer in by_label[label].layers)
    (dit,) = (c for c in plan.components if c.source.name == "transformer")
    stays = {t.module: t.decision.why for t in dit.tensors if "fp8-convert sensitivity" in t.decision.why}
    assert sorted(stays) == wanted
    assert re.match(
        r"fp8-convert sensitivity: \d+\.\d% of the error of transformer's output for ", next(iter(stays.values()))
    )
    default = plan_conversion(saved("qwen_image"))
    assert plan.weight_bytes - default.weight_bytes == pytest.approx(proposal.cost, abs=4096), "but for headers"
    ((plain, better),) = proposal.pictures
    assert better > plain + 1
    assert real_error(file, tmp_path) == pytest.approx(proposal.measured["transformer"], rel=0.05)


def real_error(manifest: Path, folder: Path) -> float:
    """The output error of the converted DiT itself, its FP8 products run on the CPU, on the steps of the original."""
    convert(saved("qwen_image"), folder / "out", manifest=str(manifest), device="cpu")
    fp8 = load_component(folder / "out", "transformer", device="cpu", dtype="float32", backend="scaled_mm")
    pipe = bf16("qwen_image").to(torch.float32)
    calls = Calls(pipe.transformer)
    with calls.kept_while():
        generate(pipe, Case(SMALL["prompts"][0], 0), Sampling(3, (0,), 64, 64, guidance=4.0, extra=SMALL["extra"]))
    error = energy = 0.0
    with torch.no_grad():
        for args, kwargs in calls.kept:
            plain, ours = (model(*args, **kwargs)[0] for model in (pipe.transformer, fp8))
            error += float((plain - ours).square().sum())
            energy += float(plain.square().sum())
    return error / energy


def test_bytes_are_kept_to() -> None:
    found = sensitivity(saved("z_image"), budget="300KB", by="pattern", **SMALL)
    assert found.proposal is not None
    assert 0 < found.proposal.cost <= 300_000
    assert found.proposal.measured["transformer"] < found.plain["transformer"]
    assert "proposal for 300.0 kB: keep " in str(found)
    assert all(f"\n  {name}\n" in str(found) for name in found.proposal.kept)


def test_what_is_ignored_already_is_not_ranked_and_stays_so_in_the_proposal(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    found = sensitivity(saved("z_image"), budget="40dB", by="block", ignored_layers=["layers"], output=file, **SMALL)
    assert {ranked.name for ranked in found.ranked} == {"context_refiner.0", "noise_refiner.0"}
    plan = plan_conversion(saved("z_image"), manifest=str(file), components=["transformer"])
    modules = {t.module for c in plan.components for t in c.tensors if t.decision.mode == "w8a8"}
    assert not any(module.startswith("layers.") for module in modules)


def test_two_dits_and_one_that_never_ran() -> None:
    video = SMALL | {"frames": 5, "steps": 1, "by": "block", "guidance": 1.0}
    found = sensitivity(saved("wan22"), budget="30dB", **video)
    assert {ranked.component for ranked in found.ranked} == {"transformer"}
    (note,) = [note for note in found.notes if "never ran" in note]
    assert note.startswith("20 layers of transformer_2 never ran, such as blocks.0.attn1.to_k")
    both = sensitivity(saved("wan22"), **video | {"steps": 3})
    assert {ranked.component for ranked in both.ranked} == {"transformer", "transformer_2"}
    assert set(both.plain) == {"transformer", "transformer_2"}


def test_in_bfloat16_rounding_is_taken_off() -> None:
    found = sensitivity(saved("z_image"), dtype="bfloat16", by="block", **SMALL)
    assert 1e-7 < found.rounding["transformer"] < 0.2 * found.plain["transformer"]  # how large depends on the processor
    assert decibels(found.plain["transformer"]) == pytest.approx(decibels(ranking().plain["transformer"]), abs=1)


def test_json_is_json() -> None:
    found = json.loads(json.dumps(ranking().to_json(), allow_nan=False))
    assert found["ranked"][0]["own"]["both"] == ranking().ranked[0].own.both
    assert found["how"]["dtype"] == "float32"
    assert found["proposal"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "model"}, "by is 'model'; use one of layer, block, pattern"),
        ({"budget": "much"}, "budget is 'much'; use decibels"),
        ({"check": True}, "for a budget; add one, such as 40dB"),
        ({"output": "mine.toml"}, "for a budget; add one, such as 40dB"),
        ({"budget": "40dB", "output": "mine.json"}, "must end in .toml"),
        ({"budget": "40dB", "fp8": "x"}, "a snapshot is converted already; drop one"),
        ({"compact": True, "fp8": "x"}, "compact changes nothing in it; drop it"),
        ({"activation_scheme": "static"}, "needs calibrated scales"),
    ],
)
def test_what_means_nothing_is_said_before_anything_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        sensitivity("no/such-folder", **SMALL | options)


def test_snapshots_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="and its original has not; give its own original"):
        sensitivity(saved("z_image"), fp8=converted("qwen_image"), **SMALL)
    with pytest.raises(LoadError, match="has no W8A8 layers; give a snapshot that was converted from the original"):
        sensitivity(saved("z_image"), fp8=saved("z_image"), **SMALL)


@pytest.mark.gpu
def test_a_gpu_measures_what_the_cpu_does() -> None:
    found = sensitivity(saved("z_image"), **SMALL | {"device": "cuda"})
    plain = ranking().plain["transformer"]
    assert decibels(found.plain["transformer"]) == pytest.approx(decibels(plain), abs=0.5)
    assert {one.label for one in found.ranked[:4]} == {one.label for one in ranking().ranked[:4]}
