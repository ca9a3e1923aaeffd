"""Manifests: the parser's strictness, and which manifest a snapshot gets."""

import json
import re
from dataclasses import fields
from importlib import resources
from pathlib import Path

import pytest

from fp8_convert.converter.plan.manifest import (
    SECTIONS,
    ComponentRules,
    FusionGroup,
    Manifest,
    Rule,
    choose_manifest,
    load_manifest,
    parse_manifest,
    shipped,
)
from fp8_convert.converter.telling.errors import ConvertError

GOOD = """
name = "x"
description = "for tests"
repos = ["org/x"]
pipelines = ["XPipeline"]
standalone_classes = ["XModel"]

[components.transformer]
classes = ["XModel"]
mode = "w8a8"
why = "because"
kinds = ["Linear"]
weight_block_size = [64, 128]
unaligned = "keep"

[[components.transformer.eligible]]
pattern = "attn"
why = "evidence"

[[components.transformer.fusion_groups]]
parent = "attn"
members = ["to_q", "to_k"]
aliases = ["to_qk"]
why = "evidence"

[components."text_encoder*"]
mode = "keep"
"""


def parse(text: str) -> None:
    parse_manifest(text.encode(), "x.toml")


def test_a_good_manifest() -> None:
    manifest = parse_manifest(GOOD.encode(), "x.toml")
    assert (manifest.name, manifest.repos, manifest.pipelines) == ("x", ("org/x",), ("XPipeline",))
    rules = manifest.components[0]
    assert (rules.component, rules.mode, rules.kinds, rules.unaligned) == ("transformer", "w8a8", ("Linear",), "keep")
    assert rules.weight_block_size == (64, 128)
    assert rules.eligible == (Rule("attn", "evidence"),)
    assert rules.fusion_groups == (FusionGroup("attn", ("to_q", "to_k"), ("to_qk",), "evidence"),)
    assert manifest.components[1].weight_block_size is None
    assert manifest.components[1].unaligned == "pad"


def test_the_digest_is_that_of_the_file() -> None:
    digest = parse_manifest(b'name = "x"', "x.toml").sha256
    assert digest == "6cd7d1c8ee3acd79214d0b88cab5d050866f55a5e578f1fe6dcac789e5213ac8"
    assert parse_manifest(b'name = "x" # remark', "x.toml").sha256 != digest


CHANGES = {
    "unknown key at the top": (
        'name = "x"',
        'name = "x"\ncolour = 1',
        "x.toml: unknown key 'colour'; known keys are name,",
    ),
    "mistyped key at the top": ('name = "x"', 'name = "x"\nnames = 1', "unknown key 'names'; did you mean 'name'?"),
    "unknown key of a component": (
        'mode = "keep"',
        'mode = "keep"\nignored_layer = []',
        r"x.toml, components.text_encoder\*: unknown key 'ignored_layer'; did you mean 'ignored_layers'?",
    ),
    "unknown key of a rule": ('pattern = "attn"', 'pattern = "attn"\nwho = "me"', r"eligible\[0\]: unknown key 'who'"),
    "unknown key of a group": ('parent = "attn"', 'parent = "attn"\nx = 1', r"fusion_groups\[0\]: unknown key 'x'"),
    "no name": ('name = "x"', "", "'name' is missing; add it, a string"),
    "empty name": ('name = "x"', 'name = ""', "'name' must be a string that is not empty, not ''"),
    "name a number": ('name = "x"', "name = 1", "x.toml: 'name' must be a string, not 1"),
    "description a number": ('"for tests"', "1", "'description' must be a string, not 1"),
    "repos a string": ('["org/x"]', '"org/x"', "'repos' must be a list of strings, not 'org/x'"),
    "repos an empty string": ('["org/x"]', '""', "'repos' must be a list of strings, not ''"),
    "repos false": ('["org/x"]', "false", "'repos' must be a list of strings, not False"),
    "repos with a number": ('["org/x"]', "[1]", r"'repos' must be a list of strings, not \[1\]"),
    "a long value": (
        '["org/x"]',
        str(list(range(99))),
        r"'repos' must be a list of strings, not \[0, 1, .{40,60}…; correct",
    ),
    "no mode": ('mode = "keep"', "", "'mode' is missing; add it, one of w8a8, storage, keep"),
    "unknown mode": ('mode = "keep"', 'mode = "fp4"', "'mode' must be one of w8a8, storage, keep, not 'fp4'"),
    "mode a list": ('mode = "keep"', 'mode = ["keep"]', r"'mode' must be one of w8a8, storage, keep, not \['keep'\]"),
    "unknown kind": (
        'kinds = ["Linear"]',
        'kinds = ["Embedding"]',
        r"'kinds' must be a list with any of Linear, Conv2d, Conv3d, not \['Embedding'\]",
    ),
    "no kinds": ('kinds = ["Linear"]', "", "mode 'w8a8' needs kinds and eligible patterns"),
    "block of one number": ("[64, 128]", "[64]", r"'weight_block_size' must be two positive integers, not \[64\]"),
    "block of zero": ("[64, 128]", "[64, 0]", r"'weight_block_size' must be two positive integers, not \[64, 0\]"),
    "block of truths": ("[64, 128]", "[true, true]", "'weight_block_size' must be two positive integers, not"),
    "block of strings": ("[64, 128]", '["64", "128"]', "'weight_block_size' must be two positive integers, not"),
    "unknown scales": (
        "weight_block_size = [64, 128]",
        'weight_scales = "row"',
        "'weight_scales' must be one of tensor, channel, not 'row'",
    ),
    "scales of rows and blocks": (
        "[64, 128]",
        '[64, 128]\nweight_scales = "channel"',
        "'weight_scales' and 'weight_block_size' exclude each other; drop one",
    ),
    "unknown unaligned": ('"keep"\n\n[[', '"drop"\n\n[[', "'unaligned' must be one of pad, keep, not 'drop'"),
    "optional a string": ('pattern = "attn"', 'pattern = "attn"\noptional = "yes"', "'optional' must be true or false"),
    "optional a number": (
        'mode = "keep"',
        'mode = "keep"\noptional = 1',
        r"\*: 'optional' must be true or false, not 1",
    ),
    "optional a list": (
        'name = "x"',
        'name = "x"\noptional = []',
        r"x.toml: 'optional' must be true or false, not \[\]",
    ),
    "rule without a pattern": ('pattern = "attn"', "", r"eligible\[0\]: 'pattern' is missing; add it, a string"),
    "rule without evidence": (
        'pattern = "attn"\nwhy = "evidence"',
        'pattern = "attn"',
        r"x.toml, components.transformer, eligible\[0\]: 'why' is missing; add it, a string",
    ),
    "rule with empty evidence": ('pattern = "attn"\nwhy = "evidence"', 'pattern = "attn"\nwhy = ""', "'why' must be"),
    "bad regular expression": (
        'pattern = "attn"',
        'pattern = "re:("',
        r"x.toml, components.transformer, eligible\[0\]: The pattern 're:\(' is not a valid regular expression",
    ),
    "empty pattern": ('pattern = "attn"', 'pattern = "."', r"eligible\[0\]: An empty pattern"),
    "group of one": ('["to_q", "to_k"]', '["to_q"]', "at least two members, not 1"),
    "bad parent": ('parent = "attn"', 'parent = "re:["', r"fusion_groups\[0\]: The pattern 're:\[' is not a valid"),
    "no TOML": ('name = "x"', "name = ", "x.toml is not valid TOML"),
    "a key twice": ('name = "x"', 'name = "x"\nname = "y"', "x.toml is not valid TOML"),
}


