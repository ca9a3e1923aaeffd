"""What stays unconverted is said where it is unusual, and a DiT of which next to nothing becomes FP8 is refused."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import own_manifests
import pytest
import torch
from click.testing import CliRunner
from pipelines import BUILDERS, _clip_tokenizer, saved

from fp8_convert.converter import ConvertError, convert, plan_conversion
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.cli.render import render_plan
from fp8_convert.converter.format.header import TensorInfo
from fp8_convert.converter.format.layout import STORAGE, WeightFormat
from fp8_convert.converter.plan.coverage import kept_note
from fp8_convert.converter.plan.decide import Decision, PlannedTensor
from fp8_convert.converter.plan.manifest import ComponentRules
from fp8_convert.converter.plan.plan import ComponentPlan, Plan
from fp8_convert.converter.plan.refused import PlanRefusedError
from fp8_convert.converter.snapshot.building import quiet_libraries

ENCODER = own_manifests.table("text_encoder", "storage", "mlp")


def own(folder: Path, pattern: str, rest: str = "") -> str:
    path = folder / "own.toml"
    path.write_text(own_manifests.text(pattern) + rest)
    return str(path)


def dit(plan: Plan) -> ComponentPlan:
    return next(c for c in plan.components if c.source.name == "transformer")


def share_of_linears(plan: Plan) -> float:
    tensors = [t for t in dit(plan).tensors if t.decision.kind == "Linear"]
    fp8, total = (sum(t.info.numel for t in ts) for ts in ([t for t in tensors if t.decision.fp8], tensors))
    return fp8 / total


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("compact", [False, True])
def test_what_a_family_manifest_keeps_by_design_is_no_note(name: str, compact: bool) -> None:
    notes = plan_conversion(saved(name), compact=compact).notes
    assert [n for n in notes if not n.startswith("--compact changes nothing here")] == []


def test_next_to_nothing_of_a_dit_is_refused(tmp_path: Path) -> None:
    manifest = own(tmp_path, "context_refiner.*.attention.to_q", ENCODER)
    with pytest.raises(ConvertError) as caught:
        plan_conversion(saved("z_image"), manifest=manifest)
    message = str(caught.value)
    assert message.startswith("Only 1.4% ")
    assert "of the linear parameters of transformer would become FP8 with the manifest own: not eligible (" in message
    assert "tensors, " in message
    assert "such as " in message
    assert message.endswith("or leave it out with --component.")
    assert plan_conversion(saved("z_image"), manifest=manifest, components=["text_encoder"])


def test_what_the_user_keeps_is_not_refused_or_noted() -> None:
    plan = plan_conversion(saved("z_image"), ignored_layers=["layers", "noise_refiner", "context_refiner"])
    assert share_of_linears(plan) == 0  # and the text encoder becomes FP8
    assert plan.notes == ()


def test_a_hole_in_a_manifest_is_noted_with_its_reasons(tmp_path: Path) -> None:
    plan = plan_conversion(saved("z_image"), manifest=own(tmp_path, "layers.*.attention.*", ENCODER))
    share = share_of_linears(plan)
    assert 0.1 < share < 1 / 3
    (note,) = [n for n in plan.notes if "of transformer " in n]
    kept = sum(t.info.nbytes for t in dit(plan).tensors if not t.decision.fp8)
    before, _ = dit(plan).weight_bytes
    assert note.startswith(f"{kept / 1e6:.2f} MB of transformer ({100 * kept / before:.1f}%) stay as they are, ")
    assert f"and {100 * share:.1f}% of its linear parameters become FP8: not eligible (" in note
    assert f"note: {note}" in render_plan(plan)


def test_a_large_component_that_no_table_names_is_noted(tmp_path: Path) -> None:
    (note,) = plan_conversion(saved("z_image"), manifest=own(tmp_path, "layers")).notes[:1]
    assert note.startswith("text_encoder (Qwen3Model, ")
    assert note.endswith("of the weights) stays as it is: no table of the manifest own names it")


def test_a_denoiser_that_is_left_is_noted() -> None:
    plan = plan_conversion(_stable_diffusion())
    sizes = {c.source.name: c.weight_bytes[0] for c in plan.components}
    share = 100 * sizes["unet"] / sum(sizes.values())
    (note,) = [n for n in plan.notes if n.startswith("unet")]
    assert f"unet (UNet2DConditionModel, {sizes['unet'] / 1e6:.2f} MB, {share:.1f}% of the weights) stays" in note
    assert any(t.decision.fp8 for c in plan.components for t in c.tensors)


def test_nothing_eligible_says_why_with_counts(tmp_path: Path) -> None:
    manifest = own(tmp_path, "norm_q")
    with pytest.raises(ConvertError) as caught:
        plan_conversion(saved("z_image"), manifest=manifest)
    message = str(caught.value)
    assert "becomes FP8 with the manifest own (transformer: not eligible (" in message
    assert "dry-run" not in message
    assert message.endswith("pass --manifest with one that names its layers.")


def test_a_dry_run_shows_the_plan_that_is_refused(tmp_path: Path) -> None:
    """A manifest of one's own is written from it; the exit code says that it would not be converted."""
    for pattern, why in (("norm_q", "Nothing in "), ("context_refiner.*.attention.to_q", "Only 1.4% ")):
        arguments = [str(saved("z_image")), "--dry-run", "--manifest", own(tmp_path, pattern)]
        shown = CliRunner().invoke(main, arguments)
        assert shown.exit_code == 1
        assert shown.stderr.splitlines()[-1].startswith(f"error: {why}")
        assert "not eligible" in shown.stdout
        assert "total: " in shown.stdout
        plan = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
        tensors = [t for c in plan["components"] for shard in c["shards"] for t in shard["tensors"]]
        assert any(t["rule"] == "not eligible" for t in tensors)
    with pytest.raises(PlanRefusedError) as caught:
        convert(saved("z_image"), tmp_path / "out", manifest=own(tmp_path, "norm_q"))
    assert not any(t.decision.fp8 for c in caught.value.plan.components for t in c.tensors)
    assert not (tmp_path / "out").exists()


