"""A merged LoRA is what diffusers' `fuse_lora` on the source, followed by a conversion, gives: bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import loras
import pytest
import torch
from click.testing import CliRunner
from hub_server import running_hub
from loras import bare_pipeline, fused, kohya, linears, pairs, prefixed, write
from pipelines import copied, saved
from safetensors.torch import load_file

from fp8_convert.converter import ConvertError, convert, inspect, plan_conversion, verify
from fp8_convert.converter.cli.commands import main
from fp8_convert.loader import load_component, load_pipeline


def same_weights(ours: Path, theirs: Path, component: str) -> None:
    paths = sorted(p.relative_to(ours) for p in (ours / component).glob("*.safetensors"))
    assert paths
    for path in paths:
        assert (ours / path).read_bytes() == (theirs / path).read_bytes(), path


def shapes(name: str) -> dict[str, tuple[int, int]]:
    return linears(bare_pipeline(saved(name), name).transformer)


def wan_name(module: str) -> str:
    """The name in Wan's original model of a module of diffusers'."""
    for ours, theirs in (
        ("attn1", "self_attn"), ("attn2", "cross_attn"), ("to_out.0", "o"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
        ("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"),
    ):  # fmt: skip
        module = module.replace(ours, theirs)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_it_is_what_fuse_lora_gives(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Of every linear layer: converted ones, those that share a scale, and those that stay BF16."""
    file = write(tmp_path / "lora.safetensors", prefixed("transformer.", pairs(shapes(name), dtype=dtype)))
    convert(fused(saved(name), tmp_path / "fused", name, [(file, 0.8)]), tmp_path / "theirs")
    result = convert(saved(name), tmp_path / "ours", merge_lora=[f"{file}:0.8"])
    same_weights(tmp_path / "ours", tmp_path / "theirs", "transformer")
    assert any(t.merges and not t.decision.fp8 for c in result.plan.components for t in c.tensors)