@pytest.mark.parametrize(("old", "new", "message"), CHANGES.values(), ids=CHANGES)
def test_strictness(old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1
    with pytest.raises(ConvertError, match=message):
        parse(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"\ncomponents = []', r"'components' must be a table, not \[\]"),
        ('name = "x"\ncomponents = "transformer"', "'components' must be a table, not 'transformer'"),
        ('name = "x"\n[components]\ntransformer = 1', "x.toml, components.transformer must be a table, not 1"),
        ('name = "x"\n[components.t]\nmode = "keep"\neligible = ""', "'eligible' must be an array of tables"),
        ('name = "x"\n[components.t]\nmode = "keep"\neligible = ["attn"]', r"eligible\[0\] must be a table"),
        ('name = "x"\n[components.t]\nmode = "keep"\n[components.t.eligible]\npattern = "a"', "'eligible' must be an"),
        ('name = "x"\n[components.t]\nmode = "w8a8"\nkinds = ["Linear"]', "needs kinds and eligible patterns"),
        ("a = " + "[" * 100_000, "not valid TOML"),
    ],
)
def test_wrong_structure(text: str, message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        parse(text)


def test_text_that_is_no_utf_8() -> None:
    with pytest.raises(ConvertError, match="not valid TOML"):
        parse_manifest(b'name = "\xff"', "x.toml")


def test_the_documented_schema_parses_and_has_every_key() -> None:
    readme = Path(__file__).parents[3] / "manifests" / "README.md"
    (example,) = re.findall(r"```toml\n(.*?)```", readme.read_text(), re.DOTALL)
    manifest = parse_manifest(example.encode(), "README.md")
    rules = manifest.components[0]
    assert (manifest.optional, rules.optional, rules.never_layers[0].optional) == (True, True, True)
    stated = {line.partition(" = ")[0] for line in example.splitlines() if " = " in line}
    keys = {f.name for cls in (Manifest, ComponentRules, FusionGroup, Rule) for f in fields(cls)}
    assert keys - {"sha256", "text", "path", "component", "components", *SECTIONS, "fusion_groups"} == stated


def test_documented_sizes_are_the_golden_ones() -> None:
    golden = json.loads(Path(__file__).with_name("golden_manifests.json").read_text())
    models = {
        "Qwen-Image-2.1": "qwen-image-2.1",
        "FLUX.1": "flux.1",
        "FLUX.2-dev": "flux.2",
        "FLUX.2-klein-4B": "flux.2/klein-4b",
        "Stable Diffusion 3.5 large": "sd3.5",
        "Stable Diffusion 3.5 medium": "sd3.5/medium",
        "HunyuanVideo-1.5": "hunyuanvideo-1.5",
        "LTX-2": "ltx-2",
    }
    text = (Path(__file__).parents[3] / "manifests" / "README.md").read_text()
    for label, model in models.items():
        plain, compact = (golden[model][variant]["transformer"]["bytes"] for variant in ("plain", "compact"))
        sizes = [size / 1e9 for size in (*plain, compact[1])]
        assert f"| {label} | {' | '.join(f'{size:.1f}' for size in sizes)} |" in text
    assert {name for name in shipped() if f"| `{name}` |" not in text} == set()


# Choosing


def test_manifests_by_name_and_by_path(tmp_path: Path) -> None:
    assert load_manifest("qwen-image") == shipped()["qwen-image"]
    path = tmp_path / "x.toml"
    path.write_text(GOOD)
    manifest = load_manifest(str(path))
    assert (manifest.name, manifest.path, manifest.where, manifest.text) == ("x", str(path), str(path), GOOD)
    assert load_manifest("z-image").where == "z-image.toml"
    with pytest.raises(ConvertError, match=r"no manifest named 'qwen'; use one of default, .*qwen-image"):
        load_manifest("qwen")
    with pytest.raises(ConvertError, match=r"gone\.toml cannot be read"):
        load_manifest(str(tmp_path / "gone.toml"))


def test_a_manifest_of_ones_own_is_named_like_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    with pytest.raises(
        ConvertError, match=r"mine\.toml: 'name' must be 'mine', as the file is called, not 'x'; correct"
    ):
        load_manifest(str(path))


def test_a_shipped_manifest_is_named_like_its_file() -> None:
    files = {e.name: e for e in resources.files("fp8_convert.manifests").iterdir() if e.name.endswith(".toml")}
    assert files
    assert {name: f"{parse_manifest(e.read_bytes(), name).name}.toml" for name, e in files.items()} == {
        n: n for n in files
    }


QWEN = {"transformer": "QwenImageTransformer2DModel", "text_encoder": "Qwen2_5_VLForConditionalGeneration"}


@pytest.mark.parametrize(
    ("repo", "pipeline", "classes", "name"),
    [
        ("Qwen/Qwen-Image", None, {}, "qwen-image"),
        ("qwen/qwen-image-2512", "Anything", {}, "qwen-image"),
        ("Qwen/Qwen-Image-Edit", None, {}, "qwen-image-edit"),
        ("Qwen/Qwen-Image-Layered", None, {}, "qwen-image-layered"),
        ("Tongyi-MAI/Z-Image-Turbo", None, {}, "z-image"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", None, {}, "wan2.2"),
        ("me/finetune", "QwenImagePipeline", QWEN, "qwen-image"),
        (None, "QwenImagePipeline", QWEN, "qwen-image"),
        (None, "QwenImageEditPlusPipeline", QWEN, "qwen-image-edit"),
        (None, "QwenImagePipeline", {**QWEN, "transformer": "SomethingElse"}, "default"),
        (None, "UnheardOfPipeline", QWEN, "default"),
        (None, None, {"": "ZImageTransformer2DModel"}, "z-image"),
        (None, None, {"": "QwenImageTransformer2DModel"}, "qwen-image"),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", None, {}, "wan2.2"),
        (None, "FluxKontextPipeline", {"transformer": "FluxTransformer2DModel"}, "flux.1"),
        (None, "StableDiffusion3Pipeline", {"transformer": "SD3Transformer2DModel", "text_encoder_3": None}, "default"),
        (None, None, {"": "FluxTransformer2DModel"}, "flux.1"),
        (None, None, {"": "AuraFlowTransformer2DModel"}, "default"),
        (None, None, {"": None}, "default"),
    ],
)
def test_choosing(repo: str | None, pipeline: str | None, classes: dict[str, str | None], name: str) -> None:
    assert choose_manifest(repo, pipeline, classes).name == name


def test_rules_for_a_component() -> None:
    manifest = parse_manifest(GOOD.encode(), "x.toml")
    transformer, text_encoder = manifest.components
    assert manifest.rules_for("transformer", "XModel") is transformer
    assert manifest.rules_for("transformer", "Other") is None
    assert manifest.rules_for("transformer_2", "XModel") is None
    assert manifest.rules_for("text_encoder_2", "Any") is text_encoder
    assert manifest.rules_for("", "XModel") is transformer  # a component's folder, alone
    assert manifest.rules_for("", "T5EncoderModel") is text_encoder
    assert manifest.rules_for("vae", "AutoencoderKL") is None


@pytest.mark.parametrize("name", ["z-image", "qwen-image", "wan2.2"])
def test_a_lone_component_of_another_class_gets_no_rules_that_name_theirs(name: str) -> None:
    rules = shipped()[name].rules_for("", "FluxTransformer2DModel")
    assert rules is None
