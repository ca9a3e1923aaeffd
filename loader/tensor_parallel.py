"""Tensor parallelism: each rank holds a slice of every linear that diffusers' plan of the class (`_tp_plan`) names.

A "colwise" linear holds some of the output features; a "rowwise" one some of the input features, and its results are
summed over the ranks:

    y = sum over ranks of x_r @ w_r.T, plus bias

Both are linears of smaller width, FP8 or not, so everything that runs a linear runs them too. A weight's scale is that
of the whole weight. Activations of a rowwise W8A8 linear are quantised by each rank for the columns that it has, so a
token has as many scales as there are ranks; that is no less exact, and not the same bits.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..converter.telling.errors import LoadError
from .parts import Part
from .weights import WEIGHT_SCALE, WEIGHT_SCALE_INV, Fp8Weight


def slice_linears(model: Any, config: Any, degree: int, label: str) -> dict[str, Part]:
    """Make the planned linears of `model`, whose parameters have no memory yet, as small as this rank's slices.

    config: diffusers' TensorParallelConfig, for so many ranks. Returns the slices, by the names of parameters and
    scales. Raises LoadError for weights that cannot be cut so.
    """
    from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs

    try:
        specs = resolve_tp_shard_specs(model, model._tp_plan, degree)
    except ValueError as error:
        raise LoadError(f"{label} cannot be loaded with tensor parallelism: {error}") from error
    model.requires_grad_(False)
    mesh = model._resolve_parallel_config(config).tensor_parallel_config._mesh  # noted there, so saving is refused
    parts: dict[str, Part] = {}
    for key, spec in specs.items():
        if spec.dim is not None:
            whole = tuple(model.get_parameter(key).shape)
            parts[key] = Part(whole, spec.dim, _ranges(spec.block_sizes, mesh.get_local_rank(), degree))
    for key, part in [*parts.items()]:
        path, _, leaf = key.rpartition(".")
        module = model.get_submodule(path)
        if leaf == "weight":
            parts |= {f"{path}.{scale}": held for scale, held in _scale_part(module, part, key, label).items()}
            module.out_features, module.in_features = part.shape
            if part.dim == 1:
                module.register_forward_hook(_Sum(mesh.get_group()))
    for key, part in parts.items():
        path, _, leaf = key.rpartition(".")
        _cut(model.get_submodule(path), leaf, part)
    return parts


def keep_one_bias(model: Any) -> None:
    """Once the model is filled: results are summed over the ranks, and so one rank alone adds the bias."""
    for module in model.modules():
        sums = [hook for hook in module._forward_hooks.values() if isinstance(hook, _Sum)]
        if sums and module.bias is not None and dist.get_rank(sums[0].group):
            with torch.no_grad():
                module.bias.zero_()


class _Sum:
    """A forward hook: the sum of the results over the ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        if out.requires_grad:
            raise RuntimeError("Tensor parallelism here is for inference: run the DiT under torch.no_grad().")
        dist.all_reduce(out, group=self.group)
        return out


def _ranges(block_sizes: list[int], rank: int, degree: int) -> tuple[tuple[int, int], ...]:
    """The rank's share of each of the projections that are fused in one weight."""
    ranges, start = [], 0
    for size in block_sizes:
        share = size // degree
        ranges.append((start + rank * share, start + (rank + 1) * share))
        start += size
    return tuple(ranges)


def _scale_part(module: nn.Module, part: Part, key: str, label: str) -> Mapping[str, Part]:
    """What of the weight's scale belongs to the slice, by the scale's name; nothing where that is all of it."""
    if not isinstance(module, Fp8Weight):
        return {}
    scale = tuple(module.scale.shape)
    if module.format.channel and part.dim == 0:
        return {WEIGHT_SCALE: Part(scale, 0, part.ranges)}
    if module.block is None:
        return {}
    size, whole = module.block[part.dim], part.whole[part.dim]
    if any(edge % size and edge != whole for pair in part.ranges for edge in pair):
        raise LoadError(
            f"{label} cannot be loaded with tensor parallelism: {key} would be cut within its blocks of {size}; use "
            "fewer ranks, or convert it with one scale for each weight."
        )
    blocks = tuple((start // size, -(-stop // size)) for start, stop in part.ranges)
    return {WEIGHT_SCALE_INV: Part(scale, part.dim, blocks)}


def _cut(module: nn.Module, leaf: str, part: Part) -> None:
    """Give a parameter or buffer without memory the shape of its part."""
    held = module._parameters.get(leaf)
    tensor = held if held is not None else cast(Tensor, module._buffers[leaf])
    smaller = torch.empty(part.shape, dtype=tensor.dtype, device=tensor.device)
    if held is not None:
        module._parameters[leaf] = nn.Parameter(smaller, requires_grad=held.requires_grad)
    else:
        module._buffers[leaf] = smaller
