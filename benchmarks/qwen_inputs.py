"""What a Qwen-Image DiT is run on, for `blocks.py` and `loading.py`."""

from typing import Any

import torch


def qwen_inputs() -> dict[str, Any]:
    """Arguments of one forward, on the default device: 4096 image and 256 text tokens, bfloat16."""
    return {
        "hidden_states": torch.randn(1, 4096, 64, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 256, 3584, dtype=torch.bfloat16),
        "encoder_hidden_states_mask": torch.ones(1, 256, dtype=torch.int64),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "img_shapes": [[(1, 64, 64)]],
    }