def test_blocks_and_storage(tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", prefixed("transformer.", pairs(shapes("qwen_image"))))
    options: dict[str, Any] = {"weight_block_size": [128, 128], "compact": True}
    convert(fused(saved("qwen_image"), tmp_path / "fused", "qwen_image", [(file, 1.0)]), tmp_path / "theirs", **options)
    convert(saved("qwen_image"), tmp_path / "ours", merge_lora=[file], **options)
    same_weights(tmp_path / "ours", tmp_path / "theirs", "transformer")


def test_several_are_added_one_after_the_other(tmp_path: Path) -> None:
    one, other = (
        write(tmp_path / f"{seed}.safetensors", prefixed("transformer.", pairs(shapes("z_image"), 4, seed)))
        for seed in (1, 2)
    )
    source = fused(saved("z_image"), tmp_path / "fused", "z_image", [(one, 1.0), (other, -0.5)])
    convert(source, tmp_path / "theirs")
    convert(saved("z_image"), tmp_path / "ours", merge_lora=[one, (other, -0.5)])
    same_weights(tmp_path / "ours", tmp_path / "theirs", "transformer")
    stated = json.loads((tmp_path / "ours/fp8_convert.json").read_text())["recipe"]["merged_loras"]
    assert [lora["scale"] for lora in stated] == [1.0, -0.5]


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_kohya(tmp_path: Path, name: str) -> None:
    blocks = {n: s for n, s in shapes(name).items() if "attn" in n or "attention" in n}
    state = kohya(pairs(blocks), lambda module: module)
    file = write(tmp_path / "lora.safetensors", state)
    convert(fused(saved(name), tmp_path / "fused", name, [(file, 0.7)]), tmp_path / "theirs")
    result = convert(saved(name), tmp_path / "ours", merge_lora=[f"{file}:0.7"])
    same_weights(tmp_path / "ours", tmp_path / "theirs", "transformer")
    assert f"into {len(blocks)} weights of transformer" in result.plan.notes[0]


@pytest.mark.parametrize("style", ["kohya", "original", "peft"])
def test_wan_has_a_lora_for_each_of_its_dits(tmp_path: Path, style: str) -> None:
    """In FP32 modules of a BF16 DiT too. Each DiT is named, for nothing in a file tells high noise from low."""
    inside = {n: s for n, s in shapes("wan22").items() if n.startswith("blocks.")}
    everything = shapes("wan22")
    state = {
        "kohya": lambda: kohya(pairs(inside), wan_name),
        "original": lambda: {
            f"diffusion_model.{wan_name(key.rsplit('.', 2)[0])}.{'.'.join(key.rsplit('.', 2)[1:])}": value
            for key, value in pairs(inside).items()
        },
        "peft": lambda: prefixed("transformer.", pairs(everything)),
    }[style]()
    file = write(tmp_path / "low.safetensors", state)
    source = fused(saved("wan22"), tmp_path / "fused", "wan22", [(file, 0.9)], into="transformer_2")
    convert(source, tmp_path / "theirs")
    with pytest.raises(ConvertError, match=r"low.safetensors may be for transformer or transformer_2; say which as"):
        plan_conversion(saved("wan22"), merge_lora=[file])
    convert(saved("wan22"), tmp_path / "ours", merge_lora=[f"transformer_2={file}:0.9"])
    for component in ("transformer", "transformer_2"):
        same_weights(tmp_path / "ours", tmp_path / "theirs", component)


def test_a_dit_that_alone_is_asked_for_needs_no_name(tmp_path: Path) -> None:
    file = write(tmp_path / "low.safetensors", prefixed("transformer.", pairs(shapes("wan22"))))
    named = f"transformer_2={file}"
    convert(saved("wan22"), tmp_path / "named", components=["transformer_2"], merge_lora=[named])
    convert(saved("wan22"), tmp_path / "ours", components=["transformer_2"], merge_lora=[file])
    for component in ("transformer", "transformer_2"):
        same_weights(tmp_path / "ours", tmp_path / "named", component)
    assert verify(tmp_path / "ours", source=saved("wan22"), merge_lora=[file]).ok
    converted = load_component(tmp_path / "ours", "transformer_2", device="cpu").state_dict()
    config = {"merge_lora": [file]}
    loaded = load_component(saved("wan22"), "transformer_2", device="cpu", quantization_config=config).state_dict()
    assert all(torch.equal(value, converted[key]) for key, value in loaded.items())


def test_fp32_weights(tmp_path: Path) -> None:
    """As Wan2.2 is published: nothing is rounded but to float32, and A and B stay as they are."""
    source = saved("wan22", fp32_dits=True)
    file = write(tmp_path / "high.safetensors", prefixed("transformer.", pairs(shapes("wan22"))))
    theirs = fused(source, tmp_path / "fused", "wan22", [(file, 1.0)], dtype=torch.float32)
    convert(theirs, tmp_path / "theirs")
    convert(source, tmp_path / "ours", merge_lora=[f"transformer={file}"])
    same_weights(tmp_path / "ours", tmp_path / "theirs", "transformer")


def test_members_of_a_group_in_other_shards(tmp_path: Path) -> None:
    """Their amaxes are measured beforehand, with what is added."""
    source = saved("z_image", max_shard_size="300KB")
    file = write(tmp_path / "lora.safetensors", prefixed("transformer.", pairs(shapes("z_image"))))
    convert(saved("z_image"), tmp_path / "whole", merge_lora=[file])
    result = convert(source, tmp_path / "shards", merge_lora=[file])
    assert result.plan.bytes_read_twice
    ours, whole = ({}, {})
    for folder, tensors in ((tmp_path / "shards", ours), (tmp_path / "whole", whole)):
        for path in (folder / "transformer").glob("*.safetensors"):
            tensors.update(load_file(path))
    assert ours.keys() == whole.keys()
    for key, value in ours.items():
        assert torch.equal(value.flatten().view(torch.uint8), whole[key].flatten().view(torch.uint8)), key


def test_a_shard_without_fp8_weights_is_merged_too(tmp_path: Path) -> None:
    """Here all that is merged stays BF16, and the shard is one that is otherwise copied."""
    state = {n: s for n, s in shapes("z_image").items() if "embedder" in n or "final" in n}
    file = write(tmp_path / "lora.safetensors", prefixed("transformer.", pairs(state)))
    source = fused(saved("z_image"), tmp_path / "fused", "z_image", [(file, 1.0)])
    result = convert(saved("z_image", max_shard_size="300KB"), tmp_path / "ours", merge_lora=[file])
    assert any(s.copied and any(t.merges for t in s.tensors) for s in result.plan.shards)
    written: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "ours/transformer").glob("*.safetensors"):
        written.update(load_file(path))
    (shard,) = (source / "transformer").glob("*.safetensors")
    theirs = load_file(shard)
    for module in state:
        assert torch.equal(written[f"{module}.weight"], theirs[f"{module}.weight"])
    assert verify(tmp_path / "ours", source=saved("z_image", max_shard_size="300KB"), merge_lora=[file]).ok


