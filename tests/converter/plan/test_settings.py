"""One mistake is one sentence at every door, and settings that contradict a converted snapshot are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pipelines import saved
from runs import converted

from fp8_convert.converter import ConvertError, Fp8Error, SettingsError, convert, plan_conversion
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.plan.settings import Settings
from fp8_convert.loader import Fp8Config, LoadError, load_component, load_pipeline

USE = "; use two positive numbers, such as [128, 128], or none."
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "one-size": ({"weight_block_size": [128]}, f"weight_block_size is [128]{USE}"),
    "three-sizes": ({"weight_block_size": (1, 2, 3)}, f"weight_block_size is (1, 2, 3){USE}"),
    "zero": ({"weight_block_size": [0, 128]}, f"weight_block_size is [0, 128]{USE}"),
    "flags": ({"weight_block_size": [True, True]}, f"weight_block_size is [True, True]{USE}"),
    "texts": ({"weight_block_size": ["64", 64]}, f"weight_block_size is ['64', 64]{USE}"),
    "letters": ({"weight_block_size": "88"}, f"weight_block_size is '88'{USE}"),
    "huge": ({"weight_block_size": [10**20, 1]}, f"weight_block_size is [100000000000000000000, 1]{USE}"),
    "bare-layer": (
        {"ignored_layers": "img_mlp"},
        "ignored_layers is 'img_mlp'; use a list of names, such as ['img_mlp'].",
    ),
    "no-name": ({"ignored_layers": [1]}, "ignored_layers is [1]; use a list of names, such as ['img_mlp']."),
    "scheme": ({"activation_scheme": "per_token"}, "activation_scheme is 'per_token'; use 'dynamic' or 'static'."),
    "scales-by-name": (
        {"activation_scheme": "static", "input_scales": {"layer": 1.0}},
        "input_scales is {'layer': 1.0}; use the path of a safetensors file.",
    ),
    "scales-empty": (
        {"activation_scheme": "static", "input_scales": ""},
        "input_scales is ''; use the path of a safetensors file.",
    ),
    "no-scales": (
        {"activation_scheme": "static"},
        "The static activation scheme needs calibrated scales; pass them with --input-scales FILE.",
    ),
    "static-blocks": (
        {"activation_scheme": "static", "weight_block_size": [128, 128]},
        "Block scales come with dynamic activations alone; drop one of the two options.",
    ),
}  # fmt: skip
OFFLINE: dict[str, tuple[dict[str, Any], str]] = {
    "bare-component": ({"components": "vae"}, "components is 'vae'; use a list of names, such as ['transformer']."),
    "compact": ({"compact": "yes"}, "compact is 'yes'; use true or false."),
    "size": ({"max_shard_size": "5 apples"}, "max_shard_size is '5 apples'; use a size such as 5GB or 500MB."),
    "manifest": ({"manifest": 3}, "manifest is 3; use the name of a shipped manifest, or the path of a TOML file."),
    "manifest-bytes": (
        {"manifest": b"z-image"},
        "manifest is b'z-image'; use the name of a shipped manifest, or the path of a TOML file.",
    ),
    "manifest-empty": (
        {"manifest": ""},
        "manifest is ''; use the name of a shipped manifest, or the path of a TOML file.",
    ),
    "compact-number": ({"compact": 0}, "compact is 0; use true or false."),
    "format": ({"quantization": "int8"}, "quantization is 'int8'; the only one is 'fp8'."),
    "device": ({"device": "gpu"}, "The device 'gpu' is unknown; use auto, cpu or cuda."),
    "workers": ({"workers": -1}, "workers is -1; use a positive number, or none."),
    "shards": ({"shards": 0}, "shards is 0; use a positive number, or none."),
}

Door = Callable[[Path, dict[str, Any]], object]
DOORS: dict[str, Door] = {
    "convert": lambda folder, options: convert(saved("z_image"), folder / "out", **options),
    "plan_conversion": lambda _, options: plan_conversion(saved("z_image"), **options),
    "load_pipeline": lambda _, options: load_pipeline(saved("z_image"), device="cpu", quantization_config=options),
    "load_pipeline-component": lambda _, options: load_pipeline(
        saved("z_image"), device="cpu", quantization_config={"transformer": options}
    ),
    "load_component": lambda _, options: load_component(
        saved("z_image"), "transformer", device="cpu", quantization_config=options
    ),
    "converted": lambda _, options: load_pipeline(converted("z_image"), device="cpu", quantization_config=options),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_at_every_door(mistake: str, door: str, tmp_path: Path) -> None:
    options, sentence = MISTAKES[mistake]
    with pytest.raises(SettingsError) as caught:
        DOORS[door](tmp_path, options)
    assert str(caught.value) == sentence
    assert isinstance(caught.value, ConvertError)
    assert isinstance(caught.value, ValueError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if "scales" not in m and m != "static-blocks"])
def test_and_in_a_config_for_diffusers(mistake: str) -> None:
    options, sentence = MISTAKES[mistake]
    with pytest.raises(SettingsError) as caught:
        Fp8Config(**options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("mistake", OFFLINE)
def test_mistakes_that_only_a_conversion_can_make(mistake: str, tmp_path: Path) -> None:
    options, sentence = OFFLINE[mistake]
    with pytest.raises(SettingsError) as caught:
        convert(saved("z_image"), tmp_path / "out", **options)
    assert str(caught.value) == sentence
    if not {*options} & {"components", "max_shard_size", "device", "workers", "shards"}:
        with pytest.raises(SettingsError) as caught:
            load_pipeline(saved("z_image"), device="cpu", **{"quantization": "fp8", **options})
        assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--weight-block-size", "0", "128"], "weight_block_size is (0, 128); use two positive numbers"),
        (["--max-shard-size", "5 apples"], "max_shard_size is '5 apples'; use a size such as 5GB or 500MB."),
        (["--activation-scheme", "static"], "The static activation scheme needs calibrated scales"),
    ],
    ids=["block", "size", "static"],
)
def test_the_command_line_says_the_same(options: list[str], sentence: str) -> None:
    done = CliRunner().invoke(main, [str(saved("z_image")), "--dry-run", *options])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith(f"error: {sentence}")


@pytest.mark.parametrize("value", [",", "", " , "])
def test_layers_that_name_nothing_are_a_wrong_command_line(value: str) -> None:
    done = CliRunner().invoke(main, [str(saved("z_image")), "--dry-run", "--ignored-layers", value])
    assert done.exit_code == 2
    assert "names nothing" in done.output


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"^'ignored_layer' is not a setting; did you mean 'ignored_layers'\?$"):
        load_pipeline(saved("z_image"), device="cpu", quantization_config={"ignored_layer": ["to_q"]})
    with pytest.raises(SettingsError, match=r"^'x' is not a setting; use one of quantization, manifest, "):
        Settings.read({"x": 1})


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "alias": ("z_image", {"ignored_layers": ["to_qkv"]}, "to_q in FP8, and quantization_config ignores 'to_qkv'"),
    "typo": ("z_image", {"ignored_layers": ["no_such_layer"]}, "'no_such_layer' matches no linear layer"),
    "stored": ("qwen_image", {"ignored_layers": ["img_mod"]}, "in FP8, and quantization_config ignores 'img_mod'"),
    "text-blocks": (
        "z_image",
        {"text_encoder": {"weight_block_size": [64, 64]}, "transformer": {}},
        "weight_block_size applies to the DiT, and text_encoder is none; drop it.",
    ),
    "text-layers": (
        "z_image",
        {"text_encoder": {"ignored_layers": ["mlp"]}, "transformer": {}},
        "ignored_layers applies to the DiT, and text_encoder is none; drop it.",
    ),
    "dynamic": ("z_image", {"weight_block_size": [128, 128]}, "with weight_block_size None"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_a_converted_snapshot(name: str) -> None:
    source, config, message = CONTRADICTIONS[name]
    snapshot = converted(source, compact=True) if source == "qwen_image" else converted(source)
    with pytest.raises(ConvertError, match=message):
        load_pipeline(snapshot, device="cpu", quantization_config=config)
    if name in ("alias", "typo", "stored", "dynamic"):
        with pytest.raises(ConvertError, match=message):
            load_component(snapshot, "transformer", device="cpu", quantization_config=config)


def test_a_component_is_asked_for_alone() -> None:
    """What a config says of the others is not its affair."""
    for source in (saved("z_image"), converted("z_image")):
        assert load_component(source, "transformer", device="cpu", quantization_config={"transformer": {}}) is not None


def test_every_error_is_one_family() -> None:
    assert issubclass(ConvertError, Fp8Error)
    assert issubclass(LoadError, Fp8Error)
    assert issubclass(SettingsError, ConvertError)
