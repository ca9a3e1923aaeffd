"""load_pipeline and load_component: both modes give the same pipeline; what does not hold what it promises raises."""

import json
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
from own_manifests import with_scales_of_rows
from runs import assert_same_weights, bf16, converted, modules_of, psnr, quiet, replaced, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fp8_convert.converter import ConvertError, convert
from fp8_convert.loader import LoadError, load_component, load_pipeline, report
from fp8_convert.loader.weights import Fp8Weight

NAMES = ["z_image", "qwen_image", "wan22", "flux", "qwen_image_edit", "qwen_image_layered"]


@pytest.mark.parametrize("name", NAMES)
def test_both_modes_run_alike_and_close_to_bf16(name: str) -> None:
    offline = quiet(load_pipeline(converted(name), device="cpu", **replaced(name)))
    online = quiet(load_pipeline(pipelines.saved(name), device="cpu", quantization="fp8", **replaced(name)))
    plain = bf16(name)
    assert type(offline) is type(online) is type(plain)
    assert modules_of(offline).keys() == modules_of(plain).keys()
    for part, module in modules_of(offline).items():
        assert_same_weights(module, modules_of(online)[part])
        _assert_kept_as_in(plain.components[part], module)
    assert report(offline).ok
    assert report(online).ok
    picture = run(offline, name)
    assert torch.equal(picture, run(online, name))
    assert psnr(picture, run(plain, name)) > 30


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_scales_of_rows_in_both_modes(device: str) -> None:
    manifest = with_scales_of_rows("z-image")
    offline = quiet(load_pipeline(converted("z_image", manifest=manifest), device=device))
    online = quiet(load_pipeline(pipelines.saved("z_image"), device=device, quantization="fp8", manifest=manifest))
    for part, module in modules_of(offline).items():
        assert_same_weights(module, modules_of(online)[part])
    told = {c.name: c for c in report(offline).components}
    assert report(offline).ok
    assert (told["transformer"].installed, told["text_encoder"].installed) == ({"w8a8": 28}, {"storage": 14})
    if device == "cuda":  # where the row-wise product takes them
        assert any(backend.startswith("rows: ") for backend in told["transformer"].backends)
    linears = [m for part in modules_of(offline).values() for m in part.modules() if isinstance(m, Fp8Weight)]
    assert all(m.scheme == "channel" and m.scale.shape == (m.out_features, 1) for m in linears)
    picture = run(offline, "z_image")
    assert torch.equal(picture, run(online, "z_image"))
    assert psnr(picture, run(bf16("z_image").to(device), "z_image")) > 30


def test_scales_of_rows_are_told_by_their_shape_where_no_metadata_name_them(tmp_path: Path) -> None:
    folder = converted("z_image", manifest=with_scales_of_rows("z-image"))
    foreign = Path(shutil.copytree(folder / "transformer", tmp_path / "transformer"))
    _rewrite(foreign / Path(SHARD).name, lambda _: None, lambda _: {"format": "pt"})
    model = load_component(foreign, device="cpu")
    assert_same_weights(model, load_component(folder, "transformer", device="cpu"))
    assert report(model).ok


def _assert_kept_as_in(plain: nn.Module, loaded: nn.Module) -> None:
    """What is not FP8 is what from_pretrained makes of it: dtype, bits, buffers, training mode."""
    fp8 = {n for n, m in loaded.named_modules() if isinstance(m, Fp8Weight)}
    state = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    for name, tensor in (dict(plain.named_parameters()) | dict(plain.named_buffers())).items():
        if name.removesuffix(".weight") not in fp8:
            assert state[name].dtype == tensor.dtype, name
            assert torch.equal(state[name], tensor), name
    assert not any(m.training for m in loaded.modules())


