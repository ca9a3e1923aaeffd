"""Checkpoints of other tools, end to end: codes byte for byte, and numbers as their own readers have them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import foreign
import loras
import pytest
import runs
import torch
from click.testing import CliRunner
from foreign import WRITERS, Checkpoint, as_file, as_folder, linears
from hub_server import running_hub
from pipelines import copied, saved
from reference import read_safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp8_convert.converter import (
    ConvertError,
    convert,
    dequantize,
    import_checkpoint,
    inspect,
    plan_import_checkpoint,
    verify,
)
from fp8_convert.converter.cli.commands import main
from fp8_convert.converter.targets.key_maps import key_map
from fp8_convert.converter.telling.progress import Silent
from fp8_convert.loader import load_component, load_pipeline
from fp8_convert.loader.weights import Fp8Weight

DIT = "transformer/diffusion_pytorch_model.safetensors"
SHARD = "diffusion_pytorch_model.safetensors"
RECORD = "fp8_convert.json"


def weights(name: str = "z_image", component: str = "transformer", file: str = SHARD) -> dict[str, torch.Tensor]:
    return load_file(saved(name) / component / file)


def component_of(folder: Path, component: str = "transformer") -> dict[str, Any]:
    return dict(json.loads((folder / RECORD).read_text())["components"][component])


def check(made: Checkpoint, out: Path, component: str = "transformer") -> None:
    """Codes keep their bytes, everything means what it meant, and the snapshot is whole."""
    assert verify(out).findings == ()
    assert inspect(out).ok
    given = load_file(out / component / SHARD)
    with safe_open(out / component / SHARD, "pt") as shard:
        modules = json.loads(shard.metadata()["fp8_convert"])
    assert {n for n in given if not n.endswith(("_scale", "_scale_inv"))} == made.meant.keys()
    for name, codes in made.codes.items():
        if name.removesuffix(".weight") in modules:
            assert torch.equal(given[name].view(torch.uint8), codes.view(torch.uint8)), name
        else:
            assert given[name].dtype == torch.bfloat16, name
    model = load_component(out, component, device="cpu", dtype=torch.float32)
    parts, loaded = dict(model.named_modules()), model.state_dict()
    for name, meant in made.meant.items():
        part = parts.get(name.rpartition(".")[0])
        if isinstance(part, Fp8Weight) and name.endswith(".weight"):
            assert torch.equal(part.dequantized(torch.float32), meant), name
        else:
            assert torch.equal(loaded[name].float(), meant), name


@pytest.mark.parametrize("layout", WRITERS)
def test_a_folder_of_every_layout(tmp_path: Path, layout: str) -> None:
    plain = weights()
    made = WRITERS[layout](plain, linears(plain))
    import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")
    check(made, tmp_path / "out")
    check_run(made, tmp_path / "out")
    entry = component_of(tmp_path / "out")
    assert entry["imported"] == layout.partition(" by ")[0].replace("scales of blocks", "fp8")
    assert entry["fp8_modules"]["w8a8"] == len(linears(plain))
    assert verify(tmp_path / "out").ok
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]
    assert config["activation_scheme"] == ("static" if layout == "ModelOpt" else "dynamic")
    assert config["quant_method"] in ("fp8", "fp8_convert")


@pytest.mark.parametrize(
    "layout", ["ComfyUI", "ComfyUI by tensors", "ComfyUI scaled", "scales of rows", "scales of blocks"]
)
def test_a_file_with_original_names(tmp_path: Path, layout: str) -> None:
    """Fused q, k and v are three ranges of rows, which share the scale where there is one."""
    plain = weights()
    plain["layers.0.feed_forward.w3.weight"] *= 2
    names = key_map("ZImageTransformer2DModel", {})
    assert names is not None
    originals = names.to_original({name: tuple(t.shape) for name, t in plain.items()})
    fused = {
        "model.diffusion_model." + o.name: torch.cat([plain[m] for m in o.members]).reshape(o.shape) for o in originals
    }
    fused["model.diffusion_model.norm_final.weight"] = torch.ones(4).bfloat16()  # diffusers' class does without it
    layers = ["model.diffusion_model." + names.original_module(module) for module in linears(plain)]
    made = WRITERS[layout](fused, dict.fromkeys(layers))
    result = import_checkpoint(as_file(made, tmp_path / "z.safetensors"), tmp_path / "out", base=saved("z_image"))
    native = Checkpoint()
    for original in originals:
        name = "model.diffusion_model." + original.name
        for number, member in enumerate(original.members):
            rows = made.meant[name].shape[0] // len(original.members) if len(original.members) > 1 else None
            part = slice(None) if rows is None else slice(number * rows, (number + 1) * rows)
            native.meant[member] = made.meant[name][part].reshape(plain[member].shape)
            if name in made.codes:
                native.codes[member] = made.codes[name][part]
    check(native, tmp_path / "out")
    record = component_of(tmp_path / "out")
    if not layout.startswith("ComfyUI"):
        assert record["unequal_scales"] == record["shared_scales"] == []
    else:
        assert ["layers.0.attention.to_k", "layers.0.attention.to_q", "layers.0.attention.to_v"] in record[
            "shared_scales"
        ]
        assert ["layers.0.feed_forward.w1", "layers.0.feed_forward.w3"] in record["unequal_scales"]
        assert any("differ in scale" in note and "feed_forward.w1" in note for note in result.plan.notes)
    for path in ("text_encoder/model.safetensors", "vae/" + SHARD, "model_index.json"):
        assert (tmp_path / "out" / path).read_bytes() == (saved("z_image") / path).read_bytes()


def test_bare_casts_are_said_loudly(tmp_path: Path) -> None:
    plain = weights()
    made = foreign.bare(plain, ())
    result = import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")
    scaleless, plain_again = result.plan.notes[1:3]
    assert "have NO SCALE in the source: their codes are taken for the values, with a scale of 1" in scaleless
    assert "are made BF16, since no layer holds them in FP8" in plain_again
    why = {d["why"] for d in component_of(tmp_path / "out")["decisions"]}
    assert "its codes are the values, with a scale of 1, layout bare cast" in why
    check(made, tmp_path / "out")


def check_run(made: Checkpoint, out: Path) -> None:
    """The same pixels as a plain pipeline whose DiT holds what the source's own readers compute."""
    pipe = runs.quiet(load_pipeline(out, device="cpu"))
    reference = runs.bf16("z_image")
    reference.transformer.load_state_dict({name: tensor.bfloat16() for name, tensor in made.meant.items()})
    assert torch.equal(runs.run(pipe, "z_image", steps=1), runs.run(reference, "z_image", steps=1))


