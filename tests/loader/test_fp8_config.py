"""`Fp8Config` holds what config.json may say, and nothing that means nothing."""

import pytest

from fp8_convert.loader import Fp8Config


def test_a_config_means_something() -> None:
    with pytest.raises(ValueError, match="use 'dynamic' or 'static'"):
        Fp8Config(activation_scheme="none")
    config = Fp8Config(weight_block_size=(128, 128), ignored_layers=["proj_out"], is_checkpoint_fp8_serialized=True)
    assert config.to_dict() == {
        "quant_method": "fp8_convert",
        "activation_scheme": "dynamic",
        "is_checkpoint_fp8_serialized": True,
        "ignored_layers": ["proj_out"],
        "weight_block_size": [128, 128],
    }
