"""`manifests check`: what each entry of a manifest matches in a snapshot, from headers alone."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from ..snapshot.access import HubAccess
from ..snapshot.locate import describe_source, open_files
from ..snapshot.modules import module_map
from .manifest import load_manifest
from .matching import Match, components_of, match_entries, match_tables, why_unmatched


@dataclass(frozen=True)
class ManifestCheck:
    """A manifest held against a snapshot.

    `unchecked` says of components, by name, why nothing is known of what the manifest matches in them.
    `unnamed` are the components that no table names; they are kept.
    """

    manifest: str
    source: str
    matches: tuple[Match, ...]
    unchecked: dict[str, str]
    unnamed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether a conversion would take the manifest, and everything could be checked."""
        return not self.unchecked and not any(match.problem for match in self.matches)

    def to_json(self) -> dict[str, Any]:
        """The same for scripts."""
        return {"ok": self.ok, **asdict(self)}


def check_manifest(manifest: str, source: str | os.PathLike[str], *, options: HubAccess | None = None) -> ManifestCheck:
    """Hold a manifest (a shipped one's name, or a path) against a snapshot, from headers alone.

    source: a folder (a pipeline, or one component) or a Hub repo id. Raises ConvertError for a manifest or a source
    that cannot be read; what matches nothing is in the answer.
    """
    rules = load_manifest(manifest)
    options = options or HubAccess()
    snapshot = describe_source(open_files(source, options), options)
    found = match_tables(rules, snapshot)
    unchecked: dict[str, str] = {}
    for table in rules.components:
        components = components_of(rules, table, snapshot)
        if not components or table.mode == "keep":
            continue
        maps = [module_map(component) for component in components]
        problems = {c.label: why for c, m in zip(components, maps, strict=True) if (why := why_unmatched(c, m))}
        unchecked |= problems
        if not problems:
            found += match_entries(rules, table, components, maps)
    order = [table.component for table in rules.components]
    found.sort(key=lambda match: order.index(match.table))  # stable: a table, its classes, its patterns
    unnamed = [c.label for c in snapshot.components if rules.rules_for(c.name, c.class_name) is None]
    return ManifestCheck(rules.where, snapshot.label, tuple(found), unchecked, tuple(unnamed))
