"""Weights rounded to nearest against rounding that compensates its errors (GPTQ), in W8A8, on a model that is trained.

    python benchmarks/rounding.py emoji/model [--json FILE]

Rounding to nearest minimises the error of each weight. GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", 2022) minimises that of the layer's output on
calibration inputs X: with H = XᵀX, damped, it rounds the weight column by column and pushes each error onto the columns
that are still to come. Scales stay as they are, so only codes change.

    nearest        what `fp8-convert` writes
    compensated    H from the inputs of each layer in the original, columns by falling diagonal of H
    weighted       the same, each token's input weighted by how much the transformer's output depends on the layer's at
                   that token: the mean square of the gradient of a random projection of the output
    moved          the weight is first moved to the one whose product with the quantised activations Q(X) is nearest to
                   X Wᵀ, then rounded with H = Q(X)ᵀQ(X)

The text encoder and the VAE stay as they are. Errors are against the BF16 original on prompts that are not those of the
calibration: "layers" is what the weights add to each layer's own output and "output" the transformer's, on inputs that
the original saw, as signal-to-noise ratios; "pictures" is the PSNR of what comes out in the end. The first row is the
original in float32: how far BF16 itself is off.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fp8_convert.loader import kernels, load_pipeline
from fp8_convert.loader.linear import W8A8LinearMixin
from fp8_convert.loader.quality.pictures import psnr
from fp8_convert.loader.quality.prompts import Prompt
from fp8_convert.loader.quality.running import Sampling, cases, generate

CALIBRATION = """
ant; aubergine; avocado; banana; bear face; bicycle; broccoli; bus; cactus; cat; cherries; crab; crown; dog; doughnut;
dragon; fire; frog face; ghost; grapes; guitar; hammer; hot dog; lion face
"""
HELD_OUT = """
alarm clock; balloon; blowfish; cow; fox face; hamburger; jack-o-lantern; lady beetle; panda face; penguin; red apple;
rocket; sailboat; steam locomotive; tiger face; watermelon
"""
EVERY = 3  # each so many'th call of the transformer is learnt from or compared: no divisor of 16 steps
DAMPING = 0.1  # of H's mean diagonal; the paper's 0.01 gave less here


@dataclass
class Gram:
    """What the roundings need of a layer's inputs X [tokens, K], float64 [K, K] each; Q(X) is X as W8A8 sees it."""

    plain: Tensor
    weighted: Tensor
    seen: Tensor
    cross: Tensor

    def add(self, layer: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        """Take in a call of the layer: a forward hook. The weights of its tokens follow with the gradient of `out`."""
        flat = args[0].detach().reshape(-1, args[0].shape[-1])
        codes, scale = kernels.quantize_rows(flat, torch.ones((), device=flat.device))
        exact, seen = flat.double(), codes.double() * scale.double()
        self.plain += exact.T @ exact
        self.seen += seen.T @ seen
        self.cross += seen.T @ exact
        out.register_hook(lambda gradient: self._add_weighted(exact, gradient))

    def _add_weighted(self, exact: Tensor, gradient: Tensor) -> None:
        weights = gradient.double().square().mean(-1).reshape(-1, 1)
        self.weighted += exact.T @ (exact * weights)


@dataclass(frozen=True)
class Row:
    """One line of the table; decibels, of the layers the mean (None: exact), of the pictures the mean and the worst."""

    weights: str
    activations: str
    layers: float | None
    output: float
    pictures: float
    worst: float


def compensated(weight: Tensor, scale: Tensor, gram: Tensor, damping: float) -> Tensor:
    """E4M3 codes [N, K] of `weight` [N, K] under `scale` (broadcastable to it), errors compensated by `gram` [K, K]."""
    gram = _damped(gram, damping)
    order = torch.argsort(gram.diagonal(), descending=True)
    rest, full = weight.double()[:, order], scale.double().expand_as(weight)[:, order]
    inverse = torch.linalg.cholesky(torch.linalg.inv(gram[order][:, order]), upper=True)
    codes = torch.empty(weight.shape, dtype=kernels.E4M3, device=weight.device)
    for k in range(weight.shape[1]):
        codes[:, k] = (rest[:, k] / full[:, k]).clamp(-448, 448).float().to(kernels.E4M3)
        error = (rest[:, k] - codes[:, k].double() * full[:, k]) / inverse[k, k]
        rest[:, k + 1 :] -= error[:, None] * inverse[k, k + 1 :]
    return codes.view(torch.int8)[:, torch.argsort(order)]


def moved(weight: Tensor, gram: Gram, damping: float) -> Tensor:
    """The weight whose product with Q(X) is nearest to X Wᵀ, damped towards the weight itself."""
    damped = _damped(gram.seen, damping)
    return torch.linalg.solve(damped, (gram.cross + damped - gram.seen) @ weight.double().T).T


def of_layer(weight: Tensor, layer: W8A8LinearMixin, gram: Tensor) -> float:
    """Decibels between a layer's output and what its codes get wrong of it, for inputs with XᵀX = `gram`."""
    exact = weight.double()
    wrong = layer.codes.double() * _scale(layer).double() - exact
    return 10 * math.log10(float(((exact @ gram) * exact).sum() / ((wrong @ gram) * wrong).sum()))


def _damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _scale(layer: W8A8LinearMixin) -> Tensor:
    if layer.block is None:
        return layer.scale
    return kernels.expand_scale(layer.scale, layer.block, layer.codes.shape)


Rounding = Callable[[Tensor, Tensor, Gram, float], Tensor]
ROUNDINGS: dict[str, Rounding] = {
    "compensated": lambda weight, scale, gram, damping: compensated(weight, scale, gram.plain, damping),
    "weighted": lambda weight, scale, gram, damping: compensated(weight, scale, gram.weighted, damping),
    "moved": lambda weight, scale, gram, damping: compensated(moved(weight, gram, damping), scale, gram.seen, damping),
}


Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls_of(pipe: Any, run: Callable[[], object]) -> list[Call]:
    """The arguments of the transformer's calls in a run, of each so many'th."""
    calls: list[Call] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    run()
    hook.remove()
    return calls[::EVERY]


def collect(transformer: Any, names: Sequence[str], calls: Sequence[Call]) -> dict[str, Gram]:
    """The inputs of a float32 transformer's layers over some calls, and what they mean to its output."""
    grams, hooks = {}, []
    for name in names:
        layer = transformer.get_submodule(name)
        size = layer.in_features
        grams[name] = Gram(*torch.zeros(4, size, size, dtype=torch.float64, device=layer.weight.device))
        hooks.append(layer.register_forward_hook(grams[name].add))
    transformer.requires_grad_(True)
    for args, options in calls:
        output = flat(transformer(*_cast(args, torch.float32), **_cast(options, torch.float32)))
        torch.sum(output * torch.randn_like(output)).backward()
        transformer.zero_grad(set_to_none=True)
    transformer.requires_grad_(False)
    for hook in hooks:
        hook.remove()
    return grams


def flat(output: Any) -> Tensor:
    """The transformer's output, one vector in float64."""
    return torch.cat([picture.double().reshape(-1) for picture in output[0]])


class Bench:
    """The original's pictures and transformer outputs on the held-out prompts, and how far others are from them."""

    def __init__(self, original: Any, prompts: Sequence[str], sampling: Sampling) -> None:
        self._cases = cases([Prompt(text) for text in prompts], sampling)
        self._sampling = sampling
        self._pictures: list[Tensor] = []
        self._calls = calls_of(original, lambda: self._pictures.extend(self._run(original)))
        self._outputs = self._answers(original)

    def grams(self, transformer: Any, names: Sequence[str]) -> dict[str, Gram]:
        """The inputs of a float32 transformer's layers over the calls that are compared."""
        return collect(transformer, names, self._calls)

    def measure(self, weights: str, activations: str, pipe: Any, layers: float | None) -> Row:
        pairs = list(zip(self._answers(pipe), self._outputs, strict=True))
        noise = sum(float((ours - theirs).square().sum()) for ours, theirs in pairs)
        signal = sum(float(theirs.square().sum()) for _, theirs in pairs)
        decibels = [psnr(a, b) for a, b in zip(self._run(pipe), self._pictures, strict=True)]
        output = 10 * math.log10(signal / noise)
        row = Row(weights, activations, layers, output, statistics.fmean(decibels), min(decibels))
        own = "exact" if layers is None else f"{layers:.2f}"
        shown = f"{own:>10} {output:10.2f} {row.pictures:14.2f} {row.worst:10.2f}"
        print(f"{weights:14} {activations:12} {shown}", flush=True)
        return row

    def _run(self, pipe: Any) -> list[Tensor]:
        return [generate(pipe, case, self._sampling).frames for case in self._cases]

    @torch.no_grad()
    def _answers(self, pipe: Any) -> list[Tensor]:
        dtype = pipe.transformer.dtype
        return [flat(pipe.transformer(*_cast(args, dtype), **_cast(options, dtype))) for args, options in self._calls]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The inputs of a call, the BF16 tensors among them in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype == torch.bfloat16 else value
    if isinstance(value, dict):
        return {key: _cast(one, dtype) for key, one in value.items()}
    return type(value)(_cast(one, dtype) for one in value) if isinstance(value, list | tuple) else value


def choose_backend(pipe: Any, backend: str) -> None:
    for module in pipe.transformer.modules():
        if isinstance(module, W8A8LinearMixin):
            module.backend = backend


def bench(
    model: Path, device: torch.device, sampling: Sampling, block: tuple[int, int] | None, damping: float
) -> list[Row]:
    calibration, held_out = ([name.strip() for name in text.split(";")] for text in (CALIBRATION, HELD_OUT))
    original = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16).to(device)
    wide = DiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(device)
    settings = {"method": "fp8"} | ({"weight_block_size": [*block]} if block else {})
    pipe = load_pipeline(model, device=device, backend="scaled_mm", quantization_config={"transformer": settings})
    layers = {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, W8A8LinearMixin)}
    learnt = cases([Prompt(text) for text in calibration], sampling)
    calls = calls_of(original, lambda: [generate(original, case, sampling) for case in learnt])
    torch.manual_seed(0)
    grams = collect(wide.transformer, list(layers), calls)
    compare = Bench(original, held_out, sampling)
    print(f"{len(layers)} layers, {len(calibration)} prompts to calibrate, {len(held_out)} to measure")
    print(
        f"{'weights':14} {'activations':12} {'layers, dB':>10} {'output, dB':>10}"
        f" {'pictures, dB':>14} {'worst, dB':>10}"
    )
    rows = [compare.measure("float32", "float32", wide, None)]
    seen = compare.grams(wide.transformer, list(layers))
    nearest = {name: layer.codes.view(torch.int8).clone() for name, layer in layers.items()}
    for name in ("nearest", *ROUNDINGS):
        ratios = []
        for path, layer in layers.items():
            weight = original.transformer.get_submodule(path).weight.detach()
            codes = ROUNDINGS[name](weight, _scale(layer), grams[path], damping) if name in ROUNDINGS else nearest[path]
            layer.weight.copy_(codes)
            ratios.append(of_layer(weight, layer, seen[path].plain))
        for backend, activations in (("scaled_mm", "E4M3"), ("dequantize", "BF16")):
            choose_backend(pipe, backend)
            rows.append(compare.measure(name, activations, pipe, statistics.fmean(ratios)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder of a ZImagePipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--block", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="block scales")
    parser.add_argument("--damping", type=float, default=DAMPING, help="of H, in its mean diagonals")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    extra = {"max_sequence_length": 32}
    sampling = Sampling(steps=given.steps, height=given.size, width=given.size, guidance=0.0, extra=extra)
    rows = bench(given.model, torch.device(given.device), sampling, given.block and tuple(given.block), given.damping)
    if given.json:
        versions = {"torch": torch.__version__, "device": given.device, "damping": given.damping}
        given.json.write_text(json.dumps({**versions, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
