"""Make one snapshot with the project's own environment: `python making.py OUT SOURCE KEYWORDS`.

Readers cannot share an environment with the converter, so their tests run this file with the project's interpreter.
SOURCE is a name of tests/pipelines.py, or of SOURCES here; KEYWORDS are JSON for convert(), or `null` for the source as
it is.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main(out: Path, name: str, keywords: dict[str, Any] | None) -> None:
    from pipelines import saved

    from fp8_convert.converter import convert

    source = SOURCES[name]() if name in SOURCES else saved(name)
    if keywords is not None and keywords.get("activation_scheme") == "static":
        keywords["input_scales"] = _input_scales(source, keywords)
    if keywords is None:
        shutil.copytree(source, out)
    else:
        convert(source, out, **keywords)


def z_image_as_published() -> Path:
    """Its text encoder is a Qwen3ForCausalLM, so its keys begin with `model.`; the head is tied and in no file."""
    import torch
    from pipelines import copied, saved
    from transformers import Qwen3ForCausalLM, Qwen3Model

    folder = copied(saved("z_image"), Path(tempfile.mkdtemp(prefix="fp8-convert-readers-")) / "z_image")
    inner = Qwen3Model.from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    model = Qwen3ForCausalLM(inner.config).to(torch.bfloat16)
    model.model.load_state_dict(inner.state_dict())
    model.tie_weights()
    shutil.rmtree(folder / "text_encoder")
    model.save_pretrained(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "Qwen3ForCausalLM"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def wan22_as_published() -> Path:
    """Its DiTs are FP32."""
    from pipelines import saved

    return saved("wan22", fp32_dits=True)


def wan22_ti2v() -> Path:
    """Wan2.2-TI2V-5B has one DiT and takes an image, or none, in its place in the timesteps."""
    from pipelines import copied, saved

    folder = copied(saved("wan22"), Path(tempfile.mkdtemp(prefix="fp8-convert-readers-")) / "wan22_ti2v")
    shutil.rmtree(folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": True}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def wan22_i2v() -> Path:
    """Wan2.2-I2V-A14B: the DiTs see the latents of an image beside the noise, so their patches have 36 channels."""
    import torch
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from pipelines import BF16, wan22

    pipeline = wan22()
    sizes = {**pipeline.transformer.config, "in_channels": 36}
    torch.manual_seed(0)
    dits = {name: WanTransformer3DModel.from_config(sizes).to(BF16) for name in ("transformer", "transformer_2")}
    parts = {**pipeline.components, **dits, "image_encoder": None, "image_processor": None}
    folder = Path(tempfile.mkdtemp(prefix="fp8-convert-readers-")) / "wan22_i2v"
    WanImageToVideoPipeline(**parts, boundary_ratio=0.9).save_pretrained(folder)
    return folder


def _input_scales(source: Path, keywords: dict[str, Any]) -> Path:
    """Calibrated scales for every W8A8 module, from its name; a fusion group takes the largest of its members'."""
    import torch
    from safetensors.torch import save_file

    from fp8_convert.converter import plan_conversion

    plan = plan_conversion(source, **{**keywords, "activation_scheme": "dynamic"})
    modules = [t.module for shard in plan.shards for t in shard.tensors if t.decision.mode == "w8a8"]
    file = Path(tempfile.mkdtemp(prefix="fp8-convert-readers-")) / "input_scales.safetensors"
    save_file({f"{module}.input_scale": torch.tensor(0.01 + len(module) / 1000) for module in modules}, file)
    return file


SOURCES: dict[str, Callable[[], Path]] = {
    "z_image_as_published": z_image_as_published,
    "wan22_as_published": wan22_as_published,
    "wan22_ti2v": wan22_ti2v,
    "wan22_i2v": wan22_i2v,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
