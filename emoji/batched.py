"""The forward passes of the text encoder and the transformer over whole batches, with the classes' own parameters.

`ZImageTransformer2DModel` takes lists of single pictures and rotates with complex numbers, which is slow to train. Here
all captions are padded to 32 tokens, so a batch is one tensor; `train.py` checks that the class gives the same output.
"""

from typing import Any

import torch
from models import TOKENS
from torch import Tensor
from torch.nn import functional

GRID = 8  # patches a side


def text_features(encoder: Any, ids: Tensor) -> Tensor:
    """ids [B, 32] -> [B, 32, 256], the last hidden state but one. Causal: what pads hold reaches no real token."""
    hidden = encoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = encoder.rotary_emb(hidden, positions)
    for layer in encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return hidden


def patches(latents: Tensor) -> Tensor:
    """[B, 16, 16, 16] -> [B, 64, 64], a patch in the class's order: rows, columns, channels."""
    batch, channels = latents.shape[:2]
    split = latents.view(batch, channels, GRID, 2, GRID, 2).permute(0, 2, 4, 3, 5, 1)
    return split.reshape(batch, GRID * GRID, 4 * channels)


def unpatched(tokens: Tensor) -> Tensor:
    """The inverse of `patches`."""
    batch, channels = tokens.shape[0], tokens.shape[2] // 4
    split = tokens.view(batch, GRID, GRID, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return split.reshape(batch, channels, 2 * GRID, 2 * GRID)


def rotations(model: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Complex rotations of the 64 patches and of the 32 caption tokens, at the class's positions."""
    image = model.create_coordinate_grid((1, GRID, GRID), (TOKENS + 1, 0, 0), device).flatten(0, 2)
    caption = model.create_coordinate_grid((TOKENS, 1, 1), (1, 0, 0), device).flatten(0, 2)
    return model.rope_embedder(image), model.rope_embedder(caption)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, heads, D] times complex rotations [T, D/2], whose real and imaginary parts are given."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def attend(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    projected = (attention.to_q(x), attention.to_k(x), attention.to_v(x))
    query, key, value = (each.unflatten(-1, (attention.heads, -1)) for each in projected)
    query = rotate(attention.norm_q(query), cos, sin).to(value.dtype)
    key = rotate(attention.norm_k(key), cos, sin).to(value.dtype)
    mixed = functional.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return attention.to_out[0](mixed.transpose(1, 2).flatten(2))


def block(module: Any, x: Tensor, cos: Tensor, sin: Tensor, condition: Tensor | None) -> Tensor:
    """One ZImageTransformerBlock; condition [B, 192] is None for the context refiner, which has no modulation."""
    if condition is None:
        x = x + module.attention_norm2(attend(module.attention, module.attention_norm1(x), cos, sin))
        return x + module.ffn_norm2(module.feed_forward(module.ffn_norm1(x)))
    parts = module.adaLN_modulation(condition)[:, None].chunk(4, dim=2)
    scale_attention, gate_attention, scale_ffn, gate_ffn = parts
    attended = attend(module.attention, module.attention_norm1(x) * (1 + scale_attention), cos, sin)
    x = x + gate_attention.tanh() * module.attention_norm2(attended)
    fed = module.feed_forward(module.ffn_norm1(x) * (1 + scale_ffn))
    return x + gate_ffn.tanh() * module.ffn_norm2(fed)


class Batched:
    """latents [B, 16, 16, 16], time [B], features [B, 32, 256], real [B, 32] (is a token no pad?) -> like latents."""

    def __init__(self, model: Any, device: torch.device, run_block: Any = block):
        self.model, self.run_block = model, run_block
        image, caption = rotations(model, device)
        self.image = (image.real.contiguous(), image.imag.contiguous())
        self.caption = (caption.real.contiguous(), caption.imag.contiguous())
        whole = torch.cat([image, caption])
        self.whole = (whole.real.contiguous(), whole.imag.contiguous())

    def __call__(self, latents: Tensor, time: Tensor, features: Tensor, real: Tensor) -> Tensor:
        model = self.model
        condition = model.t_embedder(time * model.t_scale)
        x = model.all_x_embedder["2-1"](patches(latents))
        for layer in model.noise_refiner:
            x = self.run_block(layer, x, *self.image, condition)
        caption = model.cap_embedder(features)
        caption = torch.where(real[..., None], caption, model.cap_pad_token.to(caption.dtype))
        for layer in model.context_refiner:
            caption = self.run_block(layer, caption, *self.caption, None)
        x = torch.cat([x, caption.to(x.dtype)], dim=1)
        for layer in model.layers:
            x = self.run_block(layer, x, *self.whole, condition)
        x = model.all_final_layer["2-1"](x, c=condition)
        return unpatched(x[:, : GRID * GRID])
