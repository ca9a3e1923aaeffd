"""Write the snapshot of this version's record format: run `python tests/released/make.py` when the format is new.

Each `format-N` was written once, by the version that had it, and stays as it is: a test loads and verifies them all.
The source is a FluxPipeline without what has no weights, a DiT and a text encoder of the real classes.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from fp8_convert.converter import convert
from fp8_convert.converter.format.layout import RECORD_FORMAT

HERE = Path(__file__).parent


def save_source(folder: Path) -> None:
    """Save a random pipeline of some 20,000 parameters in BF16."""
    torch.manual_seed(0)
    dit = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    encoder = CLIPTextConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    dit.to(torch.bfloat16).save_pretrained(folder / "transformer")
    CLIPTextModel(encoder).to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    index = {
        "_class_name": "FluxPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as source:
        save_source(Path(source))
        convert(source, HERE / f"format-{RECORD_FORMAT}", manifest=str(HERE / "tiny.toml"), device="cpu")