def test_layers_that_are_not_to_be_run_in_fp8(tmp_path: Path) -> None:
    plain = weights()
    made = foreign.comfyui(plain, linears(plain), full_precision=True)
    import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")
    check_run(made, tmp_path / "out")
    assert component_of(tmp_path / "out")["fp8_modules"] == {"w8a8": 0, "storage": len(linears(plain))}


def test_qwen_keeps_what_its_manifest_ignores_out_of_w8a8(tmp_path: Path) -> None:
    plain = weights("qwen_image")
    made = foreign.comfyui(plain, linears(plain))
    import_checkpoint(as_file(made, tmp_path / "q.safetensors"), tmp_path / "out", base=saved("qwen_image"))
    check(made, tmp_path / "out")
    with safe_open(tmp_path / "out" / DIT, "pt") as shard:
        modules = json.loads(shard.metadata()["fp8_convert"])
    assert modules["transformer_blocks.0.attn.to_q"] == ["w8a8", "tensor"]
    assert modules["transformer_blocks.0.img_mlp.net.2"] == ["storage", "tensor"]


def test_two_files_one_after_the_other(tmp_path: Path) -> None:
    """Wan has two DiTs: the second file is imported over the snapshot that the first one gave."""
    plain = weights("wan22")
    made = foreign.channel(plain, linears(plain))
    file = as_file(made, tmp_path / "high.safetensors")
    with pytest.raises(ConvertError, match=r"could be transformer and transformer_2 .*say which one with --component"):
        import_checkpoint(file, tmp_path / "one", base=saved("wan22"))
    import_checkpoint(file, tmp_path / "one", base=saved("wan22"), component="transformer")
    import_checkpoint(file, tmp_path / "two", base=tmp_path / "one", component="transformer_2")
    for component in ("transformer", "transformer_2"):
        check(made, tmp_path / "two", component)
    first, second = (tmp_path / f / "transformer" / SHARD for f in ("one", "two"))
    assert load_file(first).keys() == load_file(second).keys()
    assert component_of(tmp_path / "two")["imported"] == "fp8-convert"


def test_shards_in_a_folder_without_a_config(tmp_path: Path) -> None:
    """As LightX2V saves by blocks; the scales may even lie in another file."""
    plain = weights("wan22")
    made = foreign.channel(plain, linears(plain))
    (tmp_path / "source").mkdir()
    names = [*made.tensors]
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: made.tensors[n].contiguous() for n in part}, tmp_path / "source" / f"block_{number}.safetensors")
    options: dict[str, Any] = {"base": saved("wan22"), "component": "transformer"}
    import_checkpoint(tmp_path / "source", tmp_path / "out", **options)
    assert verify(tmp_path / "out").ok
    model = load_component(tmp_path / "out", "transformer", device="cpu", dtype=torch.float32)
    for name, part in model.named_modules():
        if isinstance(part, Fp8Weight):
            assert torch.equal(part.dequantized(torch.float32), made.meant[f"{name}.weight"])


