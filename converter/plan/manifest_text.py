"""A manifest as TOML that reads back as the same rules, and a copy of one with more layers kept.

Comments of the text that a manifest was read from are not in it; the evidence of its patterns is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..format.layout import Block
from .manifest import SECTIONS, ComponentRules, FusionGroup, Manifest, Rule, parse_manifest


@dataclass(frozen=True)
class Changes:
    """What a copy says otherwise of one component: rules that come after its own, and its block size if not None."""

    ignored_layers: tuple[Rule, ...] = ()
    storage_layers: tuple[Rule, ...] = ()
    weight_block_size: Block | None = None


def changed(
    manifest: Manifest, name: str, description: str, changes: Mapping[str, Changes], classes: Mapping[str, str | None]
) -> Manifest:
    """A copy under another name. changes: by component. classes: of the components, by which each has its table.

    A table that serves several components is divided where they change differently; what it says may then match in one
    of them alone, so that its entries become optional.
    """
    tables: list[ComponentRules] = []
    for table in manifest.components:
        served = {c: change for c, change in changes.items() if manifest.rules_for(c, classes[c]) is table}
        if len(set(served.values())) > 1:
            tables += [_with(_optional(replace(table, component=c)), change) for c, change in served.items()]
            tables.append(_optional(table))
        else:
            tables.append(_with(table, next(iter(served.values()), Changes())))
    copy = replace(manifest, name=name, description=description, components=tuple(tables), path=None)
    return parse_manifest(to_toml(copy).encode(), f"{name}.toml")


def _with(table: ComponentRules, change: Changes) -> ComponentRules:
    block = change.weight_block_size
    if block is not None:
        table = replace(table, weight_block_size=block, weight_scales=ComponentRules.weight_scales)
    return replace(
        table,
        ignored_layers=(*table.ignored_layers, *change.ignored_layers),
        storage_layers=(*table.storage_layers, *change.storage_layers),
    )


def _optional(table: ComponentRules) -> ComponentRules:
    sections: dict[str, Any] = {s: tuple(replace(r, optional=True) for r in table.rules(s)) for s in SECTIONS}
    groups = tuple(replace(group, optional=True) for group in table.fusion_groups)
    return replace(table, **sections, fusion_groups=groups, optional=True)


def to_toml(manifest: Manifest) -> str:
    """The manifest's rules as TOML."""
    lines = [*_entries(manifest, ("name", "description", "optional", "repos", "pipelines", "standalone_classes"))]
    for table in manifest.components:
        here = f"components.{_key(table.component)}"
        own = [f.name for f in fields(ComponentRules) if f.name not in ("component", *SECTIONS, "fusion_groups")]
        lines += ["", f"[{here}]", *_entries(table, own)]
        for section in (*SECTIONS, "fusion_groups"):
            rules: Sequence[Rule | FusionGroup] = getattr(table, section)
            for rule in rules:
                lines += ["", f"[[{here}.{section}]]", *_entries(rule, [f.name for f in fields(rule)])]
    return "\n".join(lines) + "\n"


def _entries(values: Any, names: Sequence[str]) -> list[str]:
    """A line for each field that is not as it is read where it is left out."""
    defaults = {f.name: f.default for f in fields(values)}
    found = ((name, getattr(values, name)) for name in names)
    return [f"{name} = {_value(value)}" for name, value in found if value != defaults[name]]


def _value(value: str | bool | Sequence[Any]) -> str:
    if isinstance(value, bool):
        return "true"
    if isinstance(value, str):
        return _quoted(value)
    return f"[{', '.join(_quoted(v) if isinstance(v, str) else str(v) for v in value)}]"


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's, whose escapes are all TOML's, but for the delete character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)
