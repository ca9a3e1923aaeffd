"""The real classes of Z-Image at the size of the emoji model: 64 x 64 pictures, 16 x 16 latents of 16 channels."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

TEXT = 256  # width of the text encoder: whole blocks of 128, so that all its linears can become FP8
VOCABULARY = 2048
TOKENS = 32  # to which captions are padded, as the transformer does itself
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def tokenizer(captions: Iterable[str]) -> Any:
    """Byte-level BPE learnt from the captions, so that most words are one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[AddedToken(name, special=True) for name in SPECIALS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIALS,
        chat_template=TEMPLATE,
        padding_side="right",
        model_max_length=512,
    )


def text_encoder() -> Qwen3Model:
    """Three layers, the last of which is never used: the pipeline reads the last hidden state but one."""
    return Qwen3Model(
        Qwen3Config(
            hidden_size=TEXT,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )


def transformer() -> ZImageTransformer2DModel:
    """192 wide (FFN 512, both multiples of 16, as FP8 products want), 12 blocks and one refiner of each kind."""
    model = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=192,
        n_layers=12,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        qk_norm=True,
        cap_feat_dim=TEXT,
        axes_dims=[16, 24, 24],
        axes_lens=[512, 64, 64],
    )
    torch.nn.init.normal_(model.x_pad_token, std=0.02)
    torch.nn.init.normal_(model.cap_pad_token, std=0.02)
    return model


def vae(**latents: float) -> AutoencoderKL:
    """Three levels, so 4 pixels to a latent. latents: scaling_factor and shift_factor, known after training."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 72),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **latents,
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False)