def test_a_text_encoder(tmp_path: Path) -> None:
    plain = weights("z_image", "text_encoder", "model.safetensors")
    layers = [n.removesuffix(".weight") for n, t in plain.items() if t.ndim == 2 and n.startswith("layers.")]
    made = foreign.comfyui_scaled({f"model.{n}": t for n, t in plain.items()}, [f"model.{m}" for m in layers])
    import_checkpoint(as_file(made, tmp_path / "qwen.safetensors"), tmp_path / "out", base=saved("z_image"))
    assert component_of(tmp_path / "out", "text_encoder")["fp8_modules"] == {"w8a8": 0, "storage": len(layers)}
    model = load_component(tmp_path / "out", "text_encoder", device="cpu", dtype=torch.float32)
    for name, part in model.named_modules():
        if isinstance(part, Fp8Weight):
            assert torch.equal(part.dequantized(torch.float32), made.meant[f"model.{name}.weight"])


def test_a_base_on_the_hub_is_named_and_its_weights_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = weights()
    file = as_file(foreign.comfyui(plain, linears(plain)), tmp_path / "z.safetensors")
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        commit = hub.add_repo("Tongyi-MAI/Z-Image-Turbo", saved("z_image"))
        import_checkpoint(file, tmp_path / "out", base="Tongyi-MAI/Z-Image-Turbo")
        assert not [*(tmp_path / "home").rglob(f"transformer/{SHARD}")]
    source = json.loads((tmp_path / "out" / RECORD).read_text())["source"]
    assert (source["repo"], source["base_repo"]) == (None, "Tongyi-MAI/Z-Image-Turbo")
    assert commit is None or source["base_commit"] == commit


def test_back_to_plain_weights(tmp_path: Path) -> None:
    """What was imported can be dequantised: every layout that is read has a way to stock diffusers."""
    plain = weights()
    for number, write in enumerate((foreign.channel, foreign.blocks, foreign.comfyui)):
        made = write(plain, linears(plain))
        import_checkpoint(as_folder(made, tmp_path / f"source{number}"), tmp_path / f"out{number}")
        result = dequantize(tmp_path / f"out{number}", tmp_path / f"back{number}")
        assert result.notes == ()
        given = load_file(tmp_path / f"back{number}" / DIT)
        assert all(torch.equal(given[n], meant.bfloat16()) for n, meant in made.meant.items())


def test_again_is_already_done(tmp_path: Path) -> None:
    plain = weights()
    source = as_folder(foreign.comfyui(plain, linears(plain)), tmp_path / "source")
    import_checkpoint(source, tmp_path / "out")
    assert import_checkpoint(source, tmp_path / "out").already_done
    file = source / DIT
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("weight_scale"))
    with safe_open(file, "pt") as shard:
        metadata = shard.metadata()
    save_file(tensors | {name: tensors[name] * 2}, file, metadata)
    with pytest.raises(ConvertError, match="made otherwise"):
        import_checkpoint(source, tmp_path / "out")
    assert not import_checkpoint(source, tmp_path / "out", force=True).already_done
    assert load_file(tmp_path / "out" / DIT)[name] == tensors[name] * 2


