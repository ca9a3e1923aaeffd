"""Make FP8 models known to diffusers and transformers, which importing `fp8_convert.loader` does.

transformers keeps its own `fp8`; `fp8_convert` is refused there with a sentence.
"""

from diffusers.quantizers import auto as diffusers_auto
from transformers.quantizers import auto as transformers_auto

from .diffusers_quantizer import Fp8DiffusersQuantizer
from .fp8_config import Fp8Config, QuantMethod
from .transformers_quantizer import Fp8TransformersQuantizer


def register() -> None:
    """Register `fp8` and `fp8_convert` with diffusers, `fp8_convert` with transformers; harmless when repeated."""
    for method in QuantMethod:
        diffusers_auto.AUTO_QUANTIZER_MAPPING.setdefault(method.value, Fp8DiffusersQuantizer)
        diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(method.value, Fp8Config)
    native = QuantMethod.FP8_CONVERT.value
    transformers_auto.AUTO_QUANTIZER_MAPPING.setdefault(native, Fp8TransformersQuantizer)
    transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(native, Fp8Config)
