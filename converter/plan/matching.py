"""What each entry of a manifest matches in a snapshot: tables, classes, patterns, fusion groups.

Patterns are held against every checkpoint name whose module the component's class knows, whatever its kind, and
whatever other pattern comes first. A table that serves several components is held against all of them together.
An entry that matches nothing is a mistake of the manifest, unless it or the whole manifest is optional.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..snapshot.modules import ModuleMap
from ..snapshot.snapshot import Component, Snapshot
from ..telling.errors import ConvertError
from .manifest import SECTIONS, ComponentRules, FusionGroup, Manifest
from .pattern import closest, matches

_EXAMPLES = 3


@dataclass(frozen=True)
class Match:
    """One entry of a manifest's table and what it matches: `count` modules, or components for a table or class.

    section: "" for the table itself, else the table's key. place: the entry as errors name it. problem: why what it
    matches is wrong, None if it is not, or if the entry is optional.
    """

    table: str
    section: str
    place: str
    entry: str
    count: int
    examples: tuple[str, ...]
    optional: bool
    problem: str | None = None


def refuse_problems(manifest: Manifest, found: Iterable[Match]) -> None:
    """Raise ConvertError for the first entry with a problem."""
    problems = [match for match in found if match.problem]
    if not problems:
        return
    more = f" ({len(problems) - 1} more: run `fp8-convert manifests check`)" if len(problems) > 1 else ""
    if manifest.path is None:
        advice = f"pass --manifest default, or a corrected copy of `fp8-convert manifests show {manifest.name}`"
    else:
        advice = "correct it, or give it optional = true if it need not match"
    raise ConvertError(f"{problems[0].place}: {problems[0].problem}{more}; {advice}.")


def components_of(manifest: Manifest, table: ComponentRules, snapshot: Snapshot) -> list[Component]:
    """The snapshot's components that the table's rules apply to."""
    return [c for c in snapshot.components if manifest.rules_for(c.name, c.class_name) is table]


def match_tables(manifest: Manifest, snapshot: Snapshot) -> list[Match]:
    """The components that each table applies to, and those of each class that it names.

    Where the source is a single component the other tables have nothing to apply to. Raises ConvertError if none of
    them has.
    """
    alone = snapshot.pipeline is None
    found = []
    for table in manifest.components:
        place = f"{manifest.where}, components.{table.component}"
        applied = components_of(manifest, table, snapshot)
        optional = table.optional or manifest.optional
        problem = None if applied or optional or alone else _unapplied(manifest, table, snapshot)
        names = tuple(c.label for c in applied)
        found.append(Match(table.component, "", place, table.component, len(applied), names, optional, problem))
        for class_name in table.classes:
            of_class = tuple(c.label for c in applied if c.class_name == class_name)
            found.append(
                Match(table.component, "classes", f"{place}, classes", class_name, len(of_class), of_class, True)
            )
    if alone and manifest.components and not any(m.count for m in found):
        component = snapshot.components[0]
        known = sorted({name for table in manifest.components for name in table.classes})
        hint = f"it is written for {', '.join(known)}" if known else "none of its tables fits"
        raise ConvertError(
            f"The manifest {manifest.where} has no rules for {component.label}: {hint}; pass another --manifest."
        )
    return found


def why_unmatched(component: Component, modules: ModuleMap) -> str | None:
    """Why nothing can be said of what patterns match in the component, None if something can."""
    if modules.problem or modules.kinds:
        return modules.problem
    return f"none of its weights is named like a module of {component.class_name}"


def match_entries(
    manifest: Manifest,
    table: ComponentRules,
    components: Sequence[Component],
    maps: Sequence[ModuleMap],
) -> list[Match]:
    """What the table's patterns and fusion groups match in the components that it applies to.

    maps: the modules of each, none of them `why_unmatched`.
    """
    label = " or ".join(c.label for c in components)
    names = list(dict.fromkeys(name for modules in maps for name in modules.kinds))
    found = []
    for section in SECTIONS:
        for number, rule in enumerate(table.rules(section)):
            hits = [name for name in names if matches(rule.pattern, name)]
            problem = None
            if not hits:
                problem = f"the pattern {rule.pattern!r} matches no module of {label}{_hint(rule.pattern, names)}"
            elif section == "storage_layers" and not any(table.rule_for(table.ignored_layers, hit) for hit in hits):
                problem = f"the pattern {rule.pattern!r} matches no module that ignored_layers names, and stores none"
            found.append(
                _entry(manifest, table, section, f"{section}[{number}]", rule.pattern, hits, rule.optional, problem)
            )
    for number, group in enumerate(table.fusion_groups):
        hits = _members(group, names)
        problem = _group_problem(group, names, label)
        entry = f"{group.parent}.({'|'.join(group.members)})"
        where = f"fusion_groups[{number}]"
        found.append(_entry(manifest, table, "fusion_groups", where, entry, hits, group.optional, problem))
    return found


def _entry(
    manifest: Manifest,
    table: ComponentRules,
    section: str,
    place: str,
    entry: str,
    hits: Sequence[str],
    optional: bool,
    problem: str | None,
) -> Match:
    optional = optional or manifest.optional
    return Match(
        table=table.component,
        section=section,
        place=f"{manifest.where}, components.{table.component}, {place}",
        entry=entry,
        count=len(hits),
        examples=tuple(hits[:_EXAMPLES]),
        optional=optional,
        problem=None if optional else problem,
    )


def _unapplied(manifest: Manifest, table: ComponentRules, snapshot: Snapshot) -> str:
    """Why a table applies to no component."""
    names = [c.name for c in snapshot.components]
    named = [c for c in snapshot.components if fnmatch.fnmatchcase(c.name, table.component)]
    if not named:
        near = difflib.get_close_matches(table.component.strip("*"), names, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{snapshot.label} has no such component with weights; it has {', '.join(names)}{hint}"
    first = named[0]
    if table.classes and not any(c.class_name in table.classes for c in named):
        near = difflib.get_close_matches(first.class_name or "", table.classes, n=1, cutoff=0.9)
        hint = f" (did you mean {first.class_name} instead of {near[0]}?)" if near else ""
        return f"it is for the class {' or '.join(table.classes)}, and {first.name} is {first.class_name}{hint}"
    other = manifest.rules_for(first.name, first.class_name)
    assert other is not None  # the table fits itself, so that only an earlier one can have been taken
    return f"components.{other.component} comes first for {first.name}, so that this table never applies"


def _members(group: FusionGroup, names: Iterable[str]) -> list[str]:
    """The modules that belong to the group somewhere."""
    split = ((name, *name.rpartition(".")[::2]) for name in names)
    return [name for name, parent, last in split if last in group.members and matches(group.parent, parent)]


def _group_problem(group: FusionGroup, names: Sequence[str], label: str) -> str | None:
    """Why the group's parent or one of its members is nowhere, None if all are somewhere."""
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name))
    fitting = {parent for parent in parents if matches(group.parent, parent)}
    if not fitting:
        return f"the parent {group.parent!r} matches no module of {label}{_hint(group.parent, parents)}"
    children = sorted({name.rpartition(".")[2] for name in names if name.rpartition(".")[0] in fitting})
    for member in group.members:
        if member not in children:
            near = difflib.get_close_matches(member, children, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(children[:8])}"
            return f"no module of {label} that the parent {group.parent!r} matches has the member {member!r} ({hint})"
    return None


def _hint(pattern: str, names: Iterable[str]) -> str:
    near = closest(pattern, names)
    return f" (did you mean {', '.join(near)}?)" if near else ""