class Stops(Silent):
    """Stops the work when so many bytes of sources were read."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def advance(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_import_is_resumed(tmp_path: Path) -> None:
    plain = weights()
    source = as_folder(foreign.channel(plain, linears(plain)), tmp_path / "source")
    first = (source / "text_encoder" / "model.safetensors").stat().st_size
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(source, tmp_path / "out", progress=Stops(first + 1000))
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert import_checkpoint(source, tmp_path / "out").resumed_shards == 1
    import_checkpoint(source, tmp_path / "whole")
    for file in (p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes()


# What is refused


Q = "layers.0.attention.to_q"
COMFYUI = "_quantization_metadata"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}.weight", torch.zeros(256, 256).to(torch.float8_e5m2), "is F8_E5M2, and only F8_E4M3"),
        (f"{Q}.weight", torch.zeros(256, 256).to(torch.float8_e4m3fnuz), "is F8_E4M3FNUZ, and only F8_E4M3"),
        (f"{Q}.weight", torch.zeros(256, 256, dtype=torch.int8), "holds I8 codes"),
        (f"{Q}.weight", torch.zeros(256, 256).bfloat16(), "scales no FP8 weight"),
        (f"{Q}.weight", torch.full((256, 256), float("nan")).to(torch.float8_e4m3fn), "holds NaN codes"),
        (f"{Q}.weight_scale", torch.tensor(0.0), "not finite and positive"),
        (f"{Q}.weight_scale", torch.tensor(float("nan")), "not finite and positive"),
        (f"{Q}.weight_scale", torch.tensor(1e-60, dtype=torch.float64), "float32 cannot hold"),
        (f"{Q}.weight_scale", torch.ones(3), r"has the shape \[3\] for a weight of \[256, 256\]"),
        (f"{Q}.weight_scale", torch.ones(1, dtype=torch.int32), "none of scales"),
        (f"{Q}.scale_weight", torch.tensor(1.0), "has two scales"),
        (f"{Q}.weight_zero_point", torch.tensor(1.0), "quantised in a way that cannot be imported"),
        (f"{Q}.weight_scale_2", torch.tensor(1.0), "quantised in a way that cannot be imported"),
        ("nothing.weight_scale", torch.tensor(1.0), "scales no FP8 weight"),
        (f"{Q}.input_scale", torch.ones(2), r"input_scale in .* has the shape \[2\]; one scale can be imported"),
        (f"{Q}.k_scale", torch.tensor(1.0), "quantised in a way that cannot be imported"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_be_imported(tmp_path: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    plain = weights()
    made = foreign.comfyui(plain, linears(plain))
    made.tensors[name] = tensor
    with pytest.raises(ConvertError, match=message):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "torchao"}, "has the quant_method 'torchao', which cannot be imported"),
        ({"quant_method": "bitsandbytes"}, "has the quant_method 'bitsandbytes'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantised by ModelOpt to 'NVFP4'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "format 'pack-quantized'"),
        ({}, "has the quant_method None"),
        ({"quant_method": ["fp8"]}, r"has the quant_method \['fp8'\]"),
        ({"quant_method": {"a": 1}}, "has the quant_method {'a': 1}"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, r"states the block \[0, 1\]"),
    ],
)
def test_configs_that_cannot_be_imported(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    plain = weights()
    made = foreign.blocks(plain, linears(plain))
    made.config = config
    with pytest.raises(ConvertError, match=message):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "statement", "message"),
    [
        (COMFYUI, '{"layers": {"layers.0.attention.to_q": {"format": "nvfp4"}}}', "has ComfyUI's format 'nvfp4'"),
        (COMFYUI, '{"layers": {"no.such.layer": {"format": "float8_e4m3fn"}}}', "no.such.layer .* should be FP8"),
        (COMFYUI, '{"layers": 1}', "names no layers"),
        (COMFYUI, "{", "is not valid JSON"),
        (COMFYUI, "[]", "is no JSON object"),
        ("fp8_convert", "[]", r"has unreadable fp8_convert metadata \(not a JSON object\)"),
    ],
)
def test_statements_that_do_not_fit(tmp_path: Path, key: str, statement: str, message: str) -> None:
    plain = weights()
    made = foreign.comfyui(plain, linears(plain))
    made.metadata[key] = statement
    with pytest.raises(ConvertError, match=message):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize("name", ["scale", "weight_quantizer._amax", "weight._scale"])
def test_scales_of_a_layout_that_is_not_known(tmp_path: Path, name: str) -> None:
    """Codes under them would be garbage that loads."""
    made = foreign.bare(weights(), ())
    made.tensors[f"{Q}.{name}"] = torch.tensor(1.0)
    with pytest.raises(ConvertError, match=rf"{Q}\.weight holds FP8 codes, and {Q}\.{name} may be their scale"):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize("layout", [name for name in WRITERS if name != "bare cast"])
def test_a_scale_that_was_lost(tmp_path: Path, layout: str) -> None:
    """Its codes are no values, and would load as garbage."""
    plain = weights()
    made = WRITERS[layout](plain, linears(plain))
    for suffix in ("weight_scale", "scale_weight", "weight_scale_inv"):
        made.tensors.pop(f"{Q}.{suffix}", None)
    with pytest.raises(ConvertError, match=rf"{Q}\.weight of transformer holds FP8 codes without a scale, although"):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ({"config": {"quant_method": "fp8"}}, "although the config states a quantisation"),
        ({"marker": torch.zeros(0, dtype=foreign.E4M3)}, "although scaled_fp8 is there"),
        ({"layers": {Q: {"format": "float8_e4m3fn"}}}, "although the file's header or its tensors name FP8 layers"),
    ],
)
def test_all_scales_were_lost(tmp_path: Path, statement: dict[str, Any], message: str) -> None:
    made = foreign.bare(weights(), ())
    made.config = statement.get("config")
    if "marker" in statement:
        made.tensors["scaled_fp8"] = statement["marker"]
    if "layers" in statement:
        made.metadata["_quantization_metadata"] = json.dumps({"layers": statement["layers"]})
    with pytest.raises(ConvertError, match=message):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")


def test_a_marker_of_two_elements_asks_for_full_precision(tmp_path: Path) -> None:
    plain = weights()
    made = foreign.comfyui_scaled(plain, linears(plain))
    made.tensors["scaled_fp8"] = torch.zeros(2, dtype=foreign.E4M3)
    import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")
    assert component_of(tmp_path / "out")["fp8_modules"] == {"w8a8": 0, "storage": len(linears(plain))}


@pytest.mark.parametrize("marker", [torch.zeros(2), torch.zeros(3, dtype=foreign.E4M3)])
def test_a_marker_that_is_not_known(tmp_path: Path, marker: torch.Tensor) -> None:
    plain = weights()
    made = foreign.comfyui_scaled(plain, linears(plain))
    made.tensors["scaled_fp8"] = marker
    with pytest.raises(ConvertError, match=r"scaled_fp8 in .* is no marker of a layout that is known"):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("convrot", True, f"{Q} in .* has 'convrot' in its ComfyUI entry"),
        ("full_precision_matrix_mult", 1, "full_precision_matrix_mult 1, which is no true or false"),
    ],
)
def test_layers_with_more_than_a_format(tmp_path: Path, key: str, value: Any, message: str) -> None:
    plain = weights()
    made = foreign.comfyui(plain, linears(plain))
    statement = json.loads(made.metadata["_quantization_metadata"])
    statement["layers"][Q] = {"format": "float8_e4m3fn", key: value}
    made.metadata["_quantization_metadata"] = json.dumps(statement)
    with pytest.raises(ConvertError, match=message):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "has a transform_config"),
        ({"config_groups": {"a": {"weights": {"num_bits": 8, "type": "int"}}}}, "'a' in config_groups, whose weights"),
        (
            {
                "config_groups": {
                    name: {"weights": {"num_bits": 8, "type": "float", "block_structure": [side, side]}}
                    for name, side in (("a", 128), ("b", 130))
                }
            },
            "'b' in config_groups, whose weights are quantised otherwise",
        ),
    ],
)
def test_compressed_tensors_that_cannot_be_imported(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    plain = weights()
    made = foreign.compressed_tensor(plain, linears(plain))
    made.config = (made.config or {}) | change
    with pytest.raises(ConvertError, match=message):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")


def test_what_is_assumed_or_left_out_is_said(tmp_path: Path) -> None:
    plain = weights()
    made = foreign.blocks(plain, linears(plain))
    file = as_file(made, tmp_path / "z.safetensors")
    notes = plan_import_checkpoint(file, base=saved("z_image")).notes
    assert any("no config states the size of blocks: 128x128 is assumed" in note for note in notes)
    made = foreign.channel(plain, linears(plain))
    made.config = {"quant_method": "compressed-tensors", "format": "float-quantized", "activation_scheme": "static"}
    made.tensors["t_embedder.mlp.0.input_scale"] = torch.tensor(2.0)
    notes = plan_import_checkpoint(as_folder(made, tmp_path / "source")).notes
    assert any("states static activations, and the file has no input scales" in note for note in notes)
    assert any("t_embedder.mlp.0.input_scale left out: of layers that are not FP8" in note for note in notes)


def test_two_input_scales_that_differ(tmp_path: Path) -> None:
    plain = weights()
    made = foreign.modelopt(plain, linears(plain))
    made.tensors[f"{Q}.scale_input"] = torch.tensor(9.0)
    with pytest.raises(ConvertError, match=rf"{Q}\.input_scale and {Q}\.scale_input differ"):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")


NORM = "layers.0.attention_norm1.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q}.smooth_factor", torch.ones(4), "is no tensor of ZImageTransformer2DModel"),
        (f"{Q}_scale", torch.ones(1), "is no tensor of ZImageTransformer2DModel"),
        (f"{NORM}_lora", torch.ones(1), "is no tensor of ZImageTransformer2DModel"),
        ("layers.0.adaLN_modulation.0.bias_scale", torch.ones(1), "is no tensor of ZImageTransformer2DModel"),
        (NORM, torch.ones(3).bfloat16(), r"has the shape \[3\], and ZImageTransformer2DModel wants \[256\]"),
        (f"{Q}.weight", torch.zeros(256, 128).to(foreign.E4M3), r"has the shape \[256, 128\], and"),
        (NORM, None, "of ZImageTransformer2DModel is missing"),
    ],
)
def test_a_folder_does_not_fit_its_class(tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str) -> None:
    plain = weights()
    made = foreign.comfyui(plain, linears(plain))
    made.tensors[name] = tensor if tensor is not None else made.tensors[name]
    if tensor is None:
        del made.tensors[name]
    with pytest.raises(ConvertError, match=f"transformer cannot be imported: {name} {message}"):
        import_checkpoint(as_folder(made, tmp_path / "source"), tmp_path / "out")


def test_a_text_encoder_with_a_head(tmp_path: Path) -> None:
    """Its class does without the head; what stands beside a layer's weights is no head."""
    plain = weights("z_image", "text_encoder", "model.safetensors")
    layers = [n.removesuffix(".weight") for n, t in plain.items() if t.ndim == 2 and n.startswith("layers.")]
    made = foreign.channel(plain, layers)
    made.tensors["lm_head.weight"] = torch.ones(4, 4)
    source = copied(saved("z_image"), tmp_path / "source")
    as_file(made, source / "text_encoder" / "model.safetensors")
    plan_import_checkpoint(source)
    made.tensors[f"{layers[0]}.wscales"] = torch.ones(4)
    as_file(made, source / "text_encoder" / "model.safetensors")
    with pytest.raises(ConvertError, match=rf"{layers[0]}\.wscales is no tensor of Qwen3Model"):
        plan_import_checkpoint(source)