def test_flux_and_its_text_encoder(tmp_path: Path) -> None:
    """One file may be for two components."""
    import diffusers

    without = {"text_encoder_2": None, "tokenizer": None, "tokenizer_2": None, "vae": None}
    pipe = diffusers.FluxPipeline.from_pretrained(saved("flux"), dtype=torch.bfloat16, **without)
    parts = ("transformer", "text_encoder")
    state = {k: v for part in parts for k, v in prefixed(f"{part}.", pairs(linears(getattr(pipe, part)))).items()}
    file = write(tmp_path / "lora.safetensors", state)
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=list(parts), lora_scale=0.5)
    pipe.unload_lora_weights()
    source = copied(saved("flux"), tmp_path / "fused")
    for part in parts:
        getattr(pipe, part).save_pretrained(source / part)
    convert(source, tmp_path / "theirs")
    convert(saved("flux"), tmp_path / "ours", merge_lora=[(file, 0.5)])
    for part in parts:
        same_weights(tmp_path / "ours", tmp_path / "theirs", part)


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the tiny Z-Image."""
    folder = tmp_path_factory.mktemp("style")
    return write(folder / "style.safetensors", prefixed("transformer.", pairs(shapes("z_image"), 4)))


def test_loading_gives_the_same(tmp_path: Path, style: Path) -> None:
    convert(saved("z_image"), tmp_path / "out", merge_lora=[f"{style}:0.5"])
    converted = load_component(tmp_path / "out", "transformer", device="cpu").state_dict()
    config = {"merge_lora": [f"{style}:0.5"]}
    loaded = load_component(saved("z_image"), "transformer", device="cpu", quantization_config=config).state_dict()
    assert loaded.keys() == converted.keys()
    for key, value in loaded.items():
        assert torch.equal(value, converted[key]), key
    with pytest.raises(ConvertError, match="is converted already, and a LoRA is merged before that"):
        load_component(tmp_path / "out", "transformer", device="cpu", quantization_config=config)


def test_a_component_that_is_given_takes_none(style: Path) -> None:
    config = {"merge_lora": [style]}
    with pytest.raises(ValueError, match="merge_lora is for transformer, and transformer is given, so that nothing is"):
        load_pipeline(saved("z_image"), device="cpu", quantization_config=config, transformer=None)


def test_shards_that_stream_by(tmp_path: Path, style: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a Hub, where members of a group in shards to come are measured by range."""
    source = saved("z_image", max_shard_size="300KB")
    convert(source, tmp_path / "local", merge_lora=[style])
    with running_hub(monkeypatch, tmp_path / "home") as hub:
        hub.add_repo("some/z-image", source)
        convert("some/z-image", tmp_path / "streamed", manifest="z-image", stream=True, merge_lora=[style])
    same_weights(tmp_path / "streamed", tmp_path / "local", "transformer")


def test_the_command_line(tmp_path: Path, style: Path) -> None:
    source, out = str(saved("z_image")), str(tmp_path / "out")

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, arguments, catch_exceptions=False)

    assert run(source, "-o", out, "--merge-lora", f"{style}:0.5").exit_code == 0
    assert run(source, "-o", out, "--merge-lora", f"{style}:0.5").output.count("already done") == 1
    again = run(source, "-o", out, "--merge-lora", str(style))
    assert again.exit_code == 1
    assert "it was made with the LoRA" in again.output
    assert "at scale 0.5, and now it is the LoRA" in again.output
    digest = inspect(out).merged_loras[0].sha256
    assert f"merged: the LoRA {digest[:12]} at scale 0.5" in run("inspect", out).output
    record = (tmp_path / "out/fp8_convert.json").read_text()
    assert digest in record
    assert str(style.parent) not in record
    assert style.name not in record


