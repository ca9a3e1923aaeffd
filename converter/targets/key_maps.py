"""The key maps of the shipped models, by the class of the component.

Each table is checked from its other side: diffusers' own single-file converters turn the original names that it gives
back into the class's, and the names are those that ComfyUI's models have (`tests/converter/targets/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..telling.errors import ConvertError
from .key_map import KeyMap, Rule

_DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_TEXT_PREFIXES = ("text_encoders.qwen25_7b.transformer.", "text_encoders.qwen3_4b.transformer.")
_VAE_PREFIXES = ("vae.", "first_stage_model.")


def key_map(class_name: str | None, config: Mapping[str, Any]) -> KeyMap | None:
    """The map of a component's class, None for a class that has none. config: its config.json.

    Raises ConvertError for a config whose values cannot be those of the class; one that counts otherwise than the
    tensors shows when names are mapped.
    """
    build = _BUILDERS.get(class_name or "")
    try:
        return None if build is None else build(config)
    except (TypeError, ValueError) as error:
        raise ConvertError(
            f"The config of {class_name} cannot be read ({error}), so its names in ComfyUI are not known; correct it."
        ) from error


def mapped_classes() -> tuple[str, ...]:
    """The classes that have a key map."""
    return tuple(_BUILDERS)


def _same(names: Iterable[str]) -> tuple[Rule, ...]:
    return tuple(Rule(name, name) for name in names)


def _renames(parent: str, original: str, names: Mapping[str, str]) -> Iterator[Rule]:
    """Rules for modules of one parent."""
    return (Rule(f"{parent}.{native}", f"{original}.{first}") for native, first in names.items())


# DiTs


def _qwen_image(config: Mapping[str, Any]) -> KeyMap:
    """Qwen-Image and its variants were published with diffusers' names."""
    names = ("img_in", "txt_in", "txt_norm", "time_text_embed", "transformer_blocks", "norm_out", "proj_out")
    return KeyMap("QwenImageTransformer2DModel", _same(names), _DIT_PREFIXES, dropped=("__index_timestep_zero__",))