def test_checkpoints_that_do_not_fit_the_base(tmp_path: Path) -> None:
    plain = weights()
    made = foreign.comfyui(plain, linears(plain))
    options: dict[str, Any] = {"base": saved("z_image"), "component": "transformer"}

    def refused(tensors: dict[str, torch.Tensor], message: str, **others: Any) -> None:
        save_file(tensors, tmp_path / "z.safetensors", made.metadata)
        with pytest.raises(ConvertError, match=message):
            import_checkpoint(tmp_path / "z.safetensors", tmp_path / "out", **options | others)

    bias = "layers.0.adaLN_modulation.0.bias"
    refused({n: t for n, t in made.tensors.items() if n != bias}, f"lacks {bias} of transformer")
    refused(made.tensors | {"surprise.weight": torch.ones(2)}, r"surprise\.weight is no tensor of transformer")
    refused(made.tensors | {bias: torch.ones(2)}, rf"{bias} has the shape \[2\]")
    refused(made.tensors, "has no component 'unet'", component="unet")
    refused(made.tensors, "is none of the components of", base=saved("flux"), component=None)
    refused(plain, "has no FP8 weights; there is nothing to import")
    with pytest.raises(ConvertError, match="holds weights alone; name with --base"):
        import_checkpoint(tmp_path / "z.safetensors", tmp_path / "out")


