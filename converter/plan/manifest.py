"""Manifests: strict TOML in, frozen rules out. manifests/README.md documents the schema.

A manifest says, per component, in which mode its weights become FP8, which names are eligible and which are not,
with one line of evidence for each pattern. Unknown keys are errors, and so is (`matching.py`) an entry that matches
nothing in the snapshot, unless it says `optional = true`.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from ..format.layout import SCHEME_CHANNEL, SCHEME_TENSOR, W8A8
from ..format.untrusted import check_text
from ..telling.errors import ConvertError
from ..telling.notebook import Brief
from .pattern import matches

MODES = ("w8a8", "storage", "keep")
KINDS = ("Linear", "Conv2d", "Conv3d")
UNALIGNED = ("pad", "keep")
WEIGHT_SCALES = (SCHEME_TENSOR, SCHEME_CHANNEL)
DEFAULT = "default"
SECTIONS = ("eligible", "never_layers", "ignored_layers", "storage_layers")  # lists of patterns
_SHOWN = 60  # characters of a wrong value that an error repeats


@dataclass(frozen=True, repr=False)
class Rule(Brief):
    """A pattern over module names and why it is there; an `optional` one may match nothing."""

    pattern: str
    why: str
    optional: bool = False


@dataclass(frozen=True, repr=False)
class FusionGroup(Brief):
    """Members of one parent module that share one scale, because runtimes fuse them into one matrix.

    An `optional` group may exist nowhere.
    """

    parent: str
    members: tuple[str, ...]
    aliases: tuple[str, ...]
    why: str
    optional: bool = False


@dataclass(frozen=True, repr=False)
class ComponentRules(Brief):
    """What a manifest says of one component (or of all that match `component`, an fnmatch pattern).

    An `optional` one may apply to no component of a snapshot.
    """

    component: str
    mode: str
    why: str = ""
    classes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    weight_block_size: tuple[int, int] | None = None
    weight_scales: str = SCHEME_TENSOR
    unaligned: str = "pad"
    eligible: tuple[Rule, ...] = ()
    never_layers: tuple[Rule, ...] = ()
    ignored_layers: tuple[Rule, ...] = ()
    storage_layers: tuple[Rule, ...] = ()
    fusion_groups: tuple[FusionGroup, ...] = ()
    optional: bool = False

    @property
    def runs_in_fp8(self) -> bool:
        """Whether its linears run in FP8: then the options for the DiT, such as --ignored-layers, apply to it."""
        return self.mode == W8A8

    def rules(self, section: str) -> tuple[Rule, ...]:
        """The patterns of one of SECTIONS."""
        patterns: tuple[Rule, ...] = getattr(self, section)
        return patterns

    def rule_for(self, rules: tuple[Rule, ...], module: str) -> Rule | None:
        """The first of `rules` that matches the module name."""
        return next((rule for rule in rules if matches(rule.pattern, module)), None)


@dataclass(frozen=True, repr=False)
class Manifest(Brief):
    """A parsed manifest; `text` is its file and `sha256` the digest of that. `path` is None for a shipped one.

    `optional`: it is written for no single model, and each of its entries may match nothing.
    """

    name: str
    description: str
    sha256: str
    components: tuple[ComponentRules, ...]
    repos: tuple[str, ...] = ()
    pipelines: tuple[str, ...] = ()
    standalone_classes: tuple[str, ...] = ()
    optional: bool = False
    text: str = field(default="", repr=False, compare=False)
    path: str | None = field(default=None, compare=False)

    @property
    def where(self) -> str:
        """How errors name the manifest's file."""
        return self.path or f"{self.name}.toml"

    def rules_for(self, component: str, class_name: str | None) -> ComponentRules | None:
        """The rules for a component, by its folder's name, or by its class where it stands alone (name "")."""
        for rules in self.components:
            if rules.classes and class_name not in rules.classes:
                continue
            if fnmatch.fnmatchcase(component, rules.component) or (component == "" and rules.classes):
                return rules
        if component == "" and class_name is not None:  # a lone folder under tables that name no classes
            guess = "text_encoder" if "Transformer" not in class_name else "transformer"
            open_to_all = (rules for rules in self.components if not rules.classes)
            return next((r for r in open_to_all if fnmatch.fnmatchcase(guess, r.component)), None)
        return None

    def to_json(self) -> dict[str, Any]:
        """The rules for scripts, in the order in which they apply."""
        values = asdict(self)
        return {k: v for k, v in values.items() if k not in ("text", "path")}


def shipped() -> dict[str, Manifest]:
    """Every manifest that comes with the package, by name."""
    folder = resources.files("fp8_convert.manifests")
    texts = {e.name: e.read_bytes() for e in folder.iterdir() if e.name.endswith(".toml")}
    manifests = [parse_manifest(text, name) for name, text in texts.items()]
    return {m.name: m for m in sorted(manifests, key=lambda m: m.name)}


