"""FP8 storage: weights are E4M3 at rest and in the compute dtype for their own layer's forward alone.

The dequantised weight is a local of that forward: it is freed when the layer returns, so two of them never
exist at once, and the stored codes are never written. Output equals that of a plain layer holding the
dequantised weight, up to the order of sums where few tokens multiply the codes themselves (`weight_only.py`).
Convolutions override `_conv_forward` only, so that the padding of causal convolutions around it stays theirs.
"""

from torch import Tensor, nn

from .weight_only import weight_only_linear
from .weights import Fp8Weight, Mode


class StorageLinearMixin(Fp8Weight, nn.Linear):
    """What `install` mixes into `nn.Linear`: the result is called StorageLinear."""

    mode: Mode = "storage"  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        return weight_only_linear(self, x)


class StorageConvMixin(Fp8Weight):
    """What `install` mixes into convolutions: StorageConv2d, StorageWanCausalConv3d, …"""

    mode: Mode = "storage"  # type: ignore[misc]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # `weight` is the parameter, the codes: the caller, nn.Conv's forward, knows nothing of them.
        dtype = self.dtype_for(x)
        bias = None if bias is None else bias.to(dtype)
        out: Tensor = super()._conv_forward(x.to(dtype), self.dequantized(dtype), bias)  # type: ignore[misc]
        return out
