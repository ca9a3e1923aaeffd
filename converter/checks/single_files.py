"""What ComfyUI relies on in a file: that its header states every FP8 layer, and how it is multiplied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..format.untrusted import parse_json
from ..snapshot.foreign_config import COMFY_METADATA
from ..snapshot.fp8 import Fp8Component
from ..snapshot.snapshot import Component
from ..targets.comfyui import layer_entry
from ..targets.key_maps import key_map
from .finding import Finding


def check_statement(component: Component, fp8: Fp8Component) -> Iterator[Finding]:
    """Whether the header's statement for ComfyUI names exactly the FP8 layers, and right."""
    for shard in component.shards:
        text = shard.header.metadata.get(COMFY_METADATA)
        if text is None:
            if fp8.stated:
                yield Finding(shard.path, f"has no {COMFY_METADATA}, so ComfyUI would take codes for weights")
            continue
        try:
            stated = dict(parse_json(text.encode())["layers"])
        except (ValueError, KeyError, TypeError):
            yield Finding(shard.path, f"has a damaged {COMFY_METADATA}")
            continue
        expected = {name: layer_entry(how) for name, how in fp8.stated.items()}
        differing = [name for name in sorted({*expected, *stated}) if stated.get(name) != expected.get(name)]
        if differing:
            more = f" and of {len(differing) - 1} others" if len(differing) > 1 else ""
            yield Finding(shard.path, f"{COMFY_METADATA} is not right of {differing[0]}{more}")


def original_groups(component: Component, groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """Modules that share a scale, as the record names them, under the names in the file."""
    names = key_map(component.class_name, component.config)
    if names is None:
        return []
    return [sorted({names.original_module(module) for module in group}) for group in groups]
