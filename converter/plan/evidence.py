"""What a manifest's lines of evidence rest on, summed up: the sources that they name, and how many name none.

A line names its source as manifests/README.md says: `repo#number`, a document, a source file, an attribute of the
class, or `fp8-convert sensitivity`, which measured it; "our reasoning" and "our choice" mean that nothing was measured.
A line that says "as …" rests on another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..telling.quantities import plural
from .manifest import SECTIONS, ComponentRules, Manifest

# In "vllm-omni#1414 and #3998" the second number is the first one's repository.
_NUMBERS = re.compile(r"([\w.-]+(?:/[\w.-]+)?)?#(\d+)")
_NAMED = re.compile(
    r"\b(?:[\w-]+/)*\w+\.(?:md|py)\b|\b_keep_in_fp32_modules\b|\b_skip_layerwise_casting_patterns\b"
    r"|\bfp8-convert sensitivity\b"
)
_OURS = re.compile(r"our (?:reasoning|choice)")


@dataclass(frozen=True)
class Evidence:
    """lines: all of the manifest's. sources: those that they name, by how often. ours: lines of our own reasoning."""

    lines: int
    sources: tuple[str, ...]
    ours: int

    def __str__(self) -> str:
        named = ", ".join(self.sources) or "no source"
        return f"{plural(self.lines, 'line')}: {named}; {self.ours} of our own reasoning"


def evidence(manifest: Manifest) -> Evidence:
    """Sum up every `why` of the manifest."""
    lines = [why for table in manifest.components for why in (table.why, *_whys(table)) if why]
    counts: dict[str, int] = {}
    for line in lines:
        for source in _sources(line):
            counts[source] = counts.get(source, 0) + 1
    ordered = sorted(counts, key=lambda source: (-counts[source], source))
    return Evidence(len(lines), tuple(ordered), sum(1 for line in lines if _OURS.search(line)))


def _whys(table: ComponentRules) -> list[str]:
    rules = [rule.why for section in SECTIONS for rule in table.rules(section)]
    return rules + [group.why for group in table.fusion_groups]


def _sources(line: str) -> set[str]:
    found, repository = set(_NAMED.findall(line)), ""
    for match in _NUMBERS.finditer(line):
        repository = match[1] or repository
        found.add(f"{repository}#{match[2]}")
    return found
