"""Manifests of one's own for tests: the shortest that is valid, to be changed by what a test is about."""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path

from fp8_convert.converter.plan.manifest import shipped


def table(component: str, mode: str, pattern: str) -> str:
    """One component whose linears become FP8 where `pattern` matches."""
    return f"""
[components.{component}]
mode = "{mode}"
kinds = ["Linear"]
[[components.{component}.eligible]]
pattern = "{pattern}"
why = "a test"
"""


def text(pattern: str = "layers.*", name: str = "own") -> str:
    """A manifest of the DiT alone, in W8A8."""
    return f'\nname = "{name}"' + table("transformer", "w8a8", pattern)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fp8-convert-manifests-")


@functools.cache
def with_scales_of_rows(name: str) -> str:
    """The path of a shipped manifest whose linears get a scale for each row, in either mode."""
    text = re.sub(r"^weight_block_size = .*\n", "", shipped()[name].text, flags=re.MULTILINE)
    text = re.sub(r'^(mode = "(?:w8a8|storage)")$', r'\1\nweight_scales = "channel"', text, flags=re.MULTILINE)
    path = Path(_folder().name) / f"{name}-rows.toml"
    path.write_text(text.replace(f'name = "{name}"', f'name = "{path.stem}"', 1))
    return str(path)
