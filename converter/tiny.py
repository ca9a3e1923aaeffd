"""Tiny random models of the real classes, small enough to convert and run in seconds on any machine."""

from __future__ import annotations

from typing import Any

import torch

HIDDEN = 128  # of the text encoder


def tiny_pipeline(dtype: torch.dtype) -> Any:
    """A random ZImagePipeline of 5 M parameters in `dtype`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False),
        vae=image_vae(scaling_factor=0.3611, shift_factor=0.1159).to(dtype).eval(),
        text_encoder=_text_encoder().to(dtype).eval(),
        tokenizer=byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], template),
        transformer=_transformer().to(dtype).eval(),
    )


def byte_tokenizer(specials: list[str], chat_template: str) -> Any:
    """Byte-level BPE without merges: 256 byte tokens, then the specials."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer(
        vocab={character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=specials,
        chat_template=chat_template,
    )


def _text_encoder() -> Any:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=264,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return Qwen3Model(config)


def _transformer() -> Any:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=256,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=HIDDEN,
        axes_dims=[32, 48, 48],
        axes_lens=[1024, 64, 64],
    )
    torch.nn.init.normal_(model.x_pad_token, std=0.02)
    torch.nn.init.normal_(model.cap_pad_token, std=0.02)
    return model


def image_vae(**options: Any) -> Any:
    """An AutoencoderKL as Z-Image and Flux have it, with tiny dimensions except for what `options` says."""
    from diffusers import AutoencoderKL

    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 16, 32, 32),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 8,
        "sample_size": 64,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return AutoencoderKL(**settings | options)
