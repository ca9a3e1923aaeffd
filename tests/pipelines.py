"""Tiny random pipelines of the real classes, saved as diffusers snapshots: the sources of the whole suite.

`saved(NAME, …)` builds a snapshot once per process and returns its folder, which tests only read; `copied` gives one
to change. Each takes a second or two to build and about 10 MB. The dimensions are chosen so that every rule has
something to decide: key and value projections of the text encoders are no multiple of 128, fusion groups are whole.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fp8_convert.converter.snapshot.building import quiet_libraries
from fp8_convert.converter.tiny import HIDDEN, byte_tokenizer, image_vae, tiny_pipeline

BF16 = torch.bfloat16

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip


def saved(
    name: str,
    *,
    dtype: torch.dtype = BF16,
    fp32_dits: bool = False,
    max_shard_size: str | None = None,
    variant: str | None = None,
) -> Path:
    """The folder of the snapshot NAME, one of BUILDERS. Not to be changed: other tests read it too.

    dtype: of the weights. fp32_dits: both of wan22's DiTs in FP32, as
    Wan2.2 is published. max_shard_size: as in save_pretrained, such as "300KB". variant: names the weight files.
    """
    return _saved(name, dtype, fp32_dits, max_shard_size, variant)


def copied(source: Path, folder: Path) -> Path:
    """A copy of a snapshot that the test may change."""
    shutil.copytree(source, folder)
    return folder


@functools.cache
def _saved(name: str, dtype: torch.dtype, fp32_dits: bool, max_shard_size: str | None, variant: str | None) -> Path:
    folder = _root() / "-".join([name, str(dtype).removeprefix("torch."), *filter(None, [max_shard_size, variant])])
    folder = folder.with_name(folder.name + "-fp32-dits") if fp32_dits else folder
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = wan22(dtype, fp32_dits=True) if fp32_dits else BUILDERS[name](dtype)
        options = {"max_shard_size": max_shard_size} if max_shard_size else {}
        pipeline.save_pretrained(folder, variant=variant, **options)
    if name in _WITH_PROCESSOR:
        _add_processor(folder)
    return folder


@functools.cache
def _root() -> Path:
    root = tempfile.mkdtemp(prefix="fp8-convert-sources-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return Path(root)


def z_image(dtype: torch.dtype = BF16) -> Any:
    """The ZImagePipeline of `fp8-convert demo`."""
    return tiny_pipeline(dtype)


def qwen_image(dtype: torch.dtype = BF16) -> Any:
    """QwenImagePipeline; its text encoder's checkpoint names are those that transformers writes today."""
    from diffusers import QwenImagePipeline

    return QwenImagePipeline(**_qwen_components(dtype))


def qwen_image_edit(dtype: torch.dtype = BF16) -> Any:
    """The components of QwenImageEditPipeline; its processor is added as files, for the class needs torchvision."""
    from diffusers import QwenImageEditPipeline

    return QwenImageEditPipeline(**_qwen_components(dtype), processor=None)


def qwen_image_edit_plus(dtype: torch.dtype = BF16) -> Any:
    """The components of QwenImageEditPlusPipeline (Qwen-Image-Edit-2509 and later)."""
    from diffusers import QwenImageEditPlusPipeline

    return QwenImageEditPlusPipeline(**_qwen_components(dtype, {"zero_cond_t": True}), processor=None)


def qwen_image_layered(dtype: torch.dtype = BF16) -> Any:
    """The components of QwenImageLayeredPipeline: a VAE with an alpha channel, a DiT that knows layers."""
    from diffusers import QwenImageLayeredPipeline

    dit = {"zero_cond_t": True, "use_additional_t_cond": True, "use_layer3d_rope": True}
    return QwenImageLayeredPipeline(**_qwen_components(dtype, dit, {"input_channels": 4}), processor=None)


def wan22(dtype: torch.dtype = BF16, *, fp32_dits: bool = False) -> Any:
    """WanPipeline with two DiTs. As loaded in BF16, its _keep_in_fp32_modules stay FP32."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    encoder = UMT5Config(
        vocab_size=256,
        d_model=HIDDEN,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    vae = AutoencoderKLWan(base_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=UMT5EncoderModel(encoder).to(dtype).eval(),
        vae=vae.to(dtype).eval(),
        scheduler=scheduler,
        transformer=_wan_dit(torch.float32 if fp32_dits else dtype),
        transformer_2=_wan_dit(torch.float32 if fp32_dits else dtype),
        boundary_ratio=0.875,
    )


def flux(dtype: torch.dtype = BF16) -> Any:
    """FluxPipeline: one DiT, CLIP and T5 encoders, an image VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=HIDDEN,
        bos_token_id=0,
        eos_token_id=1,
    )
    t5 = T5Config(
        vocab_size=128, d_model=HIDDEN, d_kv=32, d_ff=256, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    dit = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae().to(dtype).eval(),
        text_encoder=CLIPTextModel(clip).to(dtype).eval(),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=T5EncoderModel(t5).to(dtype).eval(),
        tokenizer_2=_t5_tokenizer(),
        transformer=dit.to(dtype).eval(),
    )


BUILDERS: dict[str, Callable[[torch.dtype], Any]] = {
    "z_image": z_image,
    "qwen_image": qwen_image,
    "qwen_image_edit": qwen_image_edit,
    "qwen_image_edit_plus": qwen_image_edit_plus,
    "qwen_image_layered": qwen_image_layered,
    "wan22": wan22,
    "flux": flux,
}
_WITH_PROCESSOR = ("qwen_image_edit", "qwen_image_edit_plus", "qwen_image_layered")


def _qwen_components(
    dtype: torch.dtype, dit: dict[str, Any] | None = None, vae: dict[str, Any] | None = None
) -> dict[str, Any]:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    tokenizer = byte_tokenizer(_SPECIALS, _CHAT_TEMPLATE)
    transformer = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=128, num_attention_heads=2, joint_attention_dim=HIDDEN, **dit or {}
    )
    autoencoder = AutoencoderKLQwenImage(base_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **vae or {})
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
    return {
        "scheduler": scheduler,
        "vae": autoencoder.to(dtype).eval(),
        "text_encoder": _qwen_vl(tokenizer).to(dtype).eval(),
        "tokenizer": tokenizer,
        "transformer": transformer.to(dtype).eval(),
    }


def _qwen_vl(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    text = {
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": HIDDEN,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _wan_dit(dtype: torch.dtype) -> Any:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=HIDDEN, ffn_dim=512, num_layers=2
    )
    for name, parameter in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def _t5_tokenizer() -> Any:
    """Unigrams over printable ASCII, with <pad> 0, </s> 1 and <unk> 2."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=pieces + [(chr(c), -3.0) for c in range(33, 127)], extra_ids=0)


def _clip_tokenizer() -> Any:
    """Lower-case letters, each also as the end of a word."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def _add_processor(folder: Path) -> None:
    """Write what Qwen2VLProcessor.save_pretrained would, and name it in model_index.json."""
    shutil.copytree(folder / "tokenizer", folder / "processor")
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
    (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(settings))
    index = folder / "model_index.json"
    entries = json.loads(index.read_text())
    entries["processor"] = ["transformers", "Qwen2VLProcessor"]
    index.write_text(json.dumps(entries, indent=2))
