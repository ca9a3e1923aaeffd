"""Write a model that ComfyUI recognises, converted for it: `python sources.py NAME OUT`, in the project's environment.

ComfyUI tells models by their widths, so these are as wide as the published ones and one block deep.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT)]


def z_image() -> torch.nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(n_layers=1)


def wan() -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_attention_heads=2, attention_head_dim=128, ffn_dim=512, num_layers=2)


def qwen_image() -> torch.nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(num_layers=1)


def wan_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan()


def main(name: str, out: Path) -> None:
    from fp8_convert.converter import convert

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = globals()[name]().to(torch.bfloat16)
        if not name.endswith("vae"):
            model.save_pretrained(Path(folder) / "transformer")
            convert(Path(folder) / "transformer", out, target="comfyui")
            return
        # A VAE alone has nothing to convert: it goes beside a DiT.
        wan().to(torch.bfloat16).save_pretrained(Path(folder) / "transformer")
        model.save_pretrained(Path(folder) / "vae")
        classes = {"transformer": "WanTransformer3DModel", "vae": type(model).__name__}
        index = {"_class_name": "WanPipeline"} | {n: ["diffusers", c] for n, c in classes.items()}
        (Path(folder) / "model_index.json").write_text(json.dumps(index))
        convert(folder, out, target="comfyui")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
