"""What is saved of FP8 modules: codes as float8, in the same memory; whatever else there is stays as it was."""

import torch

from fp8_convert.loader.saving import saved_state


def test_codes_of_fp8_modules_alone() -> None:
    codes = torch.arange(4, dtype=torch.int8)
    state = {
        "a.weight": codes,
        "a.weight_scale": torch.ones(()),
        "a.bias": torch.ones(2, dtype=torch.bfloat16),
        "b.base_layer.weight": codes,  # under a PEFT adapter
        "table.weight": codes,  # somebody's own int8
        "ab.weight": codes,
    }
    saved = saved_state(state, ["a", "b"])
    assert list(saved) == list(state)
    assert {key for key, value in saved.items() if value.dtype == torch.float8_e4m3fn} == {
        "a.weight",
        "b.base_layer.weight",
    }
    assert saved["a.weight"].data_ptr() == codes.data_ptr()
    assert all(saved[key] is state[key] for key in ("a.weight_scale", "a.bias", "table.weight", "ab.weight"))
