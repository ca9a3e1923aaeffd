"""The built-in demo: a tiny random Z-Image pipeline of the real classes, converted, verified, loaded and run."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .cli.render import render_inspection, render_result, render_verification
from .conversion import convert
from .format.layout import RECORD_FILE
from .inspection import inspect
from .output.record import read_record
from .snapshot.building import quiet_libraries
from .telling.errors import ConvertError
from .telling.progress import bars_of_libraries
from .verification import verify

_HIDDEN = 128
# Goes with the pipeline into its output, and so into the record, by which a rerun knows what it may replace.
_README = "A tiny pipeline with random weights, made by `fp8-convert demo`. It paints noise; delete it at will.\n"


def run_demo(output: Path, say: Callable[[str], None]) -> None:
    """Build a tiny pipeline, convert it into `output`, verify, load and run it; its picture is put beside the folder.

    Replaces an earlier demo's output and nothing else. Raises ConvertError.
    """
    picture = output.with_name(f"{output.name}.png")  # not inside: `verify` wants nothing there that is not recorded
    again = _is_a_demos(output)
    if not again and (output / RECORD_FILE).exists():
        raise ConvertError(f"{output} holds an FP8 snapshot that is not the demo's; name another folder with -o.")
    if not again and picture.exists():
        raise ConvertError(f"{picture}, where the demo's picture goes, exists; name another folder with -o.")
    with tempfile.TemporaryDirectory() as folder, bars_of_libraries():
        source = Path(folder, "tiny-z-image")
        say("building a tiny random Z-Image pipeline (11 MB) ...")
        build_tiny_pipeline(source)
        result = convert(source, output, force=again)
        say(render_result(result))
        say("")
        say(render_inspection(inspect(output)))
        say("")
        say(render_verification(verify(output, source=source)).replace(str(source), "the source"))
    # The demo stands above both halves, and nothing else here imports the loader; late, so that it can speak at once.
    from ..loader import load_pipeline, report

    with bars_of_libraries():
        pipeline = load_pipeline(output)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a red cube", height=64, width=64, num_inference_steps=2, guidance_scale=0.0, max_sequence_length=64
    ).images[0]
    image.save(picture)
    say(f"generated {picture} ({image.width}x{image.height}; random weights paint noise)")
    say("")
    say(str(report(pipeline)))


def _is_a_demos(folder: Path) -> bool:
    try:
        record = read_record(folder)
    except ConvertError:
        return False
    digest = hashlib.sha256(_README.encode()).hexdigest()
    return record is not None and record["files"].get("README.md", {}).get("sha256") == digest


def build_tiny_pipeline(folder: Path, seed: int = 0) -> None:
    """Save a random Z-Image pipeline with small dimensions and a byte-level tokenizer, as BF16 safetensors."""
    torch.manual_seed(seed)
    with quiet_libraries():
        tiny_pipeline(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").write_text(_README)


def tiny_pipeline(dtype: torch.dtype) -> Any:
    """A random ZImagePipeline of 5 M parameters in `dtype`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False),
        vae=_vae().to(dtype).eval(),
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
        hidden_size=_HIDDEN,
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
        cap_feat_dim=_HIDDEN,
        axes_dims=[32, 48, 48],
        axes_lens=[1024, 64, 64],
    )
    torch.nn.init.normal_(model.x_pad_token, std=0.02)
    torch.nn.init.normal_(model.cap_pad_token, std=0.02)
    return model


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
