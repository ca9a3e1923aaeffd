"""transformers' hooks for FP8 models: saving alone, since only `load_pipeline` installs storage in text encoders."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from ..converter.format import layout
from .checkpoint import Fp8Modules
from .saving import saved_state


class Fp8TransformersQuantizer(HfQuantizer):  # type: ignore[misc]
    """Save a text encoder that `load_pipeline` made. transformers itself never loads through it."""

    is_trainable = False
    fp8 = Fp8Modules({}, {})
    names: Mapping[str, str] = {}

    def validate_environment(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "transformers cannot hold fp8_convert weights by itself: load the pipeline with "
            "fp8_convert.loader.load_pipeline, or name only DiTs and VAEs in components_to_quantize."
        )

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        from transformers.core_model_loading import revert_weight_conversion

        # transformers renames keys while it saves; the metadata must name the modules as they then are.
        own = list(self.names)
        marks = {self.names[module] + layout.WEIGHT: torch.tensor(i) for i, module in enumerate(own)}
        written = {own[int(mark)]: key for key, mark in revert_weight_conversion(model, marks).items()}
        modules = {written[m].removesuffix(layout.WEIGHT): how for m, how in self.fp8.modules.items()}
        metadata = {layout.METADATA_KEY: layout.encode_modules(modules)}
        return saved_state(model.state_dict(), self.names.values()), metadata

    def attach(self, model: Any) -> None:
        """Put the quantizer and its config on the model, so that it saves itself as it was loaded."""
        model.hf_quantizer = self
        model.config.quantization_config = self.quantization_config.to_dict()
