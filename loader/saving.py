"""What `save_pretrained` writes of FP8 modules: their codes as float8_e4m3fn, which models hold as int8."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..converter.format import layout


def saved_state(state: Mapping[str, Tensor], modules: Iterable[str]) -> dict[str, Tensor]:
    """`state` with the codes of FP8 `modules` (the model's own names) as float8_e4m3fn, in the same memory."""
    weights = {module + layout.WEIGHT for module in modules}
    return {
        key: value.view(torch.float8_e4m3fn)
        if value.dtype == torch.int8 and key.replace(".base_layer.", ".") in weights
        else value
        for key, value in state.items()
    }