def test_fp8_that_no_layer_holds(tmp_path: Path) -> None:
    """Under one scale it becomes BF16, which leaves nothing to import here; under others it cannot."""
    made = foreign.comfyui(weights(), [])
    made.metadata = {}
    made.tensors[NORM] = made.tensors[NORM].to(foreign.E4M3)
    with pytest.raises(ConvertError, match="has no FP8 weights of layers that can hold them: nothing to import"):
        plan_import_checkpoint(as_folder(made, tmp_path / "norm"))
    made = foreign.channel(weights("z_image", "text_encoder", "model.safetensors"), ["embed_tokens"])
    source = copied(saved("z_image"), tmp_path / "source")
    as_file(made, source / "text_encoder" / "model.safetensors")
    message = "embed_tokens.weight of text_encoder has FP8 codes with scales of rows or blocks, but an FP8 Embedding"
    with pytest.raises(ConvertError, match=message):
        plan_import_checkpoint(source)


def test_a_layer_without_its_input_scale(tmp_path: Path) -> None:
    """Activations are dynamic then, and the scales of all others are not used."""
    made = foreign.modelopt(weights(), linears(weights()))
    del made.tensors[f"{Q}.input_scale"]
    plan = plan_import_checkpoint(as_folder(made, tmp_path / "source"))
    others = len(linears(weights())) - 1
    note = f"{others} input scales of the source are left out (not every W8A8 layer has one: dynamic)"
    assert plan.recipe.activation_scheme == "dynamic"
    assert note in plan.notes


def test_what_a_class_keeps_in_float32_is_not_fp8(tmp_path: Path) -> None:
    made = foreign.bare(weights("wan22"), ())
    plan = plan_import_checkpoint(as_folder(made, tmp_path / "source", "wan22"))
    decisions = {t.info.name: t.decision for c in plan.components for t in c.tensors if c.source.name == "transformer"}
    kept = decisions["condition_embedder.time_embedder.linear_1.weight"]
    assert (kept.fp8, kept.why) == (False, "the component's class keeps it in float32")
    assert decisions["blocks.0.ffn.net.2.weight"].fp8


def test_a_folder_beside_its_config_for_a_base_of_one_component(tmp_path: Path) -> None:
    """What the config says of blocks is believed, and a base with one component leaves no choice."""
    made = foreign.blocks(weights(), linears(weights()))
    (tmp_path / "source").mkdir()
    as_file(made, tmp_path / "source" / SHARD)
    (tmp_path / "source" / "config.json").write_text(json.dumps({"quantization_config": made.config}))
    plan = plan_import_checkpoint(tmp_path / "source", base=saved("z_image") / "transformer")
    assert plan.components[0].source.name == ""
    assert not any("128x128 is assumed" in note for note in plan.notes)
    as_file(made, tmp_path / "source" / "other.safetensors")
    with pytest.raises(ConvertError, match=rf"is in both {SHARD} and other.safetensors of .*; keep one of them"):
        plan_import_checkpoint(tmp_path / "source", base=saved("z_image"))


def test_folders_that_say_what_they_are(tmp_path: Path) -> None:
    made = foreign.comfyui(weights(), linears(weights()))
    (tmp_path / "weights").mkdir()
    with pytest.raises(ConvertError, match=r"has no .safetensors files; give one, or a folder of them"):
        plan_import_checkpoint(tmp_path / "weights", base=saved("z_image"))
    as_file(made, tmp_path / "weights" / "z.safetensors")
    with pytest.raises(ConvertError, match="holds weights alone; name with --base"):
        plan_import_checkpoint(tmp_path / "weights")
    with pytest.raises(ConvertError, match="is its own base; drop --component"):
        plan_import_checkpoint(saved("z_image"), component="transformer")
    convert(saved("z_image") / "transformer", tmp_path / "fp8")
    with pytest.raises(ConvertError, match="was converted by fp8-convert, and there is nothing to import"):
        plan_import_checkpoint(tmp_path / "fp8", base=saved("z_image"))


