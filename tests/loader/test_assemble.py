"""Components that the libraries load: what goes wrong there is one sentence, and no code of a snapshot runs."""

import builtins
import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from runs import converted

from fp8_convert.converter import ConvertError
from fp8_convert.loader import LoadError, load_component, load_pipeline


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted("z_image"), tmp_path / "snapshot"))


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", ask)


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **changes}))


def load(snapshot: Path, **options: Any) -> Any:
    return load_pipeline(snapshot, device="cpu", **options)


def test_a_tokenizer_with_code_of_its_own_raises_and_runs_nothing(snapshot: Path) -> None:
    ran = snapshot / "ran"
    (snapshot / "tokenizer/evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import Qwen2Tokenizer as Evil\n"
    )
    remote = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    edit(snapshot / "tokenizer/tokenizer_config.json", **remote)
    tokenizer = load(snapshot).tokenizer  # the model index names a class of transformers, which is what is used
    assert type(tokenizer).__module__.startswith("transformers.")
    edit(snapshot / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    with pytest.raises(LoadError) as raised:
        load(snapshot)
    assert str(raised.value) == (
        f"The component tokenizer of {snapshot} cannot be loaded by AutoTokenizer: it wants to run code that comes "
        "with the snapshot, which never happens here; load it yourself and pass tokenizer=... to load_pipeline."
    )
    assert isinstance(raised.value.__cause__, ValueError)
    assert load(snapshot, tokenizer=tokenizer).tokenizer is tokenizer
    assert not ran.exists()


@pytest.mark.parametrize("auto", ["AutoModel", "AutoProcessor", "AutoImageProcessor"])
def test_other_auto_classes_with_code_of_their_own(snapshot: Path, auto: str) -> None:
    ran = snapshot / "ran"
    (snapshot / "tokenizer/evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    own = dict.fromkeys((auto, "AutoConfig"), "evil.Evil")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        edit(snapshot / "tokenizer" / name, auto_map=own, model_type="evil")
    edit(snapshot / "model_index.json", tokenizer=["transformers", auto])
    with pytest.raises(LoadError, match=f"^The component tokenizer of .* cannot be loaded by {auto}: it wants to run"):
        load(snapshot)
    assert not ran.exists()


def test_a_generate_method_of_its_own_does_not_run(snapshot: Path) -> None:
    """transformers runs custom_generate/generate.py of a text encoder's folder, when it is allowed to."""
    folder = snapshot / "text_encoder/custom_generate"
    folder.mkdir()
    ran = snapshot / "ran"
    (folder / "generate.py").write_text(f"open({str(ran)!r}, 'w').close()\ndef generate(model, **_): pass\n")
    load(snapshot)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("file", "content", "component"),
    [
        ("scheduler/scheduler_config.json", "[", "scheduler"),
        ("scheduler/scheduler_config.json", "[1]", "scheduler"),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": "many"}', "scheduler"),
        ("tokenizer/tokenizer.json", "{", "tokenizer"),
        ("tokenizer/tokenizer_config.json", "{", "tokenizer"),
        ("vae/config.json", '{"block_out_channels": 3}', "vae"),
    ],
)
def test_damaged_files_name_their_component(snapshot: Path, file: str, content: str, component: str) -> None:
    (snapshot / file).write_text(content)
    with pytest.raises(LoadError, match=f"^The component {component} of {snapshot} cannot be loaded by ") as raised:
        load(snapshot)
    assert raised.value.__cause__ is not None
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(f"or load it yourself and pass {component}=... to load_pipeline.")


def test_missing_files_name_their_component(snapshot: Path) -> None:
    (snapshot / "scheduler/scheduler_config.json").rename(snapshot / "scheduler/other.json")
    with pytest.raises(LoadError, match=r"^The component scheduler of .* cannot be loaded by FlowMatchEuler"):
        load(snapshot)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed, so nothing is missing")
def test_a_package_that_a_class_needs() -> None:
    with pytest.raises(LoadError, match=r"processor of .* by Qwen2VLProcessor \(.*; install what it needs, or load it"):
        load(converted("qwen_image_edit"))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "NoSuchPipeline"}, "has no pipeline NoSuchPipeline; upgrade it"),
        ({"_class_name": ["pipeline.py", "Mine"]}, "has no pipeline .*Mine.*code of its own is not run"),
        ({"_class_name": "logging"}, "has no pipeline logging"),
        ({"_class_name": "ZImageTransformer2DModel"}, "has no pipeline ZImageTransformer2DModel"),
        ({"scheduler": ["diffusers", "NoSuchScheduler"]}, "scheduler is a diffusers.NoSuchScheduler, which is not"),
        ({"scheduler": ["os", "system"]}, "The component scheduler needs os.system"),
        ({"scheduler": ["diffusers", 3]}, r"model_index\.json in .* has \['diffusers', 3\] for scheduler"),
        ({"scheduler": ["diffusers", "__version__"]}, "The component scheduler of .* cannot be loaded by __version__"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_model_indices_that_cannot_be_followed(snapshot: Path, entries: dict[str, Any], message: str) -> None:
    edit(snapshot / "model_index.json", **entries)
    with pytest.raises(LoadError, match=message):
        load(snapshot)


def test_a_pipeline_that_lacks_a_component(snapshot: Path) -> None:
    index = snapshot / "model_index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "scheduler"}))
    with pytest.raises(LoadError, match=r"^ZImagePipeline cannot be built from model_index\.json in .*'scheduler'"):
        load(snapshot)


def test_pickles_are_never_read(snapshot: Path) -> None:
    weights = snapshot / "vae/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises((LoadError, ConvertError), match="pickled weights"):
        load(snapshot)


def test_a_damaged_generation_config(tmp_path: Path) -> None:
    snapshot = shutil.copytree(converted("qwen_image"), tmp_path / "snapshot")
    (snapshot / "text_encoder/generation_config.json").write_text("{")
    with pytest.raises(
        LoadError, match=r"^generation_config\.json in .*text_encoder cannot be used .*download it again"
    ):
        load_component(snapshot, "text_encoder", device="cpu")


# The log line


def test_the_log_tells_what_was_loaded(snapshot: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = json.loads((snapshot / "fp8_convert.json").read_text())
    with caplog.at_level(logging.INFO, "fp8_convert.loader"):
        pipe = load(snapshot)
    assert isinstance(pipe, DiffusionPipeline)
    assert caplog.messages == [
        f"loaded ZImagePipeline from {snapshot} onto cpu; snapshot {record['record_sha256']}, converted from a local "
        f"folder by fp8-convert {record['tool_version']} with the recipe {record['recipe_sha256']}"
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "fp8_convert.loader"):
        load_component(snapshot / "transformer", device="cpu")
    assert caplog.messages == [
        f"loaded ZImageTransformer2DModel (ZImageTransformer2DModel) from {snapshot / 'transformer'} onto cpu"
    ]