def test_codes_are_the_bytes_on_disk() -> None:
    transformer = load_component(converted("z_image"), "transformer", device="cpu")
    with safe_open(converted("z_image") / "transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        for name, module in transformer.named_modules():
            if isinstance(module, Fp8Weight):
                assert torch.equal(module.codes.view(torch.uint8), file.get_tensor(f"{name}.weight").view(torch.uint8))
                assert torch.equal(module.scale, file.get_tensor(f"{name}.weight_scale"))


@pytest.mark.parametrize("shards", ["300KB", None])
def test_sharded_fp32_sources_convert_on_the_way(shards: str | None) -> None:
    source = pipelines.saved("wan22", fp32_dits=True, max_shard_size=shards)
    transformer = load_component(source, "transformer", device="cpu", quantization="fp8")
    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.proj_out.weight.dtype == torch.bfloat16
    expected = load_component(pipelines.saved("wan22", fp32_dits=True), "transformer", device="cpu", quantization="fp8")
    assert_same_weights(transformer, expected)


def test_compact_stores_what_w8a8_skips(tmp_path: Path) -> None:
    folder = converted("qwen_image", compact=True)
    pipe = quiet(load_pipeline(folder, device="cpu"))
    counts = next(c.installed for c in report(pipe).components if c.name == "transformer")
    assert counts["w8a8"] == 20
    assert counts["storage"] == 8
    online = load_component(
        pipelines.saved("qwen_image"), "transformer", device="cpu", quantization="fp8", compact=True
    )
    assert_same_weights(pipe.transformer, online)
    assert psnr(run(pipe, "qwen_image"), run(bf16("qwen_image"), "qwen_image")) > 30


def test_vllm_omni_settings_for_all_and_for_each_component() -> None:
    source = pipelines.saved("qwen_image")
    blocks = {"method": "fp8", "ignored_layers": ["txt_mlp"], "weight_block_size": [128, 128]}
    everything = load_pipeline(source, device="cpu", quantization_config=blocks)
    assert everything.transformer.transformer_blocks[0].attn.to_q.scheme == "block128x128"
    assert type(everything.transformer.transformer_blocks[0].txt_mlp.net[2]) is nn.Linear
    single = load_pipeline(source, device="cpu", quantization_config={"transformer": blocks, "vae": None})
    assert_same_weights(single.transformer, everything.transformer)
    assert [c.installed for c in report(single).components if c.name != "transformer"] == [{}, {}]


def test_save_as_writes_the_snapshot_that_is_loaded(tmp_path: Path) -> None:
    pipe = load_pipeline(pipelines.saved("z_image"), device="cpu", quantization="fp8", save_as=tmp_path / "out")
    again = load_pipeline(tmp_path / "out", device="cpu")
    for name, module in modules_of(pipe).items():
        assert_same_weights(module, modules_of(again)[name])
    with pytest.raises(ValueError, match="is converted already"):
        load_pipeline(tmp_path / "out", device="cpu", save_as=tmp_path / "again")


def test_static_activations_come_with_the_snapshot(tmp_path: Path) -> None:
    dynamic = load_component(converted("z_image"), "transformer", device="cpu")
    scales = {n: torch.tensor(0.02) for n, m in dynamic.named_modules() if isinstance(m, Fp8Weight)}
    save_file({f"{n}.input_scale": s for n, s in scales.items()}, tmp_path / "scales.safetensors")
    convert(
        pipelines.saved("z_image"), tmp_path / "out", device="cpu", activation_scheme="static",
        input_scales=tmp_path / "scales.safetensors",
    )  # fmt: skip
    static = load_component(tmp_path / "out", "transformer", device="cpu", backend="scaled_mm")
    layer = static.layers[0].attention.to_q
    assert (float(layer.input_scale), layer.wanted) == (pytest.approx(0.02), "tensor")
    online = load_component(
        pipelines.saved("z_image"), "transformer", device="cpu",
        quantization_config={"activation_scheme": "static", "input_scales": tmp_path / "scales.safetensors"},
    )  # fmt: skip
    assert_same_weights(static, online)
    shard = tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"
    _rewrite(shard, lambda t: t.pop("layers.0.attention.to_q.input_scale"))
    with pytest.raises(LoadError, match=r"layers\.0\.attention\.to_q\.input_scale is missing"):
        load_component(tmp_path / "out", "transformer", device="cpu")


def test_component_folders_load_alone(tmp_path: Path) -> None:
    for name in ("transformer", "text_encoder"):
        shutil.copytree(converted("qwen_image") / name, tmp_path / name)
        alone = load_component(tmp_path / name, device="cpu")
        assert_same_weights(alone, load_component(converted("qwen_image"), name, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_compute_dtypes(dtype: torch.dtype) -> None:
    pipe = quiet(load_pipeline(converted("z_image"), device="cpu", dtype=dtype))
    assert pipe.transformer.dtype == dtype
    assert psnr(run(pipe, "z_image"), run(bf16("z_image"), "z_image")) > 30


def test_given_components_are_not_loaded() -> None:
    pipe = load_pipeline(converted("wan22"), device="cpu", transformer_2=None, vae=None)
    assert pipe.transformer_2 is None
    assert pipe.vae is None
    with pytest.raises(TypeError, match="takes no argument 'unet'"):
        load_pipeline(converted("wan22"), device="cpu", unet=None)


# What is refused


def test_originals_need_quantization() -> None:
    with pytest.raises(LoadError, match='pass quantization="fp8"'):
        load_pipeline(pipelines.saved("z_image"), device="cpu")
    with pytest.raises(LoadError, match='pass quantization="fp8"'):
        load_component(pipelines.saved("z_image"), "transformer", device="cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_scheme": "static"}, "needs calibrated scales"),
        ({"weight_block_size": [128, 128]}, "with weight_block_size None"),
        ({"ignored_layers": ["to_q"]}, "ignores 'to_q'"),
        ({"transformer": None}, "keeps it as it was"),
    ],
    ids=["static", "block", "ignored", "none"],
)
def test_settings_that_contradict_a_converted_snapshot(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pipeline(converted("z_image"), device="cpu", quantization_config=config)


def test_settings_that_agree_change_nothing() -> None:
    config = {
        "method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": None,
        "ignored_layers": ["t_embedder"],
    }
    for options in ({"quantization": "fp8"}, {"quantization_config": config}):
        pipe = load_pipeline(converted("z_image"), device="cpu", **options)
        assert report(pipe).ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int8"}, "the only one is 'fp8'"),
        ({"quantization_config": {"method": "int8"}}, "the only one is 'fp8'"),
        ({"quantization_config": {"ignore": []}}, "^'ignore' is not a setting; did you mean 'ignored_layers'"),
        ({"quantization_config": {"transformer": 8}}, "give a dict or None"),
    ],
    ids=["name", "method", "key", "value"],
)
def test_settings_that_mean_nothing(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pipeline(pipelines.saved("z_image"), device="cpu", **options)


def test_static_without_scales_is_refused() -> None:
    with pytest.raises(ConvertError, match="needs calibrated scales"):
        load_pipeline(pipelines.saved("z_image"), device="cpu", quantization_config={"activation_scheme": "static"})


def _rewrite(shard: Path, change: object, metadata: object = lambda m: m) -> None:
    """Changes a safetensors file's tensors, and its metadata, in place."""
    with safe_open(shard, "pt") as file:
        kept = file.metadata()
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata=metadata(kept))