def test_a_base_whose_record_was_edited(tmp_path: Path) -> None:
    file = as_file(foreign.comfyui(weights(), linears(weights())), tmp_path / "z.safetensors")
    convert(saved("z_image") / "transformer", tmp_path / "base")
    record = tmp_path / "base" / RECORD
    record.write_text(record.read_text().replace('"compact": false', '"compact": true'))
    for door in (lambda: plan_import_checkpoint(file, base=tmp_path / "base"), lambda: dequantize(record.parent, "x")):
        with pytest.raises(ConvertError, match=r"fp8_convert\.json.* was changed since it was written"):
            door()


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK")
    os.mkfifo(tmp_path / "fifo.safetensors")
    for source, message in (
        (tmp_path / "model.pt", r"model\.pt is no safetensors file, and nothing else is imported"),
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "fifo.safetensors", "is a FIFO instead of a file"),
        (Path("/dev/zero"), "is a device instead of a file"),
    ):
        with pytest.raises(ConvertError, match=message):
            import_checkpoint(source, tmp_path / "out", base=saved("z_image"))
    with pytest.raises(ConvertError, match="is not quantised; convert it instead"):
        import_checkpoint(saved("z_image"), tmp_path / "out")
    convert(saved("z_image"), tmp_path / "fp8")
    with pytest.raises(ConvertError, match="already converted by fp8-convert"):
        import_checkpoint(tmp_path / "fp8", tmp_path / "out")
    save_file({"a._weight_qdata": torch.ones(2)}, tmp_path / "ao.safetensors", {"tensor_names": '["a.weight"]'})
    with pytest.raises(ConvertError, match="flattened torchao tensors"):
        import_checkpoint(tmp_path / "ao.safetensors", tmp_path / "out", base=saved("z_image"))


