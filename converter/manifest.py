"""Manifests: strict TOML in, frozen rules out. manifests/README.md documents the schema.

A manifest says, per component, in which mode its weights become FP8, which names are eligible and which are not,
with one line of evidence for each pattern. Unknown keys are errors.
"""

from __future__ import annotations

import fnmatch
import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import ConvertError
from .notebook import Brief
from .pattern import matches

MODES = ("w8a8", "storage", "keep")
KINDS = ("Linear", "Conv2d", "Conv3d")
UNALIGNED = ("pad", "keep")
DEFAULT = "default"


@dataclass(frozen=True, repr=False)
class Rule(Brief):
    """A pattern over module names and why it is there."""

    pattern: str
    why: str


@dataclass(frozen=True, repr=False)
class FusionGroup(Brief):
    """Members of one parent module that share one scale, because runtimes fuse them into one matrix."""

    parent: str
    members: tuple[str, ...]
    aliases: tuple[str, ...]
    why: str


@dataclass(frozen=True, repr=False)
class ComponentRules(Brief):
    """What a manifest says of one component (or of all that match `component`, an fnmatch pattern)."""

    component: str
    mode: str
    why: str = ""
    classes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    weight_block_size: tuple[int, int] | None = None
    unaligned: str = "pad"
    eligible: tuple[Rule, ...] = ()
    never_layers: tuple[Rule, ...] = ()
    ignored_layers: tuple[Rule, ...] = ()
    storage_layers: tuple[Rule, ...] = ()
    fusion_groups: tuple[FusionGroup, ...] = ()

    def rule_for(self, rules: tuple[Rule, ...], module: str) -> Rule | None:
        """The first of `rules` that matches the module name."""
        return next((rule for rule in rules if matches(rule.pattern, module)), None)


@dataclass(frozen=True, repr=False)
class Manifest(Brief):
    """A parsed manifest; `sha256` is that of its file."""

    name: str
    description: str
    sha256: str
    components: tuple[ComponentRules, ...]
    repos: tuple[str, ...] = ()
    pipelines: tuple[str, ...] = ()
    standalone_classes: tuple[str, ...] = field(default=())

    def rules_for(self, component: str, class_name: str | None) -> ComponentRules | None:
        """The rules for a component, by its folder's name, or by its class where it stands alone (name "")."""
        for rules in self.components:
            if rules.classes and class_name not in rules.classes:
                continue
            if fnmatch.fnmatchcase(component, rules.component) or (component == "" and rules.classes):
                return rules
        if component == "" and class_name is not None:  # a lone folder under a manifest that names no classes
            guess = "text_encoder" if "Transformer" not in class_name else "transformer"
            return next((r for r in self.components if fnmatch.fnmatchcase(guess, r.component)), None)
        return None


def shipped() -> dict[str, Manifest]:
    """Every manifest that comes with the package, by name."""
    folder = resources.files("fp8_convert.manifests")
    texts = {e.name: e.read_bytes() for e in folder.iterdir() if e.name.endswith(".toml")}
    manifests = [parse_manifest(text, name) for name, text in texts.items()]
    return {m.name: m for m in sorted(manifests, key=lambda m: m.name)}


def load_manifest(name_or_path: str) -> Manifest:
    """A shipped manifest by name, or one of the user's by path. Raises ConvertError."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        try:
            return parse_manifest(path.read_bytes(), str(path))
        except OSError as error:
            raise ConvertError(f"The manifest {path} cannot be read ({error.strerror}); check the path.") from error
    manifests = shipped()
    if name_or_path not in manifests:
        raise ConvertError(
            f"There is no manifest named {name_or_path!r}; use one of {', '.join(manifests)} or a path to a .toml file."
        )
    return manifests[name_or_path]


def choose_manifest(repo: str | None, pipeline: str | None, classes: Mapping[str, str | None]) -> Manifest:
    """The shipped manifest for a snapshot: by Hub id, else by pipeline and component class names, else `default`.

    `classes` maps component names to class names; a component that stands alone has the name "".
    """
    manifests = shipped()
    for manifest in manifests.values():
        if repo is not None and repo.lower() in (r.lower() for r in manifest.repos):
            return manifest
    for manifest in manifests.values():
        if pipeline is not None and pipeline in manifest.pipelines and _classes_fit(manifest, classes):
            return manifest
        if pipeline is None and classes.get("") in manifest.standalone_classes:
            return manifest
    return manifests[DEFAULT]


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Parse and check a manifest's TOML; `where` names it in errors."""
    try:
        data = tomllib.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"The manifest {where} is not valid TOML ({error}); correct it.") from error
    table = _Table(data, where)
    manifest = Manifest(
        name=table.text("name"),
        description=table.text("description", ""),
        sha256=hashlib.sha256(text).hexdigest(),
        components=tuple(_component(name, t) for name, t in table.tables("components").items()),
        repos=table.texts("repos"),
        pipelines=table.texts("pipelines"),
        standalone_classes=table.texts("standalone_classes"),
    )
    table.done()
    return manifest


