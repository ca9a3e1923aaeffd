"""The model card: what it takes from the source's card, what it says of each record, and that names are only names."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipelines import copied, saved

from fp8_convert.converter import convert
from fp8_convert.converter.format.record import Record, RecordedFile, RecordedRecipe, RecordedSource
from fp8_convert.converter.output.card import front_matter, may_replace, model_card
from fp8_convert.converter.output.record import load_record
from fp8_convert.converter.telling.quantities import byte_count, change

REPO = "me/model-fp8"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = "https://huggingface.co"


@dataclass(frozen=True, repr=False, kw_only=True)
class Recipe(RecordedRecipe):
    """A recipe that says what it was made for, and with which LoRAs."""

    target: str = "native"
    merged_loras: tuple[dict[str, Any], ...] = ()


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    folder = tmp_path_factory.mktemp("card")
    source = copied(saved("qwen_image"), folder / "source")
    (source / "LICENSE.md").write_text("a licence")
    (source / "README.md").write_text("a card")
    convert(source, folder / "out")
    found = load_record(folder / "out")
    assert found is not None
    return replace(found, source=replace(found.source, repo="Qwen/Qwen-Image", commit=COMMIT))


def card(record: Record, **data: Any) -> str:
    return model_card(record, data, REPO).decode()


def head(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def made_for(record: Record, target: str) -> Record:
    recipe = {f.name: getattr(record.recipe, f.name) for f in fields(record.recipe)}
    return replace(record, recipe=Recipe(**{**recipe, "target": target}))


def with_why(record: Record, **changes: str) -> Record:
    """The same, with another first decision of its DiT."""
    component = record.components["transformer"]
    first, *rest = component.decisions
    changed = replace(component, decisions=(replace(first, **changes), *rest))  # type: ignore[arg-type]
    return replace(record, components={**record.components, "transformer": changed})


# The head


def test_the_head_names_the_base_model(record: Record) -> None:
    assert head(card(record)) == {
        "base_model": "Qwen/Qwen-Image",
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "tags": ["fp8", "fp8-convert"],
    }


def test_licence_language_and_task_are_the_sources_and_nothing_else(record: Record) -> None:
    carried = {"license": "other", "license_name": "own", "language": ["en", "zh"], "pipeline_tag": "text-to-image"}
    others = {
        "base_model": "some/base",
        "tags": ["lora"],
        "model-index": [{}],
        "extra_gated_prompt": "sign",
        "widget": [],
    }
    found = head(card(record, **carried, **others))
    assert carried.items() <= found.items()
    assert found["base_model"] == "Qwen/Qwen-Image"
    assert found.keys() - carried.keys() == {"base_model", "base_model_relation", "library_name", "tags"}


@pytest.mark.parametrize("value", [1, None, "", [], {"a": "b"}, [1], "x" * 1000, ["mit", None]])
def test_what_is_no_text_is_not_carried(record: Record, value: Any) -> None:
    assert "license" not in head(card(record, license=value))


@pytest.mark.parametrize(
    ("link", "carried"),
    [
        ("LICENSE.md", "LICENSE.md"),
        ("terms/LICENSE", f"{HUB}/Qwen/Qwen-Image/blob/{COMMIT}/terms/LICENSE"),
        ("https://example.org/terms", "https://example.org/terms"),
    ],
)
def test_a_link_to_the_licence_still_leads_there(record: Record, link: str, carried: str) -> None:
    assert head(card(record, license_link=link))["license_link"] == carried


def test_a_folder_is_no_base_model(record: Record) -> None:
    text = card(replace(record, source=RecordedSource(repo=None, commit=None, pipeline="QwenImagePipeline")))
    assert not {"base_model", "base_model_relation"} & head(text).keys()
    assert "Weights of a folder with QwenImagePipeline" in text


def test_a_component_on_its_own_names_its_library(record: Record) -> None:
    alone = replace(record, source=replace(record.source, pipeline=None))
    for folder, library in (("text_encoder", "transformers"), ("transformer", "diffusers")):
        shards = {path: shard for path, shard in alone.shards.items() if path.startswith(f"{folder}/")}
        assert head(card(replace(alone, shards=shards)))["library_name"] == library


# The text


def test_it_says_what_it_was_made_from(record: Record) -> None:
    text = card(record)
    assert (
        f"[Qwen/Qwen-Image]({HUB}/Qwen/Qwen-Image) at commit [`{COMMIT[:12]}`]({HUB}/Qwen/Qwen-Image/tree/{COMMIT})"
        in text
    )
    assert "[the source's card](README.source.md)" in text
    assert "The licence is the source's: [LICENSE.md](LICENSE.md)." in text
    assert "The licence is the source's: `mit` ([LICENSE.md](LICENSE.md))." in card(record, license="mit")
    assert record.record_sha256 in text


def test_a_source_without_card_and_licence(record: Record) -> None:
    files = {path: file for path, file in record.files.items() if path not in ("README.md", "LICENSE.md")}
    text = card(replace(record, files=files))
    assert "README.source.md" not in text
    assert "No licence is known here; ask those who made the source" in text


def test_every_size_and_decision_is_in_it(record: Record) -> None:
    text = card(record)
    components = record.components.values()
    assert change(sum(c.bytes_before for c in components), sum(c.bytes_after for c in components)) in text
    for component in components:
        assert f"{byte_count(component.bytes_before)} | {byte_count(component.bytes_after)}" in text
        for decision in component.decisions:
            assert f"{decision.mode} {decision.scheme}" in text or decision.mode is None
            assert f"| {decision.tensors} |" in text
            assert decision.rule.replace("|", "\\|") in text


def test_every_setting_is_in_it(record: Record) -> None:
    text = card(record)
    for field in fields(record.recipe):
        assert f"\n| `{field.name}` | " in text
    assert f"| `manifest_sha256` | `{record.recipe.manifest_sha256}` |" in text


@pytest.mark.parametrize(
    "folder", sorted((Path(__file__).parents[2] / "released").glob("format-*")), ids=lambda f: f.name
)
def test_snapshots_of_every_format_have_a_card(folder: Path) -> None:
    found = load_record(folder)
    assert found is not None
    assert found.record_sha256 in card(found)


def test_it_claims_no_quality(record: Record) -> None:
    assert "Nothing was measured on this snapshot" in card(record)


def imported(record: Record, **recipe: Any) -> Record:
    """A record as an import onto a Hub repository leaves it."""
    component = replace(record.components["transformer"], imported="ComfyUI")
    source = RecordedSource(
        repo=None, commit=None, pipeline="QwenImagePipeline", base_repo="Qwen/Qwen-Image", base_commit=COMMIT
    )
    return replace(
        record,
        source=source,
        recipe=replace(record.recipe, **recipe),
        components={**record.components, "transformer": component},
    )


def test_an_import_claims_nothing_of_how_it_was_quantised(record: Record) -> None:
    text = card(imported(record))
    assert "FP8 weights that were quantised before: `transformer` from the layout ComfyUI. Imported by" in text
    assert "codes and scales as they were; how they were made the record does not tell." in text
    assert f"all other components are those of [Qwen/Qwen-Image]({HUB}/Qwen/Qwen-Image) at commit [`" in text
    assert "without training or calibration" not in text
    assert "--source" not in text
    assert "fp8-convert SOURCE" not in text
    assert "The licence is the source's" not in text
    assert "The licence that came with its configs: [LICENSE.md](LICENSE.md). The FP8 weights may have" in text
    assert "the source's card]" not in text
    assert not {"base_model", "base_model_relation"} & head(text).keys()


def test_static_activations_of_an_import_are_said(record: Record) -> None:
    said = "Activation scales are static, and came with the weights."
    assert said in card(imported(record, activation_scheme="static"))
    assert said not in card(imported(record))


def test_merged_loras_are_said_before_anything_else(record: Record) -> None:
    recipe = {f.name: getattr(record.recipe, f.name) for f in fields(record.recipe)}
    merged = replace(record, recipe=Recipe(**{**recipe, "merged_loras": ({"sha256": "abc", "scale": 0.8},)}))
    assert "Before, 1 LoRA went into them" in card(merged).partition("## Sizes")[0]
    assert "| `merged_loras` | `sha256 abc, scale 0.8` |" in card(merged)


# Readers


def test_a_native_snapshot_is_offered_to_no_other_server(record: Record) -> None:
    text = card(record)
    assert "vllm serve" not in text
    assert "sglang serve" not in text
    assert f'load_pipeline("{REPO}")' in text
    assert "Stock transformers reads `text_encoder`" in text
    assert "Not for vLLM-Omni, SGLang or ComfyUI" in text
    assert "`fp8-convert Qwen/Qwen-Image --target NAME -o OUT`" in text


@pytest.mark.parametrize(
    ("target", "command"),
    [("vllm-omni", f"vllm serve {REPO} --omni"), ("sglang", f"sglang serve --model-path {REPO}")],
)
def test_a_snapshot_for_a_server(record: Record, target: str, command: str) -> None:
    text = card(made_for(record, target))
    assert f"```\n{command}\n```" in text
    assert "Not for" not in text
    assert "Stock transformers" not in text
    assert head(text)["tags"] == ["fp8", "fp8-convert", target]


def test_files_for_comfyui(record: Record) -> None:
    text = card(made_for(record, "comfyui"))
    assert "load_pipeline" not in text
    assert "library_name" not in head(text)
    for path in record.shards:
        assert f"\n- `{path}`" in text


# Names are only names


def test_names_have_no_markup(record: Record) -> None:
    nasty = "<script>a</script>\n# x | [b](http://c) `d` *e* ![f](g)"
    text = card(with_why(record, why=nasty, rule=nasty, kind=nasty))
    assert "<script>" not in text.replace("`<script>", "")  # between backticks it is text
    assert "[b](" not in text.replace(f"`{nasty}".partition("\n")[0], "").replace("x \\| [b]", "")
    rows = [line for line in text.splitlines() if line.startswith("| FP8")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {8}


def test_a_yaml_value_is_a_value(record: Record) -> None:
    assert head(card(record, license="mit\nbase_model: evil/model"))["license"] == "mit\nbase_model: evil/model"


# A card that is there


def test_what_nobody_wrote_may_be_replaced(record: Record) -> None:
    text = card(record)
    assert may_replace(text)
    for other in ("", " \n", "---\nlicense: mit\n---\n", "\ufeff---\r\nlicense: mit\r\n---\r\n\r\n"):
        assert may_replace(other)


def test_what_somebody_wrote_stays(record: Record) -> None:
    text = card(record)
    for other in (
        text + "more",
        text[1:],
        text.replace("Nothing", "All"),
        text.partition("<!--")[0],
        "# Mine",
        "x" + text,
    ):
        assert not may_replace(other)


def test_the_same_record_gives_the_same_card(record: Record) -> None:
    assert card(record) == card(record)
    files = {**record.files, "NOTICE": RecordedFile(size=1, sha256="0" * 64)}
    assert "[NOTICE](NOTICE)" in card(replace(record, files=files))


# The source's head


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("# no head", {}),
        ("", {}),
        ("---\n---\n", {}),
        ("---\nlicense: mit\n---\n# x", {"license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\ntags:\r\n- a\r\n---", {"license": "mit", "tags": ["a"]}),
        ("---\n1: x\n---\n---\nlicense: mit\n---\n", {"1": "x"}),
    ],
)
def test_front_matter(text: str, data: dict[str, Any]) -> None:
    assert front_matter(text) == data


@pytest.mark.parametrize("head", ["- a", "a: [", "a: !!python/object:os.system x", "a: " + "[" * 5000])
def test_a_head_that_is_no_map(head: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        front_matter(f"---\n{head}\n---\n")
