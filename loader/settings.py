"""What `load_pipeline` is asked to convert while it loads, and whether that fits the snapshot it is given.

Nothing that was asked for is dropped: settings that mean nothing raise, and so do those that a converted snapshot,
which is what it is, contradicts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..converter.format import layout
from ..converter.format.record import Record
from ..converter.plan.decide import check_patterns, expand_aliases
from ..converter.plan.manifest import FusionGroup, choose_manifest, load_manifest, shipped
from ..converter.plan.pattern import matches
from ..converter.plan.plan import ComponentPlan
from ..converter.plan.planning import make_plan
from ..converter.plan.settings import Settings
from ..converter.snapshot.files import Files
from ..converter.snapshot.snapshot import Component, Snapshot
from ..converter.telling.errors import LoadError, SettingsError
from .checkpoint import Fp8Modules, fp8_modules, is_converted, record_of

Wanted = Mapping[str, Settings | None]  # by component, "" for all that are not named; None keeps one as it is
Planned = Mapping[str, ComponentPlan]

_KEYS = ("method", "ignored_layers", "activation_scheme", "weight_block_size", "input_scales", "merge_lora")
_OF_DITS = ("ignored_layers", "activation_scheme", "weight_block_size", "input_scales")


@dataclass(frozen=True)
class Request:
    """What is asked of a conversion while loading; the fields are arguments of `load_pipeline`."""

    quantization: str | None
    quantization_config: Any
    manifest: str | None
    compact: bool

    def __post_init__(self) -> None:
        if self.quantization is not None:
            Settings.read({"quantization": self.quantization})
        Settings.read(self._of_all())

    def of(self, snapshot: Snapshot, files: Files, only: str | None = None) -> Wanted | None:
        """The settings of a conversion by component; None for a converted snapshot.

        files: the snapshot's, for the record of a converted one. only: the one component that is wanted. Raises
        SettingsError for settings that mean nothing or contradict the snapshot, LoadError where some are needed.
        """
        wanted = self._by_component([c.name for c in snapshot.components])
        if any(is_converted(c) for c in snapshot.components):
            self._check_agrees(snapshot, files, wanted, only)
            return None
        if self.quantization is None and self.quantization_config is None:
            label = f"{snapshot.label}" if only is None else f"{only or snapshot.label}"
            raise LoadError(
                f'{label} is not converted: pass quantization="fp8" to convert it while it loads, or convert it first '
                f"with `fp8-convert {snapshot.repo or snapshot.label} -o OUT`."
            )
        if not any(value is not None for value in wanted.values()):
            raise SettingsError(
                "quantization_config keeps every component as it is; name one, or load it with diffusers."
            )
        return {only: wanted.get(only, wanted.get(""))} if only else wanted

    def _of_all(self) -> dict[str, Any]:
        """What is asked of every component alike, where it is asked."""
        manifest = {} if self.manifest is None else {"manifest": self.manifest}
        return manifest if self.compact is False else {**manifest, "compact": self.compact}

    def _by_component(self, names: Sequence[str]) -> dict[str, Settings | None]:
        config = {} if self.quantization_config is None else self.quantization_config
        if not isinstance(config, Mapping):
            raise SettingsError(
                f"quantization_config is {config!r:.80}; give a dict such as {{'method': 'fp8'}}, or one such dict or "
                "None for each component."
            )
        per_component = bool(config) and all(key in names and key for key in config)
        wanted: dict[str, Settings | None] = {}
        for name, stated in (config if per_component else {"": config}).items():
            if stated is not None and not isinstance(stated, Mapping):
                raise SettingsError(f"quantization_config has {stated!r:.80} for {name}; give a dict or None.")
            wanted[name] = None if stated is None else self._read(stated)
        return wanted

    def _read(self, stated: Mapping[str, Any]) -> Settings:
        checked = Settings.read(stated, _KEYS)
        of_all = Settings.read(self._of_all())
        return replace(checked, manifest=of_all.manifest, compact=of_all.compact, given=checked.given | of_all.given)

    # A snapshot that is converted already is what it is.

    def _check_agrees(
        self, snapshot: Snapshot, files: Files, wanted: Mapping[str, Settings | None], only: str | None
    ) -> None:
        asked_for = [c for c in snapshot.components if only is None or c.name == only]
        converted = [c for c in asked_for if is_converted(c)]
        if self.quantization_config is not None:
            groups = _fusion_groups(snapshot, record_of(files))
            for component in converted:
                alone = component.name in wanted
                settings = wanted[component.name] if alone else wanted.get("")
                _check_component(component, settings, alone, groups.get(component.name, ()))
            kept = {c.name for c in asked_for} - {c.name for c in converted}
            if asked := sorted(name for name in kept if wanted.get(name) is not None):
                raise SettingsError(
                    f"{snapshot.label} is converted already but for {asked[0]}, and quantization_config asks for it in "
                    "FP8; convert the original anew."
                )
        self._check_recipe(snapshot.label, files)

    def _check_recipe(self, label: str, files: Files) -> None:
        """`manifest` and `compact`: as the snapshot was made, by its record, or refused."""
        if self.manifest is None and not self.compact:
            return
        said = f"{label} is converted already"
        record = record_of(files)
        if record is None:
            option = "compact" if self.compact else "manifest"
            raise SettingsError(
                f"{said}, and without a record nothing tells how; drop {option}, or convert the original."
            )
        if self.compact and not record.recipe.compact:
            raise SettingsError(f"{said} without compact; drop it, or convert the original with compact=True.")
        if self.manifest is not None and load_manifest(self.manifest).sha256 != record.recipe.manifest_sha256:
            stated = record.recipe.manifest
            raise SettingsError(
                f"{said} with the manifest {stated}; drop manifest, or convert the original with this one."
            )


def plan_for(snapshot: Snapshot, wanted: Wanted | None) -> Planned:
    """The plans of the components that are to be converted while they load; empty for a converted snapshot."""
    planned: dict[str, ComponentPlan] = {}
    for name, settings in (wanted or {}).items():
        if settings is None:
            continue
        plan = make_plan(snapshot, replace(settings, components=(name,) if name else ()).resolve(snapshot))
        for part in plan.components:
            if part.rules is not None and (not name or part.source.name == name):
                planned[part.source.name] = part
    return planned


def _fusion_groups(snapshot: Snapshot, record: Record | None) -> dict[str, tuple[FusionGroup, ...]]:
    """The fusion groups of each component, by the manifest that the snapshot was, or would be, converted with."""
    manifest = shipped().get(record.recipe.manifest) if record is not None else None
    if manifest is None:
        manifest = choose_manifest(snapshot.repo, snapshot.pipeline, snapshot.classes)
    rules = {c.name: manifest.rules_for(c.name, c.class_name) for c in snapshot.components}
    return {name: found.fusion_groups for name, found in rules.items() if found is not None}


def _check_component(
    component: Component, settings: Settings | None, alone: bool, groups: Sequence[FusionGroup]
) -> None:
    """Refuse settings that would have made another component. alone: they are for this component and no other."""
    found = fp8_modules(component)
    said = f"{component.label} is converted already"
    if settings is None:
        raise SettingsError(f"{said}, but quantization_config keeps it as it was; load the original snapshot.")
    if settings.input_scales is not None:
        raise SettingsError(f"{said} and brings its own input scales; drop input_scales, or convert the original anew.")
    if settings.merge_lora:
        raise SettingsError(f"{said}, and a LoRA is merged before that; convert the original anew with merge_lora.")
    if all(how.mode != layout.W8A8 for how in found.modules.values()):
        if alone and (for_dits := [key for key in _OF_DITS if key in settings.given and getattr(settings, key)]):
            raise SettingsError(f"{for_dits[0]} applies to the DiT, and {component.label} is none; drop it.")
        return
    if "activation_scheme" in settings.given and settings.activation_scheme != found.activation_scheme:
        raise SettingsError(
            f"{said} with {found.activation_scheme} activations, and quantization_config asks for "
            f"{settings.activation_scheme}."
        )
    have = found.config.get("weight_block_size")
    asked = settings.weight_block_size
    if "weight_block_size" in settings.given and asked != (tuple(have) if have else None):
        stated = list(asked) if asked else None
        raise SettingsError(f"{said} with weight_block_size {have}, and quantization_config asks for {stated}.")
    _check_ignored(said, settings.ignored_layers, found, groups)


def _check_ignored(said: str, patterns: Sequence[str], found: Fp8Modules, groups: Sequence[FusionGroup]) -> None:
    """Refuse ignored layers that are FP8, and patterns that match no layer."""
    for pattern in patterns:
        for one in expand_aliases([pattern], groups):
            if hit := next((name for name in found.modules if matches(one, name)), None):
                raise SettingsError(
                    f"{said}, {hit} in FP8, and quantization_config ignores {pattern!r}; convert it anew."
                )
    check_patterns(patterns, groups, [*found.modules, *(found.config.get("ignored_layers") or ())])
