"""Entries of a manifest that match nothing: each is an error that names file, section, value and the nearest name."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import own_manifests
import pytest
from click.testing import CliRunner, Result
from hub_server import running_hub
from pipelines import BUILDERS, copied, saved
from safetensors.torch import load_file, save_file

from fp8_convert.converter import ConvertError, check_manifest, load_manifest, plan_conversion
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.plan.manifest import SECTIONS, FusionGroup, Manifest, parse_manifest, shipped
from fp8_convert.converter.plan.matching import components_of, match_entries, match_tables, refuse_problems
from fp8_convert.converter.plan.pattern import matches
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.converter.snapshot.locate import describe_source, open_files
from fp8_convert.converter.snapshot.modules import ModuleMap, module_map
from fp8_convert.converter.snapshot.snapshot import Snapshot

PIPELINES = {
    "flux.1": "flux",
    "qwen-image": "qwen_image",
    "qwen-image-edit": "qwen_image_edit_plus",
    "qwen-image-layered": "qwen_image_layered",
    "wan2.2": "wan22",
    "z-image": "z_image",
}


@functools.cache
def opened(name: str) -> tuple[Snapshot, dict[str, ModuleMap]]:
    snapshot = describe_source(open_files(saved(name), HubAccess()), HubAccess())
    return snapshot, {c.name: module_map(c) for c in snapshot.components}


def refused(manifest: Manifest, name: str) -> str:
    """The message with which a conversion of the pipeline refuses the manifest, "" if it does not."""
    snapshot, maps = opened(name)
    found = match_tables(manifest, snapshot)
    for table in manifest.components:
        components = components_of(manifest, table, snapshot)
        if components and table.mode != "keep":
            found += match_entries(manifest, table, components, [maps[c.name] for c in components])
    try:
        refuse_problems(manifest, found)
    except ConvertError as error:
        return str(error)
    return ""


def typos(text: str) -> Iterator[tuple[str, str]]:
    """The text with one of its words mistyped, and that word."""
    for found in re.finditer(r"(?<!\\)[A-Za-z_]{3,}", text):
        middle = len(found[0]) // 2
        mistyped = found[0][:middle] + found[0][middle - 1] + found[0][middle:]
        yield text[: found.start()] + mistyped + text[found.end() :], found[0]


def with_table(manifest: Manifest, index: int, **changes: Any) -> Manifest:
    tables = list(manifest.components)
    tables[index] = replace(tables[index], **changes)
    return replace(manifest, components=tuple(tables))


EVERY_RULE = [
    pytest.param(name, index, section, number, id=f"{name}-{table.component}-{section}-{number}")
    for name in PIPELINES
    for index, table in enumerate(shipped()[name].components)
    for section in SECTIONS
    for number in range(len(table.rules(section)))
]
EVERY_GROUP = [
    pytest.param(name, index, number, id=f"{name}-{table.component}-{number}")
    for name in PIPELINES
    for index, table in enumerate(shipped()[name].components)
    for number in range(len(table.fusion_groups))
]
EVERY_TABLE = [
    pytest.param(name, index, id=f"{name}-{table.component}")
    for name in PIPELINES
    for index, table in enumerate(shipped()[name].components)
]


@pytest.mark.parametrize(("name", "index", "section", "number"), EVERY_RULE)
def test_a_mistyped_pattern(name: str, index: int, section: str, number: int) -> None:
    manifest = shipped()[name]
    table = manifest.components[index]
    rules = list(table.rules(section))
    snapshot, maps = opened(PIPELINES[name])
    names = [n for c in components_of(manifest, table, snapshot) for n in maps[c.name].kinds]
    mistyped, word = next((p, w) for p, w in typos(rules[number].pattern) if not any(matches(p, n) for n in names))
    rule = rules[number] = replace(rules[number], pattern=mistyped)
    message = refused(with_table(manifest, index, **{section: tuple(rules)}), PIPELINES[name])
    if rule.optional:
        assert message == ""
        return
    place = (
        f"{name}.toml, components.{table.component}, {section}[{number}]: the pattern {mistyped!r} matches no module"
    )
    assert message.startswith(place)
    near = re.search(r"\(did you mean (.*?)\?\)", message)
    assert near, message
    assert word in near[1]


@pytest.mark.parametrize(("name", "index", "number"), EVERY_GROUP)
def test_a_mistyped_fusion_group(name: str, index: int, number: int) -> None:
    manifest = shipped()[name]
    table = manifest.components[index]
    group = table.fusion_groups[number]

    def message(changed: FusionGroup) -> str:
        groups = [*table.fusion_groups[:number], changed, *table.fusion_groups[number + 1 :]]
        return refused(with_table(manifest, index, fusion_groups=tuple(groups)), PIPELINES[name])

    place = f"{name}.toml, components.{table.component}, fusion_groups[{number}]: "
    mistyped, word = next(typos(group.parent))
    said = message(replace(group, parent=mistyped))
    assert said.startswith(f"{place}the parent {mistyped!r} matches no module")
    assert word in said.partition("did you mean")[2]
    assert message(replace(group, parent=mistyped, optional=True)) == ""
    for position, member in enumerate(group.members):
        members = [*group.members[:position], member + "x", *group.members[position + 1 :]]
        said = message(replace(group, members=tuple(members)))
        assert said.startswith(place)
        assert f"has the member '{member}x' (did you mean {member}" in said


@pytest.mark.parametrize(("name", "index"), EVERY_TABLE)
def test_a_mistyped_component(name: str, index: int) -> None:
    manifest = shipped()[name]
    table = manifest.components[index]
    mistyped, word = next(typos(table.component))
    said = refused(with_table(manifest, index, component=mistyped, optional=False), PIPELINES[name])
    assert said.startswith(f"{name}.toml, components.{mistyped}: ")
    assert "has no such component with weights; it has" in said
    assert f"did you mean {word}" in said
    assert refused(with_table(manifest, index, component=mistyped, optional=True), PIPELINES[name]) == ""


@pytest.mark.parametrize(("name", "index"), EVERY_TABLE)
def test_mistyped_classes(name: str, index: int) -> None:
    manifest = shipped()[name]
    table = manifest.components[index]
    mistyped = tuple(next(typos(c))[0] for c in table.classes)
    said = refused(with_table(manifest, index, classes=mistyped, optional=False), PIPELINES[name])
    if not mistyped:
        assert said == ""
        return
    assert said.startswith(f"{name}.toml, components.{table.component}: it is for the class {mistyped[0]}")
    assert re.search(rf"did you mean ({'|'.join(table.classes)}) instead of ", said)


@pytest.mark.parametrize("source", BUILDERS)
def test_the_shipped_manifests_fit_their_pipelines_and_lone_components(source: str) -> None:
    found = check_manifest(plan_conversion(saved(source)).recipe.manifest.name, saved(source))
    assert found.ok
    for folder in saved(source).iterdir():
        if folder.name.startswith(("transformer", "text_encoder")):
            plan = plan_conversion(folder)
            assert plan.notes == ()
            assert check_manifest(plan.recipe.manifest.name, folder).ok


# One's own manifests, as users run them

OWN = own_manifests.text()


def own(folder: Path, text: str = OWN) -> Path:
    path = folder / "own.toml"
    path.write_text(text)
    return path


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="fp8-convert")
    assert result.exit_code == code, result.output
    return result


def shown(tmp_path: Path, name: str, *changes: tuple[str, str]) -> Path:
    """A copy of a shipped manifest as `manifests show` gives it, with changes."""
    text = run("manifests", "show", name).stdout.replace(f'name = "{name}"', 'name = "own"', 1)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return own(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "place", "near"),
    [
        ("layers.*.adaLN_modulation", "layers.*.adaLN_modulaton", "transformer, ignored_layers[0]", "adaLN_modulation"),
        ('parent = "attention"', 'parent = "atention"', "transformer, fusion_groups[0]", "attention"),
        ('"to_q", "to_k"', '"to_q", "to_kk"', "transformer, fusion_groups[0]", "to_k"),
        ("components.transformer", "components.transfomer", "transfomer", "transformer"),
        (
            'classes = ["ZImageTransformer2DModel"]',
            'classes = ["ZImageTransformr2DModel"]',
            "transformer",
            "ZImageTransf",
        ),
    ],
)
def test_a_typo_in_a_copy_is_refused(tmp_path: Path, old: str, new: str, place: str, near: str) -> None:
    path = shown(tmp_path, "z-image", (old, new))
    first, line = run(saved("z_image"), "-o", tmp_path / "out", "--manifest", path, code=1).stderr.splitlines()
    assert first.endswith(f", manifest {path.stem}")
    assert line.startswith(f"error: {path}, components.{place}: ")
    assert f"did you mean {near}" in line
    assert line.endswith("correct it, or give it optional = true if it need not match.")
    assert not (tmp_path / "out").exists()


def test_a_copy_converts_as_the_shipped_one(tmp_path: Path) -> None:
    plans = [plan_conversion(saved("z_image"), manifest=m) for m in ("z-image", str(shown(tmp_path, "z-image")))]
    assert [t.decision for s in plans[0].shards for t in s.tensors] == [
        t.decision for s in plans[1].shards for t in s.tensors
    ]


def test_optional_entries_may_match_nothing(tmp_path: Path) -> None:
    rule = '[[components.transformer.never_layers]]\npattern = "gone"\nwhy = "a test"\n'
    table = '[components.gone]\nmode = "keep"\n'
    with pytest.raises(ConvertError, match=r"never_layers\[0\]: the pattern 'gone'"):
        plan_conversion(saved("z_image"), manifest=str(own(tmp_path, OWN + rule)))
    with pytest.raises(ConvertError, match=r"components\.gone: .* has no such component"):
        plan_conversion(saved("z_image"), manifest=str(own(tmp_path, OWN + table)))
    both = OWN + rule + "optional = true\n" + table + "optional = true\n"
    assert plan_conversion(saved("z_image"), manifest=str(own(tmp_path, both)))
    assert plan_conversion(saved("z_image"), manifest=str(own(tmp_path, "optional = true\n" + OWN + rule + table)))


def test_several_mistakes_are_counted(tmp_path: Path) -> None:
    path = shown(tmp_path, "z-image", ("adaLN_modulation", "adaLN_modulaton"))
    with pytest.raises(ConvertError, match=r"\(3 more: run `fp8-convert manifests check`\); correct it"):
        plan_conversion(saved("z_image"), manifest=str(path))


def test_a_table_behind_one_that_takes_all_its_components(tmp_path: Path) -> None:
    text = OWN.replace("transformer]", '"transformer*"]').replace("transformer.", '"transformer*".')
    text = text.replace("layers.*", "blocks.*") + '[components.transformer_2]\nmode = "keep"\n'
    with pytest.raises(ConvertError, match=r"transformer_2: components\.transformer\* comes first for transformer_2"):
        plan_conversion(saved("wan22"), manifest=str(own(tmp_path, text)))


def test_storage_of_what_is_not_ignored(tmp_path: Path) -> None:
    text = OWN + '[[components.transformer.storage_layers]]\npattern = "adaLN_modulation"\nwhy = "a test"\n'
    with pytest.raises(ConvertError, match=r"storage_layers\[0\]: .* matches no module that ignored_layers names"):
        plan_conversion(saved("z_image"), manifest=str(own(tmp_path, text)))


def test_patterns_of_any_kind_of_module_and_in_any_order_count(tmp_path: Path) -> None:
    """A norm is no `kinds`, and `attention` is shadowed by `layers.*`: both exist, and that is what is asked."""
    text = "".join(
        f'[[components.transformer.{section}]]\npattern = "{pattern}"\nwhy = "a test"\n'
        for section, pattern in (("never_layers", "norm_q"), ("eligible", "attention"))
    )
    assert plan_conversion(saved("z_image"), manifest=str(own(tmp_path, OWN + text)))


ENCODERS = """
name = "own"
[components."text_encoder*"]
mode = "storage"
kinds = ["Linear"]
[[components."text_encoder*".eligible]]
pattern = "self_attn"
why = "CLIP"
[[components."text_encoder*".eligible]]
pattern = "SelfAttention"
why = "T5"
"""


@pytest.mark.parametrize("components", [[], ["text_encoder"], ["text_encoder_2"]])
def test_a_table_for_several_components_is_held_against_all(tmp_path: Path, components: list[str]) -> None:
    path = own(tmp_path, ENCODERS)
    assert plan_conversion(saved("flux"), manifest=str(path), components=components)
    path = own(tmp_path, ENCODERS.replace("SelfAttention", "SelfAtention"))
    with pytest.raises(ConvertError, match=r"no module of text_encoder or text_encoder_2 \(did you mean SelfAttention"):
        plan_conversion(saved("flux"), manifest=str(path), components=components)


def test_a_class_that_cannot_be_built_hides_no_typo_of_others_and_blames_nobody(tmp_path: Path) -> None:
    source = copied(saved("flux"), tmp_path / "source")
    index = json.loads((source / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "NoSuchModel"]
    (source / "model_index.json").write_text(json.dumps(index))
    plan = plan_conversion(source, manifest=str(own(tmp_path, ENCODERS)))  # "self_attn" may be meant for NoSuchModel
    assert any("NoSuchModel" in note for note in plan.notes)
    found = check_manifest(str(own(tmp_path, ENCODERS)), source)
    assert not found.ok
    assert "NoSuchModel" in found.unchecked["text_encoder"]
    assert not any(m.problem for m in found.matches)
    with pytest.raises(ConvertError, match="'attnn' matches no linear layer"):  # the DiT's own class can be built
        plan_conversion(source, ignored_layers=["attnn"])


def test_a_checkpoint_with_foreign_names_is_no_mistake_of_the_manifest(tmp_path: Path) -> None:
    source = copied(saved("z_image"), tmp_path / "source")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({f"model.diffusion_model.{n}": t for n, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ConvertError, match=r"Only 0\.0% .* of transformer .*: unknown module \(\d+ tensors.* model\."):
        plan_conversion(source)
    found = check_manifest("z-image", source)
    assert found.unchecked == {"transformer": "none of its weights is named like a module of ZImageTransformer2DModel"}


def test_a_lone_component_that_no_table_is_for() -> None:
    with pytest.raises(ConvertError, match=r"z-image\.toml has no rules for WanTransformer3DModel: it is written for"):
        plan_conversion(saved("wan22") / "transformer", manifest="z-image")


# The commands


def test_show_gives_the_file_itself() -> None:
    for name, manifest in shipped().items():
        text = run("manifests", "show", name).stdout
        assert parse_manifest(text.encode(), "shown").sha256 == manifest.sha256


def test_show_a_path_and_json(tmp_path: Path) -> None:
    path = own(tmp_path)
    assert run("manifests", "show", path).stdout == OWN
    data = json.loads(run("manifests", "show", path, "--json").stdout)
    assert data["sha256"] == load_manifest(str(path)).sha256
    assert data["components"][0]["eligible"] == [{"pattern": "layers.*", "why": "a test", "optional": False}]
    assert "no manifest named 'nmae'" in run("manifests", "show", "nmae", code=1).stderr


def test_check_counts_and_names_what_each_entry_matches(tmp_path: Path) -> None:
    text = run("manifests", "check", "z-image", saved("z_image")).stdout
    assert re.search(r"^  never_layers +2 +cap_embedder +cap_embedder\.0, cap_embedder\.1$", text, re.MULTILINE)
    assert re.search(r"^  never_layers +0  optional +lm_head$", text, re.MULTILINE)
    assert "components.vae applies to vae" in text
    assert text.endswith("\nok\n")
    data = json.loads(run("manifests", "check", "z-image", saved("z_image"), "--json").stdout)
    assert data["ok"] is True
    _, maps = opened("z_image")
    for match in data["matches"]:
        if match["section"] in SECTIONS:
            names = [n for n in maps[match["table"]].kinds if matches(match["entry"], n)]
            assert (match["count"], match["examples"]) == (len(names), names[:3])
    (group,) = [m for m in data["matches"] if m["entry"] == "feed_forward.(w1|w3)"]
    assert group["count"] == sum(n.endswith(("feed_forward.w1", "feed_forward.w3")) for n in maps["transformer"].kinds)


def test_check_flags_every_mistake_and_exits_with_one(tmp_path: Path) -> None:
    changes = ("adaLN_modulation", "adaLN_modulaton"), ('parent = "feed_forward"', 'parent = "fed_forward"')
    path = shown(tmp_path, "z-image", *changes)
    result = run("manifests", "check", path, saved("z_image"), code=1)
    assert result.stderr == ""
    assert result.stdout.count("PROBLEM: ") == 5
    assert f"PROBLEM: {path}, components.transformer, fusion_groups[1]: the parent 'fed_forward'" in result.stdout
    assert result.stdout.endswith("\n5 problems\n")
    data = json.loads(run("manifests", "check", path, saved("z_image"), "--json", code=1).stdout)
    assert data["ok"] is False
    assert len([m for m in data["matches"] if m["problem"]]) == 5


def test_check_names_components_without_a_table(tmp_path: Path) -> None:
    text = run("manifests", "check", own(tmp_path), saved("z_image")).stdout
    assert "no table names text_encoder: it is kept" in text
    assert "no table names vae: it is kept" in text


def test_check_a_hub_repository_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("me/model", saved("z_image"))
        assert run("manifests", "check", "z-image", "me/model", "--revision", "main").stdout.endswith("\nok\n")
        assert "me/model" in run("manifests", "check", "z-image", "me/model", "--revision", "gone", code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "show", "default"], "Put --json behind `manifests show`"),
        (["chek", "z-image", "x"], "chek"),
        (["check", "z-image"], "SOURCE"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    assert message in run("manifests", *arguments, code=2).stderr


@pytest.mark.parametrize("command", ["show", "check"])
def test_help_has_an_example(command: str) -> None:
    assert f"fp8-convert manifests {command}" in run("manifests", command, "-h").stdout
