"""What others make of a BF16 model on the GPU, in place: the peers of these benchmarks. Each may be missing.

layerwise  diffusers' layerwise casting: FP8 at rest without scales, cast to BF16 for each layer's forward
torchao    FP8 weights and activations with a scale for each row, with `torch.compile`'s usual settings
sdnq       SDNQ's FP8 weights and activations, for the same layers
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn


def layerwise(model: Any) -> None:
    """diffusers' own choice of layers; of models that are not its own, all but embeddings and norms."""
    types = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}
    if hasattr(model, "enable_layerwise_casting"):
        model.enable_layerwise_casting(**types)
        return
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, **types, skip_modules_pattern=("embed_tokens", "norm"))


def torchao(model: nn.Module, names: Collection[str]) -> None:
    """Float8DynamicActivationFloat8WeightConfig(PerRow), its own tuning of Inductor, which takes minutes, left out."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, name: name in names)


def torchao_storage(model: nn.Module, names: Collection[str]) -> None:
    """FP8 weights alone."""
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    config = Float8WeightOnlyConfig(set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, name: name in names)


def sdnq(model: nn.Module, names: Collection[str], multiply: bool = True) -> None:
    """multiply: in FP8; else weights are FP8 at rest, convolutions' too."""
    from sdnq import sdnq_post_load_quant

    others = [f"{name}.weight" for name, module in model.named_modules() if name not in names and _has_weight(module)]
    sdnq_post_load_quant(
        model,
        weights_dtype="float8_e4m3fn",
        quantized_matmul_dtype="float8_e4m3fn",
        use_quantized_matmul=multiply,
        quant_conv=not multiply,
        add_skip_keys=False,
        modules_to_not_convert=others,
        torch_dtype=torch.bfloat16,
    )


def _has_weight(module: nn.Module) -> bool:
    return getattr(module, "weight", None) is not None