def poked(file: Path) -> None:
    """Change one bit of a file; of a code, its sign."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x80
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("text_encoder/model.safetensors", r"text_encoder/model\.safetensors has another sha256 than the record"),
        ("vae/" + SHARD, "has another sha256 than the record"),
        ("vae/config.json", r"vae/config\.json of .* has another sha256 than the record says"),
        (RECORD, r"fp8_convert\.json of .* is damaged"),
        (DIT, None),  # is replaced
    ],
)
def test_a_damaged_base_is_not_passed_on(tmp_path: Path, path: str, message: str | None) -> None:
    plain = weights()
    file = as_file(foreign.comfyui(plain, linears(plain)), tmp_path / "z.safetensors")
    convert(saved("z_image"), tmp_path / "base")
    poked(tmp_path / "base" / path)
    if message is None:
        import_checkpoint(file, tmp_path / "out", base=tmp_path / "base")
        return
    with pytest.raises(ConvertError, match=message):
        import_checkpoint(file, tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out" / RECORD).exists()


def test_a_folder_of_one_file_of_this_projects_own(tmp_path: Path) -> None:
    """A component that was converted without its pipeline has no name in the record: its tensors tell what it is."""
    convert(saved("wan22") / "transformer", tmp_path / "comfyui", target="comfyui")
    [file] = (tmp_path / "comfyui" / "diffusion_models").iterdir()
    wan: dict[str, Any] = {"base": saved("wan22")}
    import_checkpoint(file, tmp_path / "by-file", component="transformer_2", **wan)
    import_checkpoint(tmp_path / "comfyui", tmp_path / "by-folder", component="transformer_2", **wan)
    ours, theirs = (tmp_path / out / "transformer_2" / SHARD for out in ("by-folder", "by-file"))
    assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(ConvertError, match=r"could be transformer and transformer_2 of .*; say which one with"):
        import_checkpoint(tmp_path / "comfyui", tmp_path / "out", **wan)
    (tmp_path / "comfyui" / RECORD).unlink()
    with pytest.raises(ConvertError, match=rf"has no .safetensors files but in folders; give one, such as {file}"):
        import_checkpoint(tmp_path / "comfyui", tmp_path / "out", **wan)


def test_a_damaged_source_of_this_projects_own(tmp_path: Path) -> None:
    convert(saved("z_image"), tmp_path / "comfyui", target="comfyui")
    [file] = (tmp_path / "comfyui" / "diffusion_models").iterdir()
    import_checkpoint(tmp_path / "comfyui", tmp_path / "whole", base=saved("z_image"))
    poked(file)
    with pytest.raises(ConvertError, match=rf"{file.name} has another sha256 than the record"):
        import_checkpoint(tmp_path / "comfyui", tmp_path / "out", base=saved("z_image"))
    with pytest.raises(ConvertError, match=rf"{file.name} has another sha256 than .*fp8_convert\.json says"):
        import_checkpoint(file, tmp_path / "out", base=saved("z_image"))


def test_the_loras_of_a_base_stay_in_the_record(tmp_path: Path) -> None:
    plain = weights()
    file = as_file(foreign.comfyui(plain, linears(plain)), tmp_path / "z.safetensors")
    module = "layers.0.self_attn.q_proj"
    shape = weights("z_image", "text_encoder", "model.safetensors")[f"{module}.weight"].shape
    lora = loras.write(
        tmp_path / "l.safetensors", loras.prefixed("text_encoder.", loras.pairs({module: (shape[0], shape[1])}))
    )
    convert(saved("z_image"), tmp_path / "base", merge_lora=[str(lora)])
    for number in range(2):  # what is imported over an import, too
        import_checkpoint(file, tmp_path / f"out{number}", base=tmp_path / ("base", "out0")[number])
        before, after = (
            json.loads((tmp_path / folder / RECORD).read_text())["recipe"]["merged_loras"]
            for folder in ("base", f"out{number}")
        )
        assert len(before) == 1
        assert before == after
        assert verify(tmp_path / f"out{number}").ok


def test_an_import_is_not_compared_with_a_source(tmp_path: Path) -> None:
    plain = weights()
    source = as_folder(foreign.comfyui(plain, linears(plain)), tmp_path / "source")
    import_checkpoint(source, tmp_path / "out")
    with pytest.raises(ConvertError, match=r"was imported \(layout ComfyUI\).*verify it without --source"):
        verify(tmp_path / "out", source=source)


def test_what_describes_the_old_weights_is_left_out(tmp_path: Path) -> None:
    plain = weights()
    source = as_folder(foreign.modelopt(plain, linears(plain)), tmp_path / "source")
    (source / "transformer" / "hf_quant_config.json").write_text("{}")
    result = import_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out/transformer/hf_quant_config.json").exists()
    assert any("hf_quant_config.json is left out" in note for note in result.plan.notes)


# The command


def test_command(tmp_path: Path) -> None:
    plain = weights()
    file = as_file(foreign.comfyui(plain, linears(plain)), tmp_path / "z.safetensors")
    arguments = ["import", str(file), "--base", str(saved("z_image"))]
    text = CliRunner().invoke(main, [*arguments, "--dry-run"], catch_exceptions=False).stdout
    assert "fp8 w8a8 tensor  Linear" in text
    assert "left out" in text
    assert not (tmp_path / "out").exists()
    line = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out")], catch_exceptions=False)
    assert line.stdout.startswith(f"wrote {tmp_path / 'out'}: ")
    assert "note: transformer: " in line.stderr
    done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out"), "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["already_done"]
    assert CliRunner().invoke(main, arguments).exit_code == 2
    plan = plan_import_checkpoint(file, base=saved("z_image"))
    assert sum(t.decision.fp8 for c in plan.components for t in c.tensors) == len(linears(plain))


@pytest.mark.parametrize("name", ["z_image", "qwen_image", "wan22"])
def test_ours_to_comfyui_and_back(tmp_path: Path, name: str) -> None:
    """Every code and every scale of a conversion per tensor comes back from ComfyUI's files with its bytes."""
    convert(saved(name), tmp_path / "comfyui", target="comfyui")
    convert(saved(name), tmp_path / "ours", components=_dits(name))
    result = import_checkpoint(tmp_path / "comfyui", tmp_path / "back", base=saved(name))
    assert verify(tmp_path / "back").ok
    assert not any("differ in scale" in note for note in result.plan.notes)
    for dit in _dits(name):
        ours, back = (tmp_path / folder / dit / SHARD for folder in ("ours", "back"))
        expected, given = read_safetensors(ours), read_safetensors(back)
        assert given.keys() == expected.keys()
        assert [n for n, tensor in expected.items() if tensor != given[n]] == []
        configs = [json.loads((tmp_path / folder / dit / "config.json").read_text()) for folder in ("ours", "back")]
        assert configs[0] == configs[1]
        assert (
            component_of(tmp_path / "ours", dit)["shared_scales"]
            == component_of(tmp_path / "back", dit)["shared_scales"]
        )
    load_pipeline(tmp_path / "back", device="cpu")


def test_a_folder_of_ours_for_comfyui_is_no_base(tmp_path: Path) -> None:
    convert(saved("z_image"), tmp_path / "comfyui", target="comfyui")
    options: dict[str, Any] = {"base": tmp_path / "comfyui"}
    with pytest.raises(ConvertError, match=r"has no configs; name with --base a snapshot in diffusers' layout"):
        import_checkpoint(tmp_path / "comfyui", tmp_path / "out", **options)
    with pytest.raises(ConvertError, match="import them with `fp8-convert import` first"):
        dequantize(tmp_path / "comfyui", tmp_path / "out")
    with pytest.raises(ConvertError, match=r"has no file of 'unet'; it has those of"):
        import_checkpoint(tmp_path / "comfyui", tmp_path / "out", base=saved("z_image"), component="unet")


def _dits(name: str) -> list[str]:
    return ["transformer", "transformer_2"] if name == "wan22" else ["transformer"]
