"""Sources for measuring the converter: a lone `transformer` component with random weights, the same bytes every time.

    python benchmarks/convert_source.py KIND FOLDER [GIGABYTES]

Kinds: bf16, fp16, fp32 (Qwen-Image's DiT, as many layers as fit); wan-fp32 (one block of Wan2.2, whose feed-forward
weights and q, k, v outgrow the converter's window and are read twice); huge-bf16 (the same with 1.1 GB in one tensor).
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import torch

WAN = {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 1}
KINDS = {
    "bf16": ("QwenImageTransformer2DModel", torch.bfloat16, {}),
    "fp16": ("QwenImageTransformer2DModel", torch.float16, {}),
    "fp32": ("QwenImageTransformer2DModel", torch.float32, {}),
    "wan-fp32": ("WanTransformer3DModel", torch.float32, {**WAN, "ffn_dim": 13_824}),
    "huge-bf16": ("WanTransformer3DModel", torch.bfloat16, {**WAN, "ffn_dim": 107_520}),
}
SHARD = "500MB"


def make_source(kind: str, folder: Path, gigabytes: float = 2.0) -> Path:
    """Write the component under `folder`, unless it is there; returns its path."""
    class_name, dtype, config = KINDS[kind]
    cls = getattr(diffusers, class_name)
    if not config:
        config = {"num_layers": max(1, round((gigabytes * 1e9 - _bytes(cls, dtype, 0)) / _layer_bytes(cls, dtype)))}
    path = folder / f"{kind}-{config['num_layers']}" / "transformer"
    if (path / "config.json").exists():
        return path
    with torch.device("meta"):
        model = cls(**config)
    model = torch.nn.Module.to(model, dtype).to_empty(device="cpu").requires_grad_(False)
    pieces = [piece for parameter in model.parameters() for piece in parameter.view(-1).split(2**20)]
    with ThreadPoolExecutor() as pool:  # one thread draws some 100 MB a second
        list(pool.map(_fill, pieces, range(len(pieces))))
    unfinished = path.with_name("unfinished")
    model.save_pretrained(unfinished, max_shard_size=SHARD)
    unfinished.rename(path)
    return path


def _fill(piece: torch.Tensor, seed: int) -> None:
    piece.copy_(torch.randn(piece.shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02))


def _bytes(cls: type, dtype: torch.dtype, layers: int) -> int:
    with torch.device("meta"):
        model = cls(num_layers=layers)
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def _layer_bytes(cls: type, dtype: torch.dtype) -> int:
    return _bytes(cls, dtype, 1) - _bytes(cls, dtype, 0)


if __name__ == "__main__":
    print(make_source(sys.argv[1], Path(sys.argv[2]), *(float(a) for a in sys.argv[3:])))