def test_nothing_but_what_the_user_ignores(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"attention \(\d+ tensors, .*; drop some of the ignored layers\."):
        plan_conversion(saved("z_image"), manifest=own(tmp_path, "attention"), ignored_layers=["attention"])


def test_alignment_is_named_as_the_reason() -> None:
    with pytest.raises(ConvertError, match=r"\(CLIPTextModel: no multiple of 128x128 \(12 tensors, .*, such as "):
        plan_conversion(_narrow_clip())


def test_what_a_format_cannot_hold_is_no_hole_in_a_manifest() -> None:
    """Both rules of alignment are the format's, not a rule that the manifest forgot."""
    for rule in ("no multiple of 128x128", "element count no multiple of 4"):
        how = Decision("a", "", "Linear", WeightFormat(STORAGE))
        fp8 = PlannedTensor(TensorInfo("a.weight", "BF16", (4, 4), 0, 32), how)
        kept = PlannedTensor(TensorInfo("b.weight", "BF16", (3, 5), 32, 62), Decision(rule, "", "Linear"))
        rules = ComponentRules("text_encoder", STORAGE)
        assert kept_note("text_encoder", [fp8, kept], rules, ()) is None


def test_experts_are_called_experts() -> None:
    for stacked in (True, False):
        plan = plan_conversion(_mixture(stacked))
        decisions = {t.info.name: t.decision for t in plan.components[0].tensors}
        experts = {n for n in decisions if ".experts." in n and not n.endswith("_bias")}
        assert experts
        assert {decisions[n].rule for n in experts} == {"experts"}
        assert {n for n, d in decisions.items() if d.rule == "experts"} == experts
        (note,) = plan.notes
        assert " stay as they are: experts (" in note


def test_a_plan_tells_what_compact_would_save() -> None:
    plain, compact = (plan_conversion(saved("qwen_image"), compact=c) for c in (False, True))
    before, after = (sum(c.weight_bytes[1] for c in plan.components) for plan in (plain, compact))
    assert plain.compact_saves == before - after
    assert compact.compact_saves == 0
    assert "--compact would store the ignored DiT layers in FP8 too: " in render_plan(plain)
    assert "--compact" not in render_plan(compact)
    assert plan_conversion(saved("wan22")).compact_saves == 0
    assert plan_conversion(saved("qwen_image"), ignored_layers=["img_mod", "txt_mod", "img_mlp"]).compact_saves == 0


# Real classes that tests/pipelines.py does not have


def _temporary() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="fp8-convert-coverage-")
    _FOLDERS.append(folder)  # removed when the process ends
    return Path(folder.name)


_FOLDERS: list[Any] = []


def _clip(width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config).to(torch.bfloat16)


@functools.cache
def _narrow_clip() -> Path:
    folder = _temporary()
    with quiet_libraries():
        _clip(96).save_pretrained(folder)
    return folder


@functools.cache
def _stable_diffusion() -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
    )
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
    folder = _temporary()
    with quiet_libraries():
        StableDiffusionPipeline(
            vae=vae.to(torch.bfloat16),
            text_encoder=_clip(128),
            tokenizer=_clip_tokenizer(),
            unet=unet.to(torch.bfloat16),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


@functools.cache
def _mixture(stacked: bool) -> Path:
    """A text encoder with experts: GPT-OSS keeps them stacked on disk too, Qwen3-MoE has one tensor for each."""
    import transformers

    family, more = ("GptOss", {"num_local_experts": 4}) if stacked else ("Qwen3Moe", {"num_experts": 4})
    config = getattr(transformers, f"{family}Config")(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_experts_per_tok=2,
        **more,
    )
    folder = _temporary()
    with quiet_libraries():
        getattr(transformers, f"{family}Model")(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
