"""Put an FP8 layer in a plain layer's place."""

from typing import cast

import torch
from torch import nn

from ..converter.format.layout import STORAGE, W8A8, WeightFormat
from .backend import Backend
from .linear import W8A8LinearMixin
from .storage import StorageConvMixin, StorageLinearMixin
from .weights import Fp8Weight, become_fp8


def install(
    module: nn.Module,
    how: WeightFormat,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "meta",
    activation_scheme: str = "dynamic",
    backend: Backend = "auto",
    name: str = "",
) -> Fp8Weight:
    """Change `module` in place into its FP8 form, its codes and scales not yet filled; returns it.

    how: mode "w8a8" is for `nn.Linear`, "storage" for `nn.Linear`, `nn.Conv2d`, `nn.Conv3d` and their subclasses.
    name: for messages. The plain weight is dropped. Raises TypeError for a module of another kind, ValueError for
    scales that the activation scheme or the weight's shape does not allow.
    """
    where = f"{name} ({type(module).__name__})" if name else type(module).__name__
    if isinstance(module, Fp8Weight):
        raise TypeError(f"{where} is FP8 already")
    static = activation_scheme == "static" and how.mode == W8A8
    if static and not how.per_tensor:
        raise ValueError(f"{where}: static activation scales go with per-tensor weights, not with {how.scheme}")
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            raise TypeError(f"{where} has a forward of its own, which FP8 weights would bypass: ignore this layer")
        if how.mode == W8A8:
            made = become_fp8(module, W8A8LinearMixin, how, dtype, device, static)
            linear = cast(W8A8LinearMixin, made)
            linear.backend = backend
            linear.high_precision = False  # of its own: one that comes and goes costs compiled code a third graph
            return made
        return become_fp8(module, StorageLinearMixin, how, dtype, device)
    if isinstance(module, (nn.Conv2d, nn.Conv3d)) and how.mode == STORAGE:
        return become_fp8(module, StorageConvMixin, how, dtype, device)
    raise TypeError(f"{where} cannot hold FP8 weights in mode {how.mode!r}")