def _component(name: str, table: _Table) -> ComponentRules:
    rules = ComponentRules(
        component=name,
        mode=table.choice("mode", MODES),
        why=table.text("why", ""),
        classes=table.texts("classes"),
        kinds=table.texts("kinds", KINDS),
        weight_block_size=table.block("weight_block_size"),
        unaligned=table.choice("unaligned", UNALIGNED, "pad"),
        eligible=_rules(table, "eligible"),
        never_layers=_rules(table, "never_layers"),
        ignored_layers=_rules(table, "ignored_layers"),
        storage_layers=_rules(table, "storage_layers"),
        fusion_groups=tuple(_fusion_group(t) for t in table.array("fusion_groups")),
    )
    table.done()
    if rules.mode != "keep" and not (rules.kinds and rules.eligible):
        raise ConvertError(f"{table.where}: mode {rules.mode!r} needs kinds and eligible patterns; add them.")
    return rules


def _rules(table: _Table, key: str) -> tuple[Rule, ...]:
    rules = []
    for entry in table.array(key):
        rule = Rule(entry.text("pattern"), entry.text("why"))
        entry.done()
        matches(rule.pattern, "")  # a malformed pattern is an error of the manifest, found now
        rules.append(rule)
    return tuple(rules)


def _fusion_group(table: _Table) -> FusionGroup:
    group = FusionGroup(table.text("parent"), table.texts("members"), table.texts("aliases"), table.text("why"))
    table.done()
    if len(group.members) < 2:
        raise ConvertError(f"{table.where}: a fusion group needs at least two members; add them.")
    matches(group.parent, "")
    return group


class _Table:
    """A TOML table that hands out typed values and objects to keys nobody asked for."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise ConvertError(f"{where} must be a table; see manifests/README.md.")
        self._data = dict(data)
        self._known: list[str] = []
        self.where = where

    def _take(self, key: str, default: Any = None) -> Any:
        self._known.append(key)
        return self._data.pop(key, default)

    def _wrong(self, key: str, need: str) -> ConvertError:
        return ConvertError(f"{self.where}: {key!r} must be {need}; correct it.")

    def text(self, key: str, default: str | None = None) -> str:
        value = self._take(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not (value or default == ""):
            raise self._wrong(key, "a text")
        return value

    def texts(self, key: str, allowed: tuple[str, ...] | None = None) -> tuple[str, ...]:
        value = self._take(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(key, "a list of texts")
        if allowed is not None and not set(value) <= set(allowed):
            raise self._wrong(key, f"a list out of {', '.join(allowed)}")
        return tuple(value)

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = self._take(key)
        value = default if value is None else value
        if value not in allowed:
            raise self._wrong(key, f"one of {', '.join(allowed)}")
        return str(value)

    def block(self, key: str) -> tuple[int, int] | None:
        value = self._take(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
            raise self._wrong(key, "two positive integers")
        return value[0], value[1]

    def array(self, key: str) -> list[_Table]:
        value = self._take(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, "an array of tables")
        return [_Table(v, f"{self.where}, {key}[{i}]") for i, v in enumerate(value)]

    def tables(self, key: str) -> dict[str, _Table]:
        value = self._take(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, "a table")
        return {k: _Table(v, f"{self.where}, {key}.{k}") for k, v in value.items()}

    def done(self) -> None:
        if self._data:
            raise ConvertError(
                f"{self.where}: unknown key {next(iter(self._data))!r}; known keys are {', '.join(self._known)}."
            )


def _classes_fit(manifest: Manifest, classes: Mapping[str, str | None]) -> bool:
    """Whether every component that the manifest writes rules for is of a class that they are written for."""
    return all(
        not rules.classes or class_name in rules.classes
        for rules in manifest.components
        for name, class_name in classes.items()
        if fnmatch.fnmatchcase(name, rules.component)
    )
