"""What `--merge-lora` takes: paths with any colon or equals sign in them are never misread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp8_convert.converter import SettingsError
from fp8_convert.converter.plan.lora_request import LoraRequest
from fp8_convert.converter.plan.settings import Settings

READ: dict[Any, tuple[str, float, str | None]] = {
    "a.safetensors": ("a.safetensors", 1.0, None),
    "a.safetensors:0.8": ("a.safetensors", 0.8, None),
    "a.safetensors:-1": ("a.safetensors", -1.0, None),
    "a.safetensors:1e-1": ("a.safetensors", 0.1, None),
    "transformer_2=low noise.safetensors:0.9": ("low noise.safetensors", 0.9, "transformer_2"),
    r"C:\loras\a.safetensors": (r"C:\loras\a.safetensors", 1.0, None),
    r"C:\loras\a.safetensors:0.5": (r"C:\loras\a.safetensors", 0.5, None),
    "v:0.8.safetensors": ("v:0.8.safetensors", 1.0, None),
    "a:1/b.safetensors:2": ("a:1/b.safetensors", 2.0, None),
    "./a=b.safetensors": ("./a=b.safetensors", 1.0, None),
    "transformer=a=b.safetensors": ("a=b.safetensors", 1.0, "transformer"),
    "a.safetensors.d/b.safetensors:3": ("a.safetensors.d/b.safetensors", 3.0, None),
    Path("x=a.safetensors"): ("x=a.safetensors", 1.0, None),
    ("a.safetensors", 0.25): ("a.safetensors", 0.25, None),
    ("transformer=a.safetensors", 2): ("a.safetensors", 2.0, "transformer"),
    (Path("b:0.5.safetensors"), 2): ("b:0.5.safetensors", 2.0, None),
}


@pytest.mark.parametrize("stated", READ, ids=str)
def test_what_is_read(stated: Any) -> None:
    path, scale, component = READ[stated]
    settings = Settings.read({"merge_lora": [list(stated) if isinstance(stated, tuple) else stated]})
    assert settings.merge_lora == (LoraRequest(Path(path), scale, component),)


@pytest.mark.parametrize(
    "stated",
    [
        "a.safetensors",  # no list
        [""],
        ["a.pt"],
        ["a.safetensors:"],
        ["a.safetensors:x"],
        ["a.safetensors:nan"],
        ["a.safetensors:inf"],
        ["a.safetensors:0"],
        ["a.safetensors:1:2"],
        [Path("a.bin")],
        [Path("a.safetensors:0.5")],  # a path is what it says
        [("a.safetensors:0.5", 2.0)],
        [("a.safetensors", "2")],
        [("a.safetensors", True)],
        [("a.safetensors",)],
        [3],
        [b"a.safetensors"],
    ],
    ids=str,
)
def test_what_means_nothing(stated: Any) -> None:
    with pytest.raises(SettingsError, match=r"merge_lora is .*; use a list such as \['style.safetensors:0.8'\]"):
        Settings.read({"merge_lora": stated})


def test_none_is_none() -> None:
    assert Settings.read({"merge_lora": None}).merge_lora == Settings.read({}).merge_lora == ()
