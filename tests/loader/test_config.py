"""A damaged quantization_config, in config.json or as an argument, is one sentence that names the key."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
from damage import set_config
from diffusers import ZImageTransformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import converted
from transformers import Qwen3Model

from fp8_convert.converter import SettingsError
from fp8_convert.converter.snapshot.access import HubAccess
from fp8_convert.loader import Fp8Config, LoadError, load_component, load_pipeline
from fp8_convert.loader.checkpoint import fp8_modules, is_converted, open_snapshot
from fp8_convert.loader.settings import Request

GOOD: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "is_checkpoint_fp8_serialized": True,
    "ignored_layers": [],
    "weight_block_size": None,
}
DAMAGED = {
    "text": ("fp8", "it is 'fp8'; it must be an object"),
    "list": ([], r"it is \[\]; it must be an object"),
    "unknown": ({**GOOD, "modules_to_not_convert": []}, "it has the unknown key 'modules_to_not_convert'"),
    "method": ({**GOOD, "quant_method": "int8"}, "quant_method is 'int8'; use 'fp8' or 'fp8_convert'"),
    "method-type": ({**GOOD, "quant_method": ["fp8"]}, r"quant_method is \['fp8'\]"),
    "scheme": ({**GOOD, "activation_scheme": "per_token"}, "activation_scheme is 'per_token'; use 'dynamic'"),
    "scheme-type": ({**GOOD, "activation_scheme": {}}, "activation_scheme is {}"),
    "layers-text": ({**GOOD, "ignored_layers": "img_mlp"}, "ignored_layers is 'img_mlp'; use a list of names"),
    "layers-items": ({**GOOD, "ignored_layers": [["a"]]}, r"ignored_layers is \[\['a'\]\]"),
    "layers-number": ({**GOOD, "ignored_layers": 3}, "ignored_layers is 3"),
    "block-text": ({**GOOD, "weight_block_size": ["128", "128"]}, r"weight_block_size is \['128', '128'\]; use two"),
    "block-one": ({**GOOD, "weight_block_size": [128]}, r"weight_block_size is \[128\]"),
    "block-zero": ({**GOOD, "weight_block_size": [0, 128]}, r"weight_block_size is \[0, 128\]"),
    "block-bool": ({**GOOD, "weight_block_size": [True, True]}, r"weight_block_size is \[True, True\]"),
    "serialized": ({**GOOD, "is_checkpoint_fp8_serialized": "yes"}, "is_checkpoint_fp8_serialized is 'yes'"),
}


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted("z_image"), tmp_path / "snapshot"))


@pytest.mark.parametrize("name", DAMAGED)
def test_the_sentence_names_file_and_key(snapshot: Path, name: str) -> None:
    value, message = DAMAGED[name]
    set_config(snapshot / "transformer", value)
    message = rf"^transformer/config\.json has a quantization_config that cannot be used: {message}.*snapshot again\.$"
    with pytest.raises(LoadError, match=message):
        load_pipeline(snapshot, device="cpu")
    with pytest.raises(LoadError, match=message):
        load_component(snapshot, "transformer", device="cpu", strict=False)
    with pytest.raises(LoadError, match=message):
        load_pipeline(snapshot, device="cpu", quantization_config={"activation_scheme": "dynamic"})
    alone = message.replace("transformer/config\\.json", "config\\.json of ZImageTransformer2DModel")
    with pytest.raises(LoadError, match=alone):
        load_component(snapshot / "transformer", device="cpu")


@pytest.mark.parametrize("name", [n for n, (v, _) in DAMAGED.items() if isinstance(v, dict) and "method" not in n])
def test_from_pretrained_says_the_same(snapshot: Path, name: str) -> None:
    value, message = DAMAGED[name]
    set_config(snapshot / "transformer", value)
    with pytest.raises(LoadError, match=rf"^config\.json has a quantization_config that cannot be used: {message}"):
        ZImageTransformer2DModel.from_pretrained(snapshot / "transformer")
    set_config(snapshot / "text_encoder", {**value, "quant_method": "fp8_convert"})
    with pytest.raises(LoadError, match=rf"^config\.json has a quantization_config that cannot be used: {message}"):
        Qwen3Model.from_pretrained(snapshot / "text_encoder")


@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_config_of_ones_own_is_checked_alike(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key} is 1\.5; use"):
        Fp8Config(**{key: 1.5})
    with pytest.raises(ValueError, match=r"^'ignore' is not a setting; did you mean"):
        Fp8Config(ignore=[])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*GOOD, "method", "self", "cls", ""]) | st.text(max_size=8)
CONFIGS = (
    JSON
    | st.dictionaries(KEYS, JSON, max_size=6)
    | st.fixed_dictionaries({k: st.just(v) | JSON for k, v in GOOD.items()})
)


def refused(call: Callable[[], object], *errors: type[Exception]) -> str | None:
    """What the call was refused with, None where it was not; other exceptions pass."""
    try:
        call()
    except (*errors, LoadError) as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(converted("z_image"), tmp_path_factory.mktemp("fuzz") / "snapshot"))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIGS)
def test_no_config_gets_past_with_another_exception(fuzzed: Path, config: Any) -> None:
    set_config(fuzzed / "transformer", config)
    snapshot, _ = open_snapshot(fuzzed, HubAccess())
    component = next(c for c in snapshot.components if c.name == "transformer")
    assert is_converted(component)
    start = "config.json has a quantization_config that cannot be used: "
    assert (refused(lambda: fp8_modules(component)) or f"transformer/{start}").startswith(f"transformer/{start}")
    if isinstance(config, dict):
        assert (refused(lambda: Fp8Config.from_dict(dict(config))) or start).startswith(start)


@settings(max_examples=300)
@given(CONFIGS)
def test_no_settings_get_past_with_another_exception(config: Any) -> None:
    snapshot, files = open_snapshot(pipelines.saved("z_image"), HubAccess())
    said = refused(lambda: Request(None, config, None, False).of(snapshot, files), SettingsError)
    assert (
        said is None
        or "not converted: pass quantization" in said
        or re.search(r"; (use|give|did|known|the only|name)", said)
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({k: st.just(v) | JSON for k, v in GOOD.items()}))
def test_whole_loads_raise_sentences_or_load(fuzzed: Path, config: Any) -> None:
    set_config(fuzzed / "transformer", config)
    assert "\n" not in (refused(lambda: load_component(fuzzed, "transformer", device="cpu")) or "")


@pytest.mark.parametrize(
    "change",
    [{"dim": "wide"}, {"n_layers": -1}, {"n_layers": [1]}, {"axes_dims": None}, {"all_patch_size": 7}],
    ids=lambda c: next(iter(c)),
)
def test_other_keys_that_the_class_cannot_use(snapshot: Path, change: dict[str, Any]) -> None:
    file = snapshot / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(LoadError):
        load_component(snapshot, "transformer", device="cpu")