def _z_image(config: Mapping[str, Any]) -> KeyMap:
    """Patches of 2x2 pixels and one frame; q, k and v are one matrix in the original."""
    rules = [Rule("all_x_embedder.2-1", "x_embedder"), Rule("all_final_layer.2-1", "final_layer")]
    rules += _same(("cap_embedder", "t_embedder", "cap_pad_token", "x_pad_token"))
    for stack in ("layers.{}", "noise_refiner.{}", "context_refiner.{}"):
        attention = f"{stack}.attention"
        rules.append(Rule(tuple(f"{attention}.to_{x}" for x in "qkv"), f"{attention}.qkv"))
        rules += _renames(attention, attention, {"norm_q": "q_norm", "norm_k": "k_norm", "to_out.0": "out"})
        names = ("feed_forward", "adaLN_modulation", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
        rules += _same(f"{stack}.{name}" for name in names)
    return KeyMap("ZImageTransformer2DModel", tuple(rules), _DIT_PREFIXES, dropped=("norm_final.weight",))


_WAN_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
_WAN_IMAGE_ATTENTION = {"add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img"}
_WAN_EMBEDDERS = {
    "time_embedder.linear_1": "time_embedding.0",
    "time_embedder.linear_2": "time_embedding.2",
    "time_proj": "time_projection.1",
    "text_embedder.linear_1": "text_embedding.0",
    "text_embedder.linear_2": "text_embedding.2",
    "image_embedder.norm1": "img_emb.proj.0",
    "image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "image_embedder.ff.net.2": "img_emb.proj.3",
    "image_embedder.norm2": "img_emb.proj.4",
    "image_embedder.pos_embed": "img_emb.emb_pos",
}


def _wan(config: Mapping[str, Any]) -> KeyMap:
    """Wan 2.1 and 2.2: text to video, image to video and both. The second and third norm change places."""
    rules = [Rule("patch_embedding", "patch_embedding"), Rule("scale_shift_table", "head.modulation")]
    rules += [Rule("proj_out", "head.head"), Rule("blocks.{}.scale_shift_table", "blocks.{}.modulation")]
    rules += [Rule(f"condition_embedder.{native}", original) for native, original in _WAN_EMBEDDERS.items()]
    rules += _renames("blocks.{}.attn1", "blocks.{}.self_attn", _WAN_ATTENTION)
    rules += _renames("blocks.{}.attn2", "blocks.{}.cross_attn", _WAN_ATTENTION | _WAN_IMAGE_ATTENTION)
    rules += _renames("blocks.{}", "blocks.{}", {"norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"})
    return KeyMap("WanTransformer3DModel", tuple(rules), _DIT_PREFIXES)


# Text encoders: transformers' names, in the spelling of the model with its head


def _qwen_vl(config: Mapping[str, Any]) -> KeyMap:
    newer = (
        Rule("model.language_model", "model"),
        Rule("model.visual", "visual"),
    )
    rules = (*newer, *_same(("model", "visual", "lm_head")))
    return KeyMap("Qwen2_5_VLForConditionalGeneration", rules, _TEXT_PREFIXES)


def _qwen3(config: Mapping[str, Any]) -> KeyMap:
    rules = [Rule(name, f"model.{name}") for name in ("embed_tokens", "layers", "norm")]
    rules += [Rule("model", "model"), Rule("lm_head", "lm_head")]
    return KeyMap("Qwen3Model", tuple(rules), _TEXT_PREFIXES)


def _qwen3_with_head(config: Mapping[str, Any]) -> KeyMap:
    return KeyMap("Qwen3ForCausalLM", _same(("model", "lm_head")), _TEXT_PREFIXES)


def _umt5(config: Mapping[str, Any]) -> KeyMap:
    return KeyMap("UMT5EncoderModel", _same(("shared", "encoder")), dropped=("spiece_model",))


# VAEs

_WAN_RESNET = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def _wan_vae(config: Mapping[str, Any]) -> KeyMap:
    """The VAEs of Wan 2.1 and 2.2 and of Qwen-Image: blocks are counted through, and the list is flat in diffusers'
    encoder and in the original's encoder and decoder; that of Wan 2.2 (`is_residual`) is nested on both sides."""
    resnets, blocks = int(config.get("num_res_blocks", 2)), len(config.get("dim_mult", (1, 2, 4, 4)))
    residual = bool(config.get("is_residual"))
    rules = [Rule("quant_conv", "conv1"), Rule("post_quant_conv", "conv2")]
    for half in ("encoder", "decoder"):
        rules += _renames(half, half, {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"})
        for i in (0, 1):
            rules += _renames(f"{half}.mid_block.resnets.{i}", f"{half}.middle.{2 * i}", _WAN_RESNET)
        rules.append(Rule(f"{half}.mid_block.attentions.0", f"{half}.middle.1"))
    rules += _wan_nested(resnets) if residual else _wan_flat(resnets, blocks)
    name = str(config.get("_class_name", "AutoencoderKLWan"))
    return KeyMap(name, tuple(rules), _VAE_PREFIXES)


def _wan_flat(resnets: int, blocks: int) -> Iterator[Rule]:
    down, first = "encoder.down_blocks.{}", "encoder.downsamples.{}"
    yield from _renames(down, first, {**_WAN_RESNET, "resample": "resample", "time_conv": "time_conv"})
    for block in range(blocks):
        up, number = f"decoder.up_blocks.{block}", block * (resnets + 2)
        for j in range(resnets + 1):
            yield from _renames(f"{up}.resnets.{j}", f"decoder.upsamples.{number + j}", _WAN_RESNET)
        yield Rule(f"{up}.upsamplers.0", f"decoder.upsamples.{number + resnets + 1}")


def _wan_nested(resnets: int) -> Iterator[Rule]:
    for half, count, native, original in (
        ("encoder", resnets, "down", "downsamples"),
        ("decoder", resnets + 1, "up", "upsamples"),
    ):
        block, first = f"{half}.{native}_blocks.{{}}", f"{half}.{original}.{{}}.{original}"
        for j in range(count):
            yield from _renames(f"{block}.resnets.{j}", f"{first}.{j}", _WAN_RESNET)
        yield Rule(f"{block}.{native}sampler", f"{first}.{count}")


_LDM_RESNET = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}


def _autoencoder_kl(config: Mapping[str, Any]) -> KeyMap:
    """The decoder's blocks are counted from the other end, and attention is made of 1x1 convolutions."""
    blocks = len(config.get("block_out_channels", (128, 256, 512, 512)))
    rules = list(_same(("quant_conv", "post_quant_conv")))
    for half in ("encoder", "decoder"):
        rules += _renames(half, half, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
        middle, attention = f"{half}.mid_block", f"{half}.mid_block.attentions.0"
        for i in (0, 1):
            rules += _renames(f"{middle}.resnets.{i}", f"{half}.mid.block_{i + 1}", _LDM_RESNET)
        rules.append(Rule(f"{attention}.group_norm", f"{half}.mid.attn_1.norm"))
        for native, first in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
            rules.append(Rule(f"{attention}.{native}", f"{half}.mid.attn_1.{first}", pointwise=True))
    rules += _renames("encoder.down_blocks.{}.resnets.{}", "encoder.down.{}.block.{}", _LDM_RESNET)
    rules.append(Rule("encoder.down_blocks.{}.downsamplers.0", "encoder.down.{}.downsample"))
    for block in range(blocks):
        native, first = f"decoder.up_blocks.{block}", f"decoder.up.{blocks - 1 - block}"
        rules += _renames(f"{native}.resnets.{{}}", f"{first}.block.{{}}", _LDM_RESNET)
        rules.append(Rule(f"{native}.upsamplers.0", f"{first}.upsample"))
    return KeyMap("AutoencoderKL", tuple(rules), _VAE_PREFIXES)


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], KeyMap]] = {
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "WanTransformer3DModel": _wan,
    "Qwen2_5_VLForConditionalGeneration": _qwen_vl,
    "Qwen3Model": _qwen3,
    "Qwen3ForCausalLM": _qwen3_with_head,
    "UMT5EncoderModel": _umt5,
    "AutoencoderKLQwenImage": _wan_vae,
    "AutoencoderKLWan": _wan_vae,
    "AutoencoderKL": _autoencoder_kl,
}
