"""What two snapshots must have in common to be compared, and what is told where they differ."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pipelines
import pytest
from damage import SHARD, rewrite
from runs import converted

from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.converter.telling.errors import ConvertError
from fp8_convert.loader.checkpoint import open_snapshot
from fp8_convert.loader.quality.alike import check_alike, differences


def check(folder: Path, source: Path) -> list[str]:
    mine, theirs = (open_snapshot(path, HubAccess()) for path in (folder, source))
    check_alike(mine[0], theirs[0])
    return list(differences(mine, theirs, None))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return pipelines.copied(pipelines.saved("z_image"), tmp_path / "source")


def set_key(file: Path, key: str, value: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


@pytest.mark.parametrize("name", ["z_image", "qwen_image", "qwen_image_edit", "wan22"])
def test_a_snapshot_and_its_source_are_alike(name: str) -> None:
    assert check(converted(name), pipelines.saved(name)) == []


def test_pipelines_of_two_classes() -> None:
    with pytest.raises(ConvertError, match="cannot be compared: one is ZImagePipeline and the other QwenImagePipeline"):
        check(converted("z_image"), pipelines.saved("qwen_image"))


def test_single_components() -> None:
    with pytest.raises(ConvertError, match="pictures need pipelines"):
        check(converted("z_image") / "transformer", pipelines.saved("z_image") / "transformer")


def test_components_of_two_classes(source: Path) -> None:
    set_key(source / "model_index.json", "transformer", ["diffusers", "QwenImageTransformer2DModel"])
    said = "not both have transformer (ZImageTransformer2DModel), transformer (QwenImageTransformer2DModel)"
    with pytest.raises(ConvertError, match=re.escape(said)):
        check(converted("z_image"), source)


def test_a_model_of_another_size_is_named_with_what_its_config_says(source: Path) -> None:
    set_key(source / "transformer" / "config.json", "dim", 512)
    rewrite(source / SHARD, "layers.1.attention.to_k.weight", lambda w: w[:128])
    said = r"layers\.1\.attention\.to_k\.weight of transformer has the shape \[256, 256\] in one and the shape "
    with pytest.raises(ConvertError, match=said + r"\[128, 256\] in the other \(.* differ in dim \(256 and 512\)\)"):
        check(converted("z_image"), source)


def test_what_else_makes_other_pictures_is_told(source: Path) -> None:
    set_key(source / "transformer" / "config.json", "rope_theta", 10.0)
    set_key(source / "scheduler" / "scheduler_config.json", "shift", 1.0)
    (source / "tokenizer" / "merges.txt").write_text("#version: 0.3\n")  # a text, which is not looked at
    (source / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    (source / "scheduler" / "extra.json").write_text("{}")
    told = check(converted("z_image"), source)
    assert told == [
        "the configs of transformer differ in rope_theta (256.0 and 10.0)",
        "scheduler/extra.json is in the original alone",
        "scheduler/scheduler_config.json differs in shift (3.0 and 1.0)",
        "tokenizer/chat_template.jinja differs",
    ]