def load_manifest(name_or_path: str) -> Manifest:
    """A shipped manifest by name, or one of the user's by path. Raises ConvertError."""
    check_text(name_or_path, "The manifest")
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ConvertError(f"The manifest {path} cannot be read ({error.strerror}); check the path.") from error
        manifest = replace(parse_manifest(text, str(path)), path=str(path))
        if manifest.name != path.stem:
            raise ConvertError(
                f"{path}: 'name' must be {_shown(path.stem)}, as the file is called, not {_shown(manifest.name)}; "
                "correct it or rename the file."
            )
        return manifest
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
        decoded = text.decode("utf-8")
        data = tomllib.loads(decoded)
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
        optional=table.flag("optional"),
        text=decoded,
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
        weight_scales=table.choice("weight_scales", WEIGHT_SCALES, SCHEME_TENSOR),
        unaligned=table.choice("unaligned", UNALIGNED, "pad"),
        eligible=_rules(table, "eligible"),
        never_layers=_rules(table, "never_layers"),
        ignored_layers=_rules(table, "ignored_layers"),
        storage_layers=_rules(table, "storage_layers"),
        fusion_groups=tuple(_fusion_group(t) for t in table.array("fusion_groups")),
        optional=table.flag("optional"),
    )
    table.done()
    if rules.mode != "keep" and not (rules.kinds and rules.eligible):
        raise ConvertError(f"{table.where}: mode {rules.mode!r} needs kinds and eligible patterns; add them.")
    if rules.weight_block_size and rules.weight_scales != SCHEME_TENSOR:
        raise ConvertError(f"{table.where}: 'weight_scales' and 'weight_block_size' exclude each other; drop one.")
    return rules


def _rules(table: _Table, key: str) -> tuple[Rule, ...]:
    rules = []
    for entry in table.array(key):
        rules.append(Rule(entry.pattern("pattern"), entry.text("why"), entry.flag("optional")))
        entry.done()
    return tuple(rules)


def _fusion_group(table: _Table) -> FusionGroup:
    group = FusionGroup(
        parent=table.pattern("parent"),
        members=table.texts("members"),
        aliases=table.texts("aliases"),
        why=table.text("why"),
        optional=table.flag("optional"),
    )
    table.done()
    if len(group.members) < 2:
        raise ConvertError(f"{table.where}: a fusion group needs at least two members, not {len(group.members)}.")
    return group


class _Table:
    """A TOML table that hands out typed values and objects to unknown keys."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise ConvertError(f"{where} must be a table, not {_shown(data)}; see manifests/README.md.")
        self._data = dict(data)
        self._known: list[str] = []
        self.where = where

    def _take(self, key: str) -> Any:
        self._known.append(key)
        return self._data.pop(key, None)

    def _wrong(self, key: str, need: str, value: Any) -> ConvertError:
        if value is None:  # which TOML cannot say: the key is missing
            return ConvertError(f"{self.where}: {key!r} is missing; add it, {need}.")
        return ConvertError(f"{self.where}: {key!r} must be {need}, not {_shown(value)}; correct it.")

    def text(self, key: str, default: str | None = None) -> str:
        value = self._take(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        if not value and default is None:
            raise self._wrong(key, "a string that is not empty", value)
        return value

    def pattern(self, key: str) -> str:
        value = self.text(key)
        try:
            matches(value, "")  # a malformed pattern is an error of the manifest, found now
        except ConvertError as error:
            raise ConvertError(f"{self.where}: {error}") from error
        return value

    def texts(self, key: str, allowed: tuple[str, ...] | None = None) -> tuple[str, ...]:
        value = self._take(key)
        value = [] if value is None else value
        need = "a list of strings" if allowed is None else f"a list with any of {', '.join(allowed)}"
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(key, need, value)
        if allowed is not None and not set(value) <= set(allowed):
            raise self._wrong(key, need, value)
        return tuple(value)

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = self._take(key)
        value = default if value is None else value
        if value not in allowed:
            raise self._wrong(key, f"one of {', '.join(allowed)}", value)
        return str(value)

    def flag(self, key: str) -> bool:
        value = self._take(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return bool(value)

    def block(self, key: str) -> tuple[int, int] | None:
        value = self._take(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
            raise self._wrong(key, "two positive integers", value)
        return value[0], value[1]

    def array(self, key: str) -> list[_Table]:
        value = self._take(key)
        value = [] if value is None else value
        if not isinstance(value, list):
            raise self._wrong(key, "an array of tables", value)
        return [_Table(v, f"{self.where}, {key}[{i}]") for i, v in enumerate(value)]

    def tables(self, key: str) -> dict[str, _Table]:
        value = self._take(key)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise self._wrong(key, "a table", value)
        return {k: _Table(v, f"{self.where}, {key}.{k}") for k, v in value.items()}

    def done(self) -> None:
        if self._data:
            key = next(iter(self._data))
            near = difflib.get_close_matches(key, self._known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(self._known)}."
            raise ConvertError(f"{self.where}: unknown key {_shown(key)}; {hint}")


def _shown(value: Any) -> str:
    """A value as an error repeats it: its repr, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _classes_fit(manifest: Manifest, classes: Mapping[str, str | None]) -> bool:
    """Whether every component that the manifest writes rules for is of a class that they are written for."""
    return all(
        not rules.classes or class_name in rules.classes
        for rules in manifest.components
        for name, class_name in classes.items()
        if fnmatch.fnmatchcase(name, rules.component)
    )
