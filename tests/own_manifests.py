"""Manifests of one's own for tests: the shortest that is valid, to be changed by what a test is about."""

from __future__ import annotations


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
