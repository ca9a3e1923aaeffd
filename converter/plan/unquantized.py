"""Refusing what is quantised already: weights are converted from what they were trained in, once."""

from __future__ import annotations

from ..format import layout
from ..snapshot.snapshot import Component
from ..telling.errors import ConvertError

_QUANTIZED_DTYPES = {
    "F4",
    "F6_E2M3",
    "F6_E3M2",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
}
_QUANTIZED_SUFFIXES = (
    ".weight_scale", ".weight_scale_inv", ".scale_weight", ".comfy_quant", ".qweight", ".qzeros", ".SCB",
    ".weight_packed", ".input_scale", ".quant_map", ".weight_format",
)  # fmt: skip


def check_unquantized(component: Component, source: str) -> None:
    """Raise ConvertError, by name, for a component of the snapshot `source` that is quantised in any known way."""
    label = f"{component.label} of {source}"
    advice = "give the original BF16, FP16 or FP32 snapshot, or take its FP8 over with `fp8-convert import`"
    if (config := component.config.get(layout.CONFIG_KEY)) is not None:
        method = config.get("quant_method", "unknown") if isinstance(config, dict) else "unknown"
        raise ConvertError(f"{label} is already quantised (quant_method {method!r:.80}); {advice}.")
    names = {t.name for t in component.tensors}
    for tensor in component.tensors:
        if tensor.name.endswith(_QUANTIZED_SUFFIXES) or tensor.name in ("scaled_fp8", "weight_scale"):
            raise ConvertError(f"{label} is already quantised (it has {tensor.name}); {advice}.")
        if tensor.dtype in _QUANTIZED_DTYPES:
            module = tensor.name.removesuffix(layout.WEIGHT)
            if not any(module + s in names for s in (*_QUANTIZED_SUFFIXES, ".scale")):
                raise ConvertError(f"{tensor.name} in {label} holds {tensor.dtype} codes without a scale; {advice}.")
            raise ConvertError(f"{label} is already quantised ({tensor.name} is {tensor.dtype}); {advice}.")
