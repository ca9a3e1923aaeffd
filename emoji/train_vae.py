"""Train the autoencoder on the pictures: first step of two.

    python emoji/train_vae.py emoji.npz vae --steps 6000

Saves the VAE (float32) with the shift and scale that make its latents zero-mean and unit-variance, and prints its PSNR.
Three minutes on an H200.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import l1_loss

BATCH = 128
RATE = 2e-3
KL = 1e-5  # keeps the latents small and smooth
EDGES = 1.0  # weight of the differences between neighbours: flat colours and sharp outlines


def pictures_of(archive: Path, device: torch.device) -> Tensor:
    """[N, 3, 64, 64] in -1..1."""
    pixels = torch.from_numpy(np.load(archive)["pictures"]).to(device)
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def varied(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored or with colours exchanged, half of them each: more to learn from than 1,393 pictures."""
    mirrored = torch.rand(len(batch), 1, 1, 1, device=batch.device, generator=generator) < 0.5
    batch = torch.where(mirrored, batch.flip(-1), batch)
    order = torch.randperm(3, device=batch.device, generator=generator)
    exchanged = torch.rand(len(batch), 1, 1, 1, device=batch.device, generator=generator) < 0.5
    return torch.where(exchanged, batch[:, order], batch)


def loss_of(model: Any, batch: Tensor) -> Tensor:
    moments = model.encoder(batch)
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    output = model.decoder(latents).float()
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    across = l1_loss(output.diff(dim=-1), batch.diff(dim=-1)) + l1_loss(output.diff(dim=-2), batch.diff(dim=-2))
    return l1_loss(output, batch) + EDGES * across + KL * divergence


def train(model: Any, pictures: Tensor, steps: int) -> None:
    device = pictures.device
    generator = torch.Generator(device).manual_seed(0)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    loss = torch.compile(loss_of) if fused else loss_of
    started = time.monotonic()
    for step in range(steps):
        chosen = torch.randint(len(pictures), (BATCH,), device=device, generator=generator)
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(model, varied(pictures[chosen], generator))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps - 1:
            print(f"vae step {step}: loss {value.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def measured(model: Any, pictures: Tensor) -> tuple[float, Tensor]:
    """PSNR in dB of pictures in BF16, and the latents [N, 16, 16, 16] (means, unscaled, float32)."""
    latents, errors = [], []
    for batch in pictures.split(256):
        mean = model.encode(batch).latent_dist.mean
        with torch.autocast(batch.device.type, torch.bfloat16):
            output = model.decode(mean).sample.float().clamp(-1, 1)
        latents.append(mean)
        errors.append(((output - batch) / 2).pow(2).mean(dim=(1, 2, 3)))
    return float(-10 * torch.cat(errors).mean().log10()), torch.cat(latents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    pictures = pictures_of(arguments.archive, device)
    model = models.vae().to(device)
    train(model, pictures, arguments.steps)
    model.eval()
    psnr, latents = measured(model, pictures)
    model.register_to_config(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
    print(f"vae: {psnr:.2f} dB; latents {latents.mean():.3f} +- {latents.std():.3f}")
    model.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
