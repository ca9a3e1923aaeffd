"""W8A8: a linear layer whose weight and activations are E4M3 in the product.

    y = (codes(x) @ codes(w).T) * scale(x) * scale(w) + bias

x is [..., K] in bf16, fp16 or fp32, y [..., N] in the same dtype. Activations are quantised in each forward:
a scale for each token where weights have one scale, or one for each row; for each 1x128 group of a token where
they have blocks; or the checkpoint's one `input_scale` with the static scheme. Where no FP8 matrix product runs
(`backend.py` decides and says why), gradients are wanted or the denoising step is to be of high precision (`steps.py`),
the weight is dequantised for this one forward and the activations stay as they are.
"""

import torch
from torch import Tensor, nn

from . import kernels
from .backend import Backend, ChosenProduct, announce, choose
from .few_tokens import W8A8_TOKENS
from .product import Product, scaled_product
from .weight_only import multiplies_codes, wants_gradient, weight_only_linear
from .weights import INPUT_SCALE, Fp8Weight, Mode


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _product(backend: Backend, wanted: Product, device_type: str, index: int | None, n: int, k: int) -> Product:
    chosen = choose(backend, wanted, device_type, index, n, k)
    announce(chosen)
    return chosen.product


class W8A8LinearMixin(Fp8Weight, nn.Linear):
    """What `install` mixes into `nn.Linear`: the result is called W8A8Linear."""

    mode: Mode = "w8a8"  # type: ignore[misc]
    backend: Backend = "auto"
    high_precision: bool = False

    @property
    def wanted(self) -> Product:
        """The product that this layer's scales call for."""
        if self.block is None:
            return "tensor" if INPUT_SCALE in self._buffers else "rows"
        return "groups" if self.block == (kernels.GROUP, kernels.GROUP) else "dequantize"

    def product_on(self, device: torch.device) -> ChosenProduct:
        """The product this layer runs on `device`, and why."""
        if self.wanted == "dequantize":
            return ChosenProduct("dequantize", f"no FP8 matrix product for scheme {self.scheme}")
        return choose(self.backend, self.wanted, device.type, device.index, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        product: Product = "dequantize" if self.high_precision or wants_gradient(x) else self.wanted
        if product != "dequantize":
            product = _product(
                self.backend, product, x.device.type, x.device.index, self.out_features, self.in_features
            )
        dtype = self.dtype_for(x)
        if product == "dequantize" or dtype == torch.float64 or self._multiplies_codes(x):
            return weight_only_linear(self, x)
        out: Tensor | None = None
        if not torch.compiler.is_compiling() and self.shared is not None and x.dtype == dtype:
            out = self.shared.product(self, product, x)
        if out is None:
            flat = (x if x.dtype == dtype else x.to(dtype)).reshape(-1, self.in_features)
            out = scaled_product(product, flat, self.codes, self.scale, self.static_scale, self.bias_in(dtype))
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self.out_features)

    def _multiplies_codes(self, x: Tensor) -> bool:
        """Whether so few tokens are faster with a weight that is not multiplied in FP8."""
        return self.backend == "auto" and multiplies_codes(self, x, W8A8_TOKENS)