SHARD = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "layers.0.attention.to_q"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted("z_image"), tmp_path / "damaged"))


def test_codes_without_a_scale_raise(damaged: Path) -> None:
    _rewrite(damaged / SHARD, lambda t: t.pop(f"{LAYER}.weight_scale"))
    with pytest.raises(LoadError, match=r"layers\.0\.attention\.to_q\.weight of transformer holds FP8 codes, but"):
        load_pipeline(damaged, device="cpu", strict=False)


def test_scales_of_another_dtype_raise(damaged: Path) -> None:
    _rewrite(damaged / SHARD, lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"].bfloat16()}))
    with pytest.raises(LoadError, match="which is not a scale for"):
        load_pipeline(damaged, device="cpu", strict=False)


def test_an_integer_weight_of_a_linear_is_told_and_cannot_be_loaded(tmp_path: Path) -> None:
    source = Path(shutil.copytree(pipelines.saved("z_image"), tmp_path / "source"))
    name = "cap_embedder.1.weight"
    _rewrite(source / SHARD, lambda t: t.update({name: t[name].to(torch.int8)}))
    result = convert(source, tmp_path / "out")
    assert any(f"{name} of transformer has the integer dtype I8" in note for note in result.plan.notes)
    for folder, options in ((tmp_path / "out", {}), (source, {"quantization": "fp8"})):
        with pytest.raises(LoadError, match=r"cap_embedder\.1\.weight of transformer has the dtype I8, and Lin"):
            load_pipeline(folder, device="cpu", **options)


def test_a_weight_that_lost_its_codes_raises(damaged: Path) -> None:
    _rewrite(damaged / SHARD, lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].bfloat16()}))
    with pytest.raises(LoadError, match="should be FP8 by the shards' metadata"):
        load_pipeline(damaged, device="cpu")