def test_verify_needs_the_files(tmp_path: Path, style: Path) -> None:
    convert(saved("z_image"), tmp_path / "out", merge_lora=[f"{style}:0.5"])
    assert verify(tmp_path / "out").ok
    assert verify(tmp_path / "out", source=saved("z_image"), merge_lora=[f"{style}:0.5"]).ok
    with pytest.raises(ConvertError, match=r"was made with the LoRA \w{12} at scale 0.5; pass each with --merge-lora"):
        verify(tmp_path / "out", source=saved("z_image"))
    with pytest.raises(ConvertError, match=r"--merge-lora gives the LoRA \w{12} at scale 1; pass what it was made"):
        verify(tmp_path / "out", source=saved("z_image"), merge_lora=[style])
    convert(saved("z_image"), tmp_path / "plain")
    with pytest.raises(ConvertError, match="was made without a LoRA, and --merge-lora gives"):
        verify(tmp_path / "plain", source=saved("z_image"), merge_lora=[style])


def test_an_unfinished_conversion_of_another_lora_is_not_resumed(tmp_path: Path, style: Path) -> None:
    """The recipe's digest has the LoRA in it, and the journal the recipe's."""
    from fp8_convert.converter.output.run import conversion_key

    other = tmp_path / "other.safetensors"
    shutil.copy(style, other)
    same = [conversion_key(plan_conversion(saved("z_image"), merge_lora=[path])) for path in (style, other)]
    assert same[0] == same[1]  # a name is no part of it
    assert conversion_key(plan_conversion(saved("z_image"), merge_lora=[(style, 0.5)])) != same[0]
    assert conversion_key(plan_conversion(saved("z_image"))) != same[0]


@pytest.mark.parametrize("module", ["layers.0.attention.to_q", "cap_embedder.1"], ids=["fp8", "kept"])
def test_an_overflow(tmp_path: Path, module: str) -> None:
    """A sum past the largest FP16 number is refused, in weights that are kept too."""
    state = prefixed("transformer.", pairs({module: shapes("z_image")[module]}))
    file = write(tmp_path / "lora.safetensors", state)
    message = rf"{module}.weight in .* holds NaN or Inf once its LoRA is merged; check the weight, or give"
    with pytest.raises(ConvertError, match=message):
        convert(saved("z_image", dtype=torch.float16), tmp_path / "out", merge_lora=[(file, 1e9)])


def test_a_component_that_is_copied(style: Path) -> None:
    with pytest.raises(ConvertError, match=r"style.safetensors changes transformer, which is copied and not converted"):
        plan_conversion(saved("z_image"), components=["text_encoder"], merge_lora=[style])


def test_a_text_encoder(tmp_path: Path) -> None:
    """Keys of a text encoder go into the text encoder, whose weights have these names in its files."""
    (shard,) = (saved("z_image") / "text_encoder").glob("*.safetensors")
    weights = load_file(shard)
    key = next(k for k in weights if k.endswith("q_proj.weight"))
    state = pairs({key.removesuffix(".weight"): tuple(weights[key].shape)})  # type: ignore[dict-item]
    file = write(tmp_path / "te.safetensors", prefixed("text_encoder.", state))
    plan = plan_conversion(saved("z_image"), merge_lora=[file])
    assert [t.info.name for c in plan.components for t in c.tensors if t.merges] == [key]
    assert plan.notes[0].endswith("into 1 weight of text_encoder")


def test_a_component_on_its_own(tmp_path: Path, style: Path) -> None:
    convert(saved("z_image"), tmp_path / "whole", merge_lora=[style])
    convert(saved("z_image") / "transformer", tmp_path / "alone", merge_lora=[style])
    for path in (tmp_path / "alone").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "whole/transformer" / path.name).read_bytes()
    with pytest.raises(ConvertError, match=r"is a component on its own, so the LoRA style.safetensors needs no name"):
        plan_conversion(saved("z_image") / "transformer", merge_lora=[f"transformer={style}"])


def test_the_helper_fuses(tmp_path: Path, style: Path) -> None:
    """What is compared with is another weight than the source's."""
    source = loras.fused(saved("z_image"), tmp_path / "fused", "z_image", [(style, 1.0)])
    (ours,), (theirs,) = (list((f / "transformer").glob("*.safetensors")) for f in (source, saved("z_image")))
    before, after = load_file(theirs), load_file(ours)
    assert sum(not torch.equal(before[k], after[k]) for k in before) == len(shapes("z_image"))
