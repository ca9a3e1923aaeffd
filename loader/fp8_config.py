"""`Fp8Config`: how a model is FP8, as config.json says it and as `quantization_config=` of diffusers takes it."""

from enum import StrEnum
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..converter.format import layout
from ..converter.plan.settings import unknown_setting
from ..converter.telling.errors import LoadError, SettingsError
from .config import CONFIG_KEYS, config_problem


class QuantMethod(StrEnum):
    """The two values of `quant_method` in a converted component's config.json."""

    FP8 = layout.QUANT_METHOD
    FP8_CONVERT = layout.QUANT_METHOD_NATIVE


class Fp8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """How a model is, or is to be, FP8; accepted by diffusers' `quantization_config=`.

    Keys as in config.json. `ignored_layers` are exact names in a converted checkpoint, and patterns beside
    the manifest's for one that is to be converted. Raises ValueError for values that mean nothing.
    """

    def __init__(
        self,
        activation_scheme: str = "dynamic",
        weight_block_size: list[int] | tuple[int, int] | None = None,
        ignored_layers: list[str] | None = None,
        is_checkpoint_fp8_serialized: bool = False,
        quant_method: str = layout.QUANT_METHOD_NATIVE,
        **unknown: Any,
    ) -> None:
        given = {
            "activation_scheme": activation_scheme,
            "weight_block_size": weight_block_size,
            "ignored_layers": ignored_layers,
            "is_checkpoint_fp8_serialized": is_checkpoint_fp8_serialized,
            "quant_method": quant_method,
        }
        if unknown:
            raise SettingsError(unknown_setting(next(iter(unknown)), CONFIG_KEYS))
        if problem := config_problem(given):
            raise SettingsError(f"{problem}.")
        self.quant_method = QuantMethod(quant_method)
        self.activation_scheme = activation_scheme
        self.weight_block_size = list(weight_block_size) if weight_block_size is not None else None
        self.ignored_layers = list(ignored_layers or [])
        self.is_checkpoint_fp8_serialized = is_checkpoint_fp8_serialized

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in transformers and diffusers, which call it with what config.json has. Raises LoadError."""
        if problem := config_problem(config_dict):
            raise LoadError(
                f"config.json has a {layout.CONFIG_KEY} that cannot be used: {problem}: convert the snapshot again."
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The keys of config.json, JSON-safe."""
        return {**vars(self), "quant_method": self.quant_method.value}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
