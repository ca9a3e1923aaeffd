"""How each tiny pipeline of `pipelines` is run, and snapshots converted once for the whole suite."""

import functools
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pipelines
import torch
from PIL import Image
from torch import Tensor, nn

from fp8_convert.converter import convert
from fp8_convert.loader import load_pipeline
from fp8_convert.loader.weights import Fp8Weight

# torchvision, which the processors of these pipelines need, has no CPU build for every torch.
WITHOUT_PROCESSOR = ("qwen_image_edit", "qwen_image_layered")


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fp8-convert-loaded-")


def root() -> Path:
    """A folder for what tests share."""
    return Path(_root().name)


@functools.cache
def converted(name: str, **options: Any) -> Path:
    """The pipeline NAME of `pipelines`, converted; `options` are those of `convert`. Not to be changed."""
    folder = root() / "-".join([name, *(f"{k}-{Path(str(v)).name}" for k, v in sorted(options.items()))])
    convert(pipelines.saved(name), folder, device="cpu", **options)
    return folder


def replaced(name: str) -> dict[str, Any]:
    """Components that stand in for those which the test machine may not be able to load."""
    return {"processor": None} if name in WITHOUT_PROCESSOR else {}


def bf16(name: str) -> Any:
    """The pipeline NAME as diffusers loads it, in BF16."""
    import diffusers

    source = pipelines.saved(name)
    if name not in WITHOUT_PROCESSOR:
        return quiet(diffusers.DiffusionPipeline.from_pretrained(source, dtype=torch.bfloat16))
    cls = {
        "qwen_image_edit": diffusers.QwenImageEditPipeline,
        "qwen_image_layered": diffusers.QwenImageLayeredPipeline,
    }
    return quiet(cls[name].from_pretrained(source, processor=None, dtype=torch.bfloat16))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, name: str, steps: int = 2, seed: int = 0, **options: Any) -> Tensor:
    """What the pipeline makes of a fixed prompt or fixed embeddings: pixels, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    common = {"num_inference_steps": steps, "generator": generator, "output_type": "pt", **options}
    if name == "wan22":
        frames = pipe(
            prompt="a red cube", negative_prompt="bad", height=64, width=64, num_frames=5, guidance_scale=4.0,
            guidance_scale_2=3.0, max_sequence_length=32, **common,
        ).frames  # fmt: skip
        return torch.as_tensor(frames).cpu()
    if name in WITHOUT_PROCESSOR:
        embeddings = torch.randn(1, 12, pipelines.HIDDEN, generator=torch.Generator().manual_seed(1))
        embedded = {
            "prompt_embeds": embeddings.to(pipe.device, torch.bfloat16),
            "prompt_embeds_mask": torch.ones(1, 12, dtype=torch.int64, device=pipe.device),
        }
        # These pipelines scale any image to a megapixel, which takes minutes here.
        size = (64, 64) if name == "qwen_image_layered" else (64, 64, None)
        small = mock.patch.object(sys.modules[type(pipe).__module__], "calculate_dimensions", return_value=size)
        if name == "qwen_image_layered":
            image = Image.new("RGBA", (64, 64), (200, 30, 30, 255))
            with small:
                images = pipe(image=image, prompt="a", layers=1, true_cfg_scale=1.0, **embedded, **common).images
            return torch.stack([torch.as_tensor(i) for i in images]).cpu()
        image = Image.new("RGB", (64, 64), (200, 30, 30))
        with small:
            images = pipe(image=image, height=64, width=64, true_cfg_scale=1.0, **embedded, **common).images
        return torch.as_tensor(images).cpu()
    if name == "qwen_image":
        common |= {"negative_prompt": " ", "true_cfg_scale": 4.0}
    if name == "z_image":
        common |= {"guidance_scale": 0.0, "max_sequence_length": 32}
    if name == "flux":  # its tiny tokenizer knows no maximal length
        embeddings = torch.randn(2, 8, pipelines.HIDDEN, generator=torch.Generator().manual_seed(1))
        embeddings = embeddings.to(pipe.device, torch.bfloat16)
        embedded = {"prompt_embeds": embeddings[:1], "pooled_prompt_embeds": embeddings[1:, 0]}
        # Nor has its VAE a shift factor, so the latents are decoded here.
        latents = pipe(height=64, width=64, **embedded, **{**common, "output_type": "latent"}).images
        with torch.no_grad():
            return pipe.vae.decode(pipe._unpack_latents(latents, 64, 64, pipe.vae_scale_factor)).sample.cpu()
    return pipe(prompt="a red cube", height=64, width=64, **common).images.cpu()


def loaded(name: str, **options: Any) -> Any:
    """The converted pipeline, loaded anew. `options` are those of `convert`."""
    return quiet(load_pipeline(converted(name, **options), device="cpu", **replaced(name)))


def dequantised(name: str, pipe: Any) -> Any:
    """The BF16 pipeline holding the weights that `pipe`'s codes and scales stand for: what dequantising must equal."""
    plain = bf16(name)
    for part, model in modules_of(pipe).items():
        theirs = dict(plain.components[part].named_modules())
        for path, module in model.named_modules():
            if isinstance(module, Fp8Weight):
                theirs[path].weight.data = module.dequantized(torch.bfloat16)
    return plain


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between two images with values in [0, 1]."""
    return float(-10 * torch.log10(((a.float() - b.float()) ** 2).mean()))


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    """Equal names, dtypes and bits of everything in the state dict."""
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert torch.equal(value, b[key]), key
