"""Train the text encoder and the transformer on the pictures' latents: second step of two.

    python emoji/train.py emoji.npz vae OUT --steps 28000

Writes OUT, a `ZImagePipeline` in BF16, and OUT.png with pictures for some names. Says how many of the names give
their own picture: those whose output is nearer to it than to every other one. Seeded; another GPU or another torch
rounds differently, so the weights are alike and not equal. Seven minutes on an H200.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import batched
import models
import numpy as np
import torch
from diffusers import AutoencoderKL, ZImagePipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from train_vae import measured, pictures_of

BATCH = 256
RATE = 2e-3
UNNAMED = 0.1  # share of the pictures that are shown with an empty caption, for guidance
AVERAGE = 0.999  # of the weights, over steps


class Captions:
    """Token ids [N + 1, 32] and which are no pads, the last row being the empty caption."""

    def __init__(self, tokenizer: Any, names: list[str], device: torch.device):
        chats = [[{"role": "user", "content": name}] for name in [*names, ""]]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(texts, padding="max_length", max_length=models.TOKENS, return_tensors="pt")
        self.ids = encoded.input_ids.to(device)
        self.real = encoded.attention_mask.bool().to(device)


class Step:
    """One training step on inputs of its own, captured as a CUDA graph where there is one."""

    def __init__(self, encoder: Any, model: Any, latents: Tensor, captions: Captions, steps: int):
        self.device = latents.device
        self.encoder, self.latents, self.captions = encoder, latents, captions
        self.parameters = [p for p in itertools.chain(encoder.parameters(), model.parameters()) if p.requires_grad]
        self.averages = [p.detach().clone() for p in self.parameters]
        cuda = self.device.type == "cuda"
        run = torch.compile(batched.block, fullgraph=True, dynamic=False) if cuda else batched.block
        self.forward = batched.Batched(model, self.device, run)
        self.rate = torch.tensor(0.0, device=self.device)
        self.steps = steps
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda, capturable=cuda
        )
        self.loss = torch.zeros((), device=self.device)
        self.graph = self._captured() if cuda else None

    def __call__(self, step: int) -> None:
        warm = min(1.0, (step + 1) / 500)
        rest = max(0.0, 1 - step / self.steps)
        self.rate.fill_(RATE * warm * (0.5 - 0.5 * np.cos(np.pi * rest)))
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()

    def _run(self) -> None:
        chosen = torch.randint(len(self.latents), (BATCH,), device=self.device)
        unnamed = torch.rand(BATCH, device=self.device) < UNNAMED
        rows = torch.where(unnamed, len(self.latents), chosen)
        clean = self.latents[chosen]
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(1.2 * torch.randn(BATCH, device=self.device))
        sigma = 2 * sigma / (1 + sigma)  # shifted towards noise, where the subject is decided
        mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            features = batched.text_features(self.encoder, self.captions.ids[rows])
            output = self.forward(mixed, 1 - sigma, features, self.captions.real[rows])
        loss = (output.float() - (clean - noise)).pow(2).mean()
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - AVERAGE)
        self.loss.lerp_(loss.detach(), 0.01)

    def _captured(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # with a rate of zero: compiles, and makes the optimizer's state
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        return graph

    def keep_averages(self) -> None:
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.averages, strict=True):
                parameter.copy_(average)


def trained_vae(folder: Path) -> Any:
    """As `train_vae.py` saved it; not by `from_pretrained`, which would write the folder's place into the config."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return vae


@torch.no_grad()
def sampled(encoder: Any, model: Any, captions: Captions, rows: Tensor, steps: int = 16) -> Tensor:
    """Latents [rows, 16, 16, 16] from noise, by Euler's method over the scheduler's sigmas."""
    generator = torch.Generator(rows.device).manual_seed(1)
    x = torch.randn(len(rows), 16, 16, 16, device=rows.device, generator=generator)
    forward = batched.Batched(model, rows.device)
    scheduler = models.scheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist())
    features = batched.text_features(encoder, captions.ids[rows])
    for sigma, after in itertools.pairwise(scheduler.sigmas.tolist()):
        time_of = torch.full((len(rows),), 1 - sigma, device=rows.device)
        x = x - (after - sigma) * forward(x, time_of, features, captions.real[rows]).float()
    return x