def test_fewer_modules_than_the_record_counts_raise_unless_told_not_to(damaged: Path) -> None:
    def forget(metadata: dict[str, str]) -> dict[str, str]:
        modules = json.loads(metadata["fp8_convert"])
        del modules[LAYER]
        return {**metadata, "fp8_convert": json.dumps(modules)}

    def dequantise(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors.pop(f"{LAYER}.weight_scale")
        tensors[f"{LAYER}.weight"] = (tensors[f"{LAYER}.weight"].float() * scale).bfloat16()

    _rewrite(damaged / SHARD, dequantise, forget)
    with pytest.raises(LoadError, match="the record counts 28 w8a8 modules, the shards hold 27"):
        load_pipeline(damaged, device="cpu")
    (damaged / "fp8_convert.json").unlink()
    with pytest.raises(LoadError, match=f"does not ignore {LAYER}"):
        load_pipeline(damaged, device="cpu")
    assert load_pipeline(damaged, device="cpu", strict=False).transformer is not None


def test_missing_weights_raise(damaged: Path) -> None:
    _rewrite(damaged / SHARD, lambda t: t.pop("x_pad_token"))
    with pytest.raises(LoadError, match="transformer lacks x_pad_token"):
        load_pipeline(damaged, device="cpu")


def test_report_tells_what_is_not_as_promised() -> None:
    pipe = load_pipeline(converted("z_image"), device="cpu")
    told = str(report(pipe))
    assert "28/28 w8a8" in told
    assert "10/10 storage" in told
    assert "28 linears run dequantize: the CPU has no FP8 matrix units" in told
    assert "every promised module is FP8" in told
    pipe.transformer.layers[0].attention.to_q = nn.Linear(256, 256)
    broken = report(pipe)
    assert not broken.ok
    assert "NOT FP8: layers.0.attention.to_q" in str(broken)
    assert "SOME PROMISED MODULES ARE NOT FP8" in str(broken)


def test_report_counts_bytes() -> None:
    transformer = load_component(converted("z_image"), "transformer", device="cpu")
    (part,) = report(transformer).components
    size = sum(t.nbytes for t in load_file(converted("z_image") / SHARD).values())
    assert part.bytes_at_rest - size == sum(b.nbytes for n, b in transformer.named_buffers() if "scale" not in n)
    plain = bf16("z_image").transformer
    assert part.bytes_in_bf16 == sum(t.nbytes for t in (*plain.parameters(), *plain.buffers()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["z_image", "qwen_image", "wan22"])
def test_cuda_loads_the_same_bytes_in_both_modes_and_runs(name: str) -> None:
    offline = quiet(load_pipeline(converted(name), device="cuda"))
    online = quiet(load_pipeline(pipelines.saved(name), device="cuda", quantization="fp8"))
    cpu = load_pipeline(converted(name), device="cpu")
    for part, module in modules_of(offline).items():
        assert module.device.type == "cuda"
        assert_same_weights(module, modules_of(online)[part])
        for key, tensor in modules_of(cpu)[part].state_dict().items():
            assert torch.equal(module.state_dict()[key].cpu(), tensor), key
    told = report(offline)
    assert told.ok
    transformer = next(c for c in told.components if c.name == "transformer")
    # The tiny Z-Image has 682 hidden features, no multiple of 16: those layers dequantise, and say why.
    assert any(backend.startswith("rows: ") for backend in transformer.backends)
    assert all(b.startswith("rows: ") or "16" in b for b in transformer.backends), transformer.backends
    picture = run(offline, name)
    assert torch.equal(picture, run(online, name))
    assert psnr(picture, run(bf16(name).to("cuda"), name)) > 30


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
def test_cuda_offloads_and_compiles() -> None:
    pipe = quiet(load_pipeline(converted("z_image"), device="cuda"))
    picture = run(pipe, "z_image")
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    assert psnr(run(pipe, "z_image"), picture) > 35
    pipe = quiet(load_pipeline(converted("z_image"), device="cpu"))
    pipe.enable_model_cpu_offload()
    assert torch.equal(run(pipe, "z_image"), picture)
    assert "rows: " in str(report(pipe))
    pipe = quiet(load_pipeline(converted("z_image"), device="cpu"))
    pipe.enable_sequential_cpu_offload()
    assert torch.equal(run(pipe, "z_image"), picture)
    pipe = quiet(load_pipeline(converted("z_image"), device="cpu"))
    pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    assert torch.equal(run(pipe, "z_image"), picture)
