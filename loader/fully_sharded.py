"""Weights spread over several ranks (PyTorch's FSDP2): each holds a share of every parameter's rows.

A block's parameters, FP8 codes mostly, are gathered just before it runs and dropped after it, so what runs and its bits
are those of one GPU. Scales are small and on every rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..converter.telling.errors import LoadError
from .parts import Part


def spread_parameters(model: Any, mesh: Any, label: str) -> dict[str, Part]:
    """Spread the parameters of `model`, which have no memory yet, over the ranks of `mesh` (a DeviceMesh of one
    dimension), gathered by repeated block.

    Returns this rank's rows, by the parameters' names. Raises LoadError for a class that names no repeated blocks.
    """
    from torch.distributed.fsdp import fully_shard

    names = set(getattr(model, "_repeated_blocks", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise LoadError(f"{label} cannot be spread over ranks: {type(model).__name__} names no repeated blocks.")
    model.requires_grad_(False)  # FSDP gathers several dtypes together where nothing is trained
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with _integers_can_be_spread():
        for block in (*blocks, model):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)  # what lies outside the blocks too
    model._repeated_blocks = sorted({type(block).__name__ for block in blocks})  # FSDP renames them
    model.save_pretrained = refuse_saving
    model.enable_group_offload = refuse_offloading
    rank, count = mesh.get_local_rank(), mesh.size()
    return {name: Part(tuple(shape), 0, (_share(shape[0], rank, count),)) for name, shape in shapes.items()}


@contextmanager
def _integers_can_be_spread() -> Iterator[None]:
    """PyTorch 2.11 makes each spread parameter one that is trained and then freezes it; integers, which FP8 codes are
    held as, cannot be trained for that moment. Later versions ask first.
    """
    if not torch.__version__.startswith("2.11."):
        yield
        return
    spreading: Any = import_module("torch.distributed.fsdp._fully_shard._fsdp_param")

    def frozen(data: torch.Tensor, requires_grad: bool = False) -> nn.Parameter:
        return nn.Parameter(data, requires_grad)

    spreading.nn = SimpleNamespace(Parameter=frozen, Module=nn.Module)
    try:
        yield
    finally:
        spreading.nn = nn


def refuse_saving(*_: Any, **__: Any) -> None:
    """Stands in for `save_pretrained` on a model whose weights are spread over ranks."""
    raise NotImplementedError(
        "Each rank holds a share of the weights, which cannot be saved; copy the snapshot instead."
    )


def keep_in_place(pipe: Any) -> None:
    """Refuse what would move the DiTs of the pipeline."""
    for way in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"):
        setattr(pipe, way, refuse_offloading)


def refuse_offloading(*_: Any, **__: Any) -> None:
    """Stands in for what offloads a model whose weights are spread over ranks, or a pipeline with one."""
    raise ValueError("Each rank holds a share of the DiT's weights, which cannot be offloaded; leave offloading out.")


def _share(rows: int, rank: int, count: int) -> tuple[int, int]:
    """As `torch.chunk` cuts, and so FSDP: shares of the same size, but for the last ones."""
    size = -(-rows // count)
    return min(rows, rank * size), min(rows, (rank + 1) * size)