@torch.no_grad()
def own_pictures(encoder: Any, model: Any, vae: Any, captions: Captions, pictures: Tensor) -> tuple[float, float]:
    """Share of all names whose output is nearest to their own picture, and the outputs' PSNR against it in dB."""
    right, errors = [], []
    flat = pictures.flatten(1)
    for rows in torch.arange(len(pictures), device=pictures.device).split(256):
        with torch.autocast(pictures.device.type, torch.bfloat16):
            latents = sampled(encoder, model, captions, rows)
            output = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        output = output.float().clamp(-1, 1).flatten(1)
        right.append(torch.cdist(output, flat).argmin(dim=1) == rows)
        errors.append(((output - flat[rows]) / 2).pow(2).mean(dim=1))
    return float(torch.cat(right).float().mean()), float(-10 * torch.cat(errors).mean().log10())


@torch.no_grad()
def check_the_class(encoder: Any, model: Any, captions: Captions) -> float:
    """Largest difference between the class and the batched forward in float32, relative to the largest output."""
    device = captions.ids.device
    rows = torch.tensor([0, 5, 7], device=device)
    latents = torch.randn(3, 16, 16, 16, device=device)
    time_of = torch.tensor([0.1, 0.5, 0.9], device=device)
    ids, real = captions.ids[rows], captions.real[rows]
    mine = batched.Batched(model, device)(latents, time_of, batched.text_features(encoder, ids), real)
    hidden = encoder(input_ids=ids, attention_mask=real, output_hidden_states=True).hidden_states[-2]
    features = [row[mask] for row, mask in zip(hidden, real, strict=True)]
    theirs = torch.stack(model(list(latents[:, :, None]), time_of, features, return_dict=False)[0])[:, :, 0]
    return float((mine - theirs).abs().max() / theirs.abs().max())


def training(step: Step, steps: int, every: int = 1000) -> Iterator[str]:
    started = time.monotonic()
    for number in range(steps):
        step(number)
        if number % every == every - 1:
            yield f"step {number + 1}: loss {step.loss.item():.4f}, {time.monotonic() - started:.0f} s"


def sheet(pipeline: Any, names: list[str], picture_of: Callable[[str], np.ndarray[Any, Any]]) -> Image.Image:
    """Two rows: the pipeline's own pictures, and below them what was to be learnt."""
    painted = [
        pipeline(
            name,
            height=64,
            width=64,
            num_inference_steps=16,
            guidance_scale=0.0,
            max_sequence_length=models.TOKENS,
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="np",
        ).images[0]
        for name in names
    ]
    above = np.concatenate([(255 * image).round().astype(np.uint8) for image in painted], axis=1)
    return Image.fromarray(np.concatenate([above, np.concatenate([picture_of(name) for name in names], axis=1)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("vae", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=28000)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    pictures = pictures_of(arguments.archive, device)
    archive = np.load(arguments.archive)
    names = [str(name) for name in archive["names"]]
    vae = trained_vae(arguments.vae).to(device)
    psnr, latents = measured(vae, pictures)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor

    tokenizer = models.tokenizer(names)
    captions = Captions(tokenizer, names, device)
    encoder, model = models.text_encoder().to(device), models.transformer().to(device)
    print(f"the class and the batched forward differ by {check_the_class(encoder, model, captions):.1e}", flush=True)
    step = Step(encoder, model, latents, captions, arguments.steps)
    for line in training(step, arguments.steps):
        print(line, flush=True)
    step.keep_averages()
    print(f"after training they differ by {check_the_class(encoder, model, captions):.1e}")
    share, distance = own_pictures(encoder, model, vae, captions, pictures)
    print(f"{share:.1%} of {len(names)} names give their own picture, at {distance:.2f} dB; the VAE {psnr:.2f} dB")

    pipeline = ZImagePipeline(
        scheduler=models.scheduler(),
        vae=vae.to(torch.bfloat16).eval(),
        text_encoder=encoder.to(torch.bfloat16).eval(),
        tokenizer=tokenizer,
        transformer=model.to(torch.bfloat16).eval(),
    )
    pipeline.save_pretrained(arguments.output)
    pipeline.set_progress_bar_config(disable=True)
    shown = names[:: max(1, len(names) // 16)][:16]
    pixels = dict(zip(names, archive["pictures"], strict=True))
    sheet(pipeline, shown, pixels.__getitem__).save(arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
