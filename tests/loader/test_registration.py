"""diffusers knows FP8 models by two names, transformers by one: its own "fp8" stays."""

from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as TRANSFORMERS_MAPPING

from fp8_convert.loader.diffusers_quantizer import Fp8DiffusersQuantizer
from fp8_convert.loader.registration import register
from fp8_convert.loader.transformers_quantizer import Fp8TransformersQuantizer


def test_registering_is_idempotent_and_leaves_transformers_fp8_alone() -> None:
    before = TRANSFORMERS_MAPPING["fp8"]
    register()
    assert AUTO_QUANTIZER_MAPPING["fp8"] is AUTO_QUANTIZER_MAPPING["fp8_convert"] is Fp8DiffusersQuantizer
    assert TRANSFORMERS_MAPPING["fp8"] is before
    assert "transformers" in before.__module__
    assert TRANSFORMERS_MAPPING["fp8_convert"] is Fp8TransformersQuantizer
