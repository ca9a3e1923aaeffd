"""What is ranked, and kept or not, as one: layers with their fusion group, blocks, or all layers of a name pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...converter.format.layout import STORAGE
from ...converter.plan.pattern import matches
from .original import Layer

By = Literal["layer", "block", "pattern"]


@dataclass(frozen=True)
class Unit:
    """Layers of one component. pattern: matches them, and no other FP8 layer of the component."""

    component: str
    name: str
    pattern: str
    layers: tuple[Layer, ...]

    @property
    def label(self) -> str:
        return f"{self.component}.{self.name}"

    @property
    def cost(self) -> int:
        """Bytes that keeping the layers in their source's dtype takes more than FP8 does."""
        return sum(layer.tensor.info.nbytes - layer.tensor.bytes_after for layer in self.layers)

    @property
    def stored(self) -> bool:
        """Whether its layers are in FP8 storage rather than W8A8."""
        return all(layer.format.mode == STORAGE for layer in self.layers)


def units(layers: Sequence[Layer], by: By) -> list[Unit]:
    """All layers, in the order in which the first of each unit comes.

    A fusion group is never divided, and layers in FP8 storage are never in a unit with W8A8 ones.
    """
    name_of: Mapping[By, Callable[[str], str]] = {"layer": str, "block": _block, "pattern": _starred}
    parts: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in layers:
        component, domain = layer.domain
        parts.setdefault((component, name_of[by](domain), layer.format.mode), []).append(layer)
    found = []
    for (component, name, mode), members in parts.items():
        others = [other.name for other in layers if other.component == component and other not in members]
        pattern = _pattern(name, [member.name for member in members], others)
        name += " (stored)" if by != "layer" and mode == STORAGE else ""
        found.append(Unit(component, name, pattern, tuple(members)))
    return found


def _block(domain: str) -> str:
    """`layers.3` of `layers.3.attention.to_out.0`; a layer outside of numbered blocks is one of its own."""
    found = re.match(r"(.*?\.\d+)\.", domain)
    return found[1] if found else domain


def _starred(domain: str) -> str:
    """`layers.*.attention.to_out.0` of `layers.3.attention.to_out.0`."""
    return re.sub(r"\.\d+\.", ".*.", domain, count=1)


def _pattern(name: str, members: Sequence[str], others: Iterable[str]) -> str:
    """The unit's name as a pattern, if it matches its members alone; else one that spells them out."""
    others = [*others]
    stars = ".*.".join(re.escape(part) for part in re.sub(r"\.\((.*)\)$", "", name).split(".*."))
    fused = re.search(r"\.\((.*)\)$", name)
    expression = "re:" + stars.replace(".*.", r"\.\d+\.") + (rf"\.(?:{fused[1]})" if fused else "")
    for pattern in (name, expression):
        if fused and pattern is name:
            continue
        if all(matches(pattern, m) for m in members) and not any(matches(pattern, o) for o in others):
            return pattern
    return "re:" + "|".join(re.escape(member) for member in members)
