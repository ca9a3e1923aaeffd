"""What users of from_pretrained pass: it works, or is refused with the reason, and nothing is dropped in silence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline, ZImageTransformer2DModel
from runs import assert_same_weights, converted

from fp8_convert.converter import ConvertError, convert
from fp8_convert.loader import LoadError, load_component, load_pipeline, report

SOURCE, TRANSFORMER = "z_image", "transformer"


def load(**options: Any) -> Any:
    return load_component(converted(SOURCE), TRANSFORMER, **{"device": "cpu", **options})


# dtype


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.float16, "float16", "torch.float16", "fp16"], ids=str)
def test_dtypes_by_either_name(name: str, value: object) -> None:
    assert load(**{name: value}).dtype == torch.float16


def test_bf16_is_the_default_and_pipelines_take_both_names() -> None:
    assert load(dtype=None).dtype == torch.bfloat16
    pipe = load_pipeline(converted(SOURCE), device="cpu", torch_dtype=torch.float32, dtype="float32")
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16", "torch_dtype": torch.bfloat16}, "dtype is float16 and its older name torch_dtype is"),
        ({"dtype": "auto"}, "dtype is 'auto': the file says FP8, which is not a dtype to compute in; use torch"),
        ({"dtype": {"default": torch.float16}}, "everything in a pipeline computes in one dtype"),
        ({"dtype": torch.float8_e4m3fn}, "dtype is torch.float8_e4m3fn: it is what everything that is not FP8"),
        ({"torch_dtype": torch.int8}, "dtype is torch.int8"),
        ({"torch_dtype": "float61"}, "dtype is 'float61'"),
        ({"dtype": 16}, "dtype is 16"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_other_dtypes_are_refused(options: dict[str, Any], message: str) -> None:
    for call in (load, lambda **o: load_pipeline(converted(SOURCE), device="cpu", **o)):
        with pytest.raises(ValueError, match=message.replace(".", r"\.")):
            call(**options)


# device and device_map


@pytest.mark.parametrize("value", ["cpu", "cpu:0", torch.device("cpu"), {"": "cpu"}], ids=str)
def test_a_device_map_of_one_device_is_the_device(value: object) -> None:
    pipe = load_pipeline(converted(SOURCE), device_map=value)
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}
    assert pipe.to("cpu") is pipe
    assert load(device=None, device_map=value).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("value", ["cuda", "cuda:0", 0, {"": "cuda"}, {"": 0}], ids=str)
def test_a_device_map_of_one_cuda_device(value: object) -> None:
    pipe = load_pipeline(converted(SOURCE), device_map=value)
    assert {str(p.device) for p in pipe.transformer.parameters()} == {"cuda:0"}
    assert report(pipe).ok


@pytest.mark.parametrize("value", ["auto", "balanced", "balanced_low_0", "sequential", {"vae": "cpu"}, {}], ids=str)
def test_maps_over_devices_are_refused_with_the_alternative(value: object) -> None:
    message = r"^device_map=.* spreads a model over devices, but load_pipeline puts .* pipe\.enable_model_cpu_offload"
    with pytest.raises(ValueError, match=message):
        load_pipeline(converted(SOURCE), device_map=value)
    with pytest.raises(ValueError, match=message):
        load(device=None, device_map=value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "^'gpu' is not a device; use 'cuda'"),
        ({"device_map": "disk"}, "^'disk' is not a device"),
        ({"device": 1.5}, "1.5 is not a device"),
        ({"device": "meta"}, "cannot be loaded onto 'meta'"),
        ({"device": "mps"}, "cannot be loaded onto 'mps'"),
        ({"device": "cuda:99"}, "(finds no CUDA device for 'cuda:99'; use device='cpu'|There is no device 'cuda:99')"),
        ({"device_map": {"": "cuda:99"}}, "no (CUDA )?device"),
        ({"backend": "fast"}, "^backend is 'fast'; use 'auto', 'scaled_mm', 'dequantize'"),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_what_is_no_device_here(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pipeline(converted(SOURCE), **options)
    with pytest.raises(ValueError, match=message):
        load_component(converted(SOURCE), TRANSFORMER, **options)


@pytest.mark.gpu
def test_two_devices_that_differ() -> None:
    with pytest.raises(ValueError, match="device is 'cpu' and device_map is 'cuda'; pass device alone"):
        load_pipeline(converted(SOURCE), device="cpu", device_map="cuda")


@pytest.mark.parametrize("value", ["cpu", "balanced"])
def test_plain_diffusers_takes_its_own_maps_for_pipelines(value: str) -> None:
    """What docs/loading.md says of diffusers: by name for pipelines, any map for models."""
    if value == "balanced" and torch.cuda.is_available():
        pytest.skip("on CUDA: the test below")
    without = {"text_encoder": None, "tokenizer": None}  # stock transformers' own affair
    pipe = DiffusionPipeline.from_pretrained(converted(SOURCE), dtype=torch.bfloat16, device_map=value, **without)
    assert_same_weights(pipe.transformer, load())
    for refused in ("auto", "sequential"):
        with pytest.raises(NotImplementedError, match="not supported"):
            DiffusionPipeline.from_pretrained(converted(SOURCE), device_map=refused)
    with pytest.raises(ValueError, match="must be a string"):
        DiffusionPipeline.from_pretrained(converted(SOURCE), device_map={"": "cpu"})


@pytest.mark.gpu
@pytest.mark.parametrize("value", ["cuda", "balanced"])
def test_plain_diffusers_maps_pipelines_onto_cuda(value: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(converted(SOURCE), dtype=torch.bfloat16, device_map=value)
    assert pipe.transformer.device.type == "cuda"
    assert report(pipe).ok


@pytest.mark.parametrize("value", ["cpu", "auto", "balanced", "sequential", {"": "cpu"}, {"layers": "cpu", "": "cpu"}])
def test_plain_diffusers_takes_any_map_for_models(value: Any) -> None:
    if isinstance(value, str) and value != "cpu" and torch.cuda.is_available():
        pytest.skip("would go to CUDA")
    model = ZImageTransformer2DModel.from_pretrained(
        converted(SOURCE) / TRANSFORMER, dtype=torch.bfloat16, device_map=value
    )
    assert_same_weights(model, load())
    assert report(model).ok


# Other keywords


HARMLESS: dict[str, Any] = {
    "use_safetensors": True, "low_cpu_mem_usage": True, "safety_checker": None, "trust_remote_code": False,
    "force_download": False, "proxies": None, "subfolder": None, "custom_pipeline": None, "resume_download": True,
}  # fmt: skip


def test_keywords_that_ask_for_what_is_done_anyway() -> None:
    pipe = load_pipeline(converted(SOURCE), device="cpu", **HARMLESS)
    assert report(pipe).ok
    assert report(load(**HARMLESS)).ok


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("use_safetensors", False, "nothing but safetensors is read"),
        ("low_cpu_mem_usage", False, "weights always go from the file straight to their module"),
        ("safety_checker", object, "this pipeline has none"),
        ("custom_pipeline", "lpw", "code that comes with a repository is never run; build that class"),
        ("trust_remote_code", True, "code that comes with a repository is never run"),
        ("force_download", True, "files come from the Hub cache; delete the repository there"),
        ("proxies", {"https": "x"}, "set the environment's HTTPS_PROXY instead"),
        (
            "subfolder",
            "transformer",
            "give load_pipeline the pipeline's folder, or load_component the component's name",
        ),
        ("max_memory", {0: "1GB"}, "load_pipeline puts everything on one device"),
        ("output_loading_info", True, r"report\(pipe\) tells"),
    ],
)
def test_keywords_of_from_pretrained_are_refused_with_the_reason(name: str, value: object, reason: str) -> None:
    for call in (load, lambda **o: load_pipeline(converted(SOURCE), device="cpu", **o)):
        with pytest.raises(TypeError, match=f"^{name}=.* is refused: {reason}.*; leave it out"):
            call(**{name: value})


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("quantisation", "quantization"), ("devices", "device"), ("transfomer", "transformer"), ("verfy", "verify"),
        ("use_safetensor", "use_safetensors"),
    ],
)  # fmt: skip
def test_unknown_keywords_name_the_nearest_before_anything_is_loaded(name: str, near: str, tmp_path: Path) -> None:
    source = shutil.copytree(converted(SOURCE), tmp_path / "source")
    (source / "scheduler/scheduler_config.json").write_text("[")  # loading would fail
    with pytest.raises(TypeError, match=f"^ZImagePipeline takes no argument '{name}'; did you mean {near}\\?"):
        load_pipeline(source, device="cpu", **{name: None})
    with pytest.raises(TypeError, match=r"^load_component takes no argument 'q'; it takes .*backend"):
        load(q=1)


# Settings


SNAPSHOT_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "compact": ({"compact": True}, "is converted already without compact; drop it, or convert the original"),
    "manifest": ({"manifest": "wan2.2"}, "is converted already with the manifest .*; drop manifest"),
    "kept": (
        {"quantization_config": {"transformer": {}, "text_encoder": {}, "vae": {}}},
        "is converted already but for vae, and quantization_config asks for it in FP8",
    ),
    "scales": (
        {"quantization_config": {"activation_scheme": "static", "input_scales": "x.safetensors"}},
        "brings its own input scales",
    ),
}


@pytest.mark.parametrize("name", SNAPSHOT_SETTINGS)
def test_settings_that_a_converted_snapshot_contradicts(name: str) -> None:
    options, message = SNAPSHOT_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        load_pipeline(converted(SOURCE), device="cpu", **options)
    if name != "kept":  # of another component, which load_component does not load
        with pytest.raises(ValueError, match=message):
            load(**options)


def test_settings_that_a_converted_snapshot_was_made_with(tmp_path: Path) -> None:
    snapshot = converted("qwen_image", compact=True)
    manifest = json.loads((snapshot / "fp8_convert.json").read_text())["recipe"]["manifest"]
    assert load_component(snapshot, TRANSFORMER, device="cpu", compact=True, manifest=manifest) is not None
    for option in ({"compact": True}, {"manifest": manifest}):
        with pytest.raises(ValueError, match=f"without a record nothing tells how; drop {next(iter(option))}"):
            load_component(snapshot / TRANSFORMER, device="cpu", **option)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\]; use two positive numbers"),
        ({"weight_block_size": "128"}, "weight_block_size is '128'"),
        ({"weight_block_size": [128.0, 128.0]}, r"weight_block_size is \[128\.0, 128\.0\]"),
        ({"weight_block_size": [-1, 128]}, r"weight_block_size is \[-1, 128\]"),
        ({"ignored_layers": "img_mlp"}, r"ignored_layers is 'img_mlp'; use a list of names, such as \['img_mlp'\]"),
        ({"ignored_layers": [1]}, r"ignored_layers is \[1\]"),
        ({"activation_scheme": None}, "activation_scheme is None"),
        ({"input_scales": 3}, "input_scales is 3; use the path of a safetensors file"),
        ({"method": ["fp8"]}, "method is"),
        ([("method", "fp8")], "quantization_config is .*; give a dict such as {'method': 'fp8'}"),
        ("fp8", "quantization_config is 'fp8'; give a dict"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing(config: Any, message: str) -> None:
    for source in (pipelines.saved(SOURCE), converted(SOURCE)):
        with pytest.raises(ValueError, match=message):
            load_pipeline(source, device="cpu", quantization_config=config)
        with pytest.raises(ValueError, match=message):
            load_component(source, TRANSFORMER, device="cpu", quantization_config=config)


def test_settings_that_convert_nothing() -> None:
    with pytest.raises(ValueError, match="keeps every component as it is"):
        load_pipeline(pipelines.saved(SOURCE), device="cpu", quantization_config={"transformer": None, "vae": None})


def test_variants() -> None:
    source = pipelines.saved(SOURCE, variant="fp16")
    fp16 = load_component(source, TRANSFORMER, device="cpu", quantization="fp8", variant="fp16")
    assert_same_weights(fp16, load())
    assert report(load(variant="fp16")).ok
    for call in (load_pipeline, lambda path, **o: load_component(path, TRANSFORMER, **o)):
        with pytest.raises(LoadError, match="has weights of the variant 'bf16'; correct or drop it"):
            call(pipelines.saved(SOURCE), device="cpu", quantization="fp8", variant="bf16")


# Unfinished conversions


def test_an_unfinished_conversion_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8_convert.converter.output import target

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target.Target, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(pipelines.saved(SOURCE), tmp_path / "out", device="cpu")
    monkeypatch.undo()
    message = f"^The conversion into {tmp_path / 'out'} is unfinished; run the same fp8-convert command again\\.$"
    for call in (load_pipeline, lambda path, **o: load_component(path, TRANSFORMER, **o)):
        with pytest.raises(LoadError, match=message):
            call(tmp_path / "out", device="cpu")
    convert(pipelines.saved(SOURCE), tmp_path / "out", device="cpu")
    assert report(load_pipeline(tmp_path / "out", device="cpu")).ok
    (tmp_path / "out/.fp8-convert").mkdir()  # a forced run over a finished snapshot has begun
    assert report(load_pipeline(tmp_path / "out", device="cpu")).ok
    with pytest.raises(ConvertError, match="does not exist"):
        load_pipeline(tmp_path / "nowhere", device="cpu")
