"""The rules that the suite's own tests are held against are still vLLM-Omni's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import record

RECORDED = Path(__file__).parents[2] / "converter/targets/recorded/vllm_omni.json"
FAMILIES = {"qwen_image": "qwen_image", "z_image": "z_image_as_published", "wan22": "wan22"}


def test_the_recorded_rules_are_those_of_the_reader(made: Callable[..., Path]) -> None:
    """FP8_CONVERT_RECORD=1 records them anew."""
    rules = record.recorded({name: made(source, None) for name, source in FAMILIES.items()})
    if os.environ.get("FP8_CONVERT_RECORD"):
        RECORDED.write_text(record.text(rules) + "\n")
    assert json.loads(RECORDED.read_text()) == rules
