"""What `load_pipeline` is asked to convert while it loads, and whether that fits the snapshot it is given.

Nothing that was asked for is dropped: settings that mean nothing raise, and so do those that a converted snapshot,
which is what it is, contradicts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..converter.format import layout
from ..converter.plan.manifest import choose_manifest, load_manifest
from ..converter.plan.pattern import matches
from ..converter.plan.plan import ComponentPlan
from ..converter.plan.planning import make_plan
from ..converter.plan.recipe import Recipe
from ..converter.plan.scales import read_input_scales
from ..converter.snapshot.source import Component, Snapshot
from ..converter.telling.errors import LoadError
from .checkpoint import fp8_modules, is_converted, record_of
from .config import config_problem

Settings = Mapping[str, Mapping[str, Any] | None]
Planned = Mapping[str, ComponentPlan]

_KEYS = ("method", "ignored_layers", "activation_scheme", "weight_block_size", "input_scales")


def settings_for(
    snapshot: Snapshot,
    quantization: str | None,
    config: Mapping[str, Any] | None,
    manifest: str | None,
    compact: bool,
    only: str | None = None,
) -> Settings | None:
    """Per component the settings of a conversion, under "" those for all; None for a converted snapshot.

    only: the one component that is wanted. Raises ValueError for settings that mean nothing or contradict the
    snapshot, LoadError where some are needed.
    """
    if quantization not in (None, "fp8"):
        raise ValueError(f"quantization is {quantization!r}; the only one is 'fp8'.")
    settings = _by_component(config, [c.name for c in snapshot.components])
    if converted := [c for c in snapshot.components if is_converted(c)]:
        if config is not None:
            for component in converted:
                _check_agreement(component, settings.get(component.name, settings.get("")))
            kept = {c.name for c in snapshot.components} - {c.name for c in converted}
            if asked := sorted(name for name in kept if settings.get(name) is not None):
                raise ValueError(
                    f"{snapshot.label} is converted already but for {asked[0]}, and quantization_config asks for it in "
                    "FP8; convert the original anew."
                )
        _check_recipe(snapshot, manifest, compact)
        return None
    if quantization is None and config is None:
        label = f"{snapshot.label}" if only is None else f"{only or snapshot.label}"
        raise LoadError(
            f'{label} is not converted: pass quantization="fp8" to convert it while it loads, or convert it first '
            f"with `fp8-convert {snapshot.repo or snapshot.label} -o OUT`."
        )
    if not any(value is not None for value in settings.values()):
        raise ValueError("quantization_config keeps every component as it is; name one, or load it with diffusers.")
    if only:
        settings = {only: settings.get(only, settings.get(""))}
    return settings


def plan_for(snapshot: Snapshot, settings: Settings | None, manifest: str | None, compact: bool) -> Planned:
    """The plans of the components that are to be converted while they load; empty for a converted snapshot."""
    if settings is None:
        return {}
    classes = {c.name: c.class_name for c in snapshot.components}
    rules = load_manifest(manifest) if manifest else choose_manifest(snapshot.repo, snapshot.pipeline, classes)
    planned: dict[str, ComponentPlan] = {}
    for name, wanted in settings.items():
        if wanted is None:
            continue
        block = wanted.get("weight_block_size")
        scales = wanted.get("input_scales")
        recipe = Recipe(
            manifest=rules,
            ignored_layers=tuple(wanted.get("ignored_layers") or ()),
            components=(name,) if name else (),
            compact=compact,
            block=None if block is None else (block[0], block[1]),
            activation_scheme=wanted.get("activation_scheme", "dynamic"),
            input_scales=None if scales is None else read_input_scales(Path(scales)),
        )
        plan = make_plan(snapshot, recipe)
        for part in plan.components:
            if part.rules is not None and (not name or part.source.name == name):
                planned[part.source.name] = part
    return planned


def _by_component(config: Any, names: list[str]) -> dict[str, Mapping[str, Any] | None]:
    if config is None:
        return {"": {}}
    if not isinstance(config, Mapping):
        raise ValueError(
            f"quantization_config is {config!r:.80}; give a dict such as {{'method': 'fp8'}}, or one such dict or None "
            "for each component."
        )
    per_component = bool(config) and all(key in names and key for key in config)
    settings = dict(config) if per_component else {"": config}
    for name, value in settings.items():
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"quantization_config has {value!r:.80} for {name}; give a dict or None.")
        if problem := config_problem(value, _KEYS):
            raise ValueError(f"quantization_config cannot be used: {problem}.")
    return settings


def _check_agreement(component: Component, settings: Mapping[str, Any] | None) -> None:
    """A converted component is what it is: settings that would have made another one are refused."""
    found = fp8_modules(component)
    said = f"{component.label} is converted already"
    if settings is None:
        raise ValueError(f"{said}, but quantization_config keeps it as it was; load the original snapshot.")
    if settings.get("input_scales") is not None:
        raise ValueError(f"{said} and brings its own input scales; drop input_scales, or convert the original anew.")
    w8a8 = [name for name, how in found.modules.items() if how.mode == layout.W8A8]
    if not w8a8:
        return
    if (scheme := settings.get("activation_scheme", found.activation_scheme)) != found.activation_scheme:
        raise ValueError(
            f"{said} with {found.activation_scheme} activations, and quantization_config asks for {scheme}."
        )
    if "weight_block_size" in settings:
        asked, have = settings["weight_block_size"], found.config.get("weight_block_size")
        if (list(asked) if asked else None) != (list(have) if have else None):
            raise ValueError(f"{said} with weight_block_size {have}, and quantization_config asks for {asked}.")
    for pattern in settings.get("ignored_layers") or ():
        if hit := next((name for name in w8a8 if matches(pattern, name)), None):
            raise ValueError(f"{said}, {hit} in FP8, and quantization_config ignores {pattern!r}; convert it anew.")


def _check_recipe(snapshot: Snapshot, manifest: str | None, compact: bool) -> None:
    """`manifest` and `compact` on a converted snapshot: as it was made, by its record, or refused."""
    if manifest is None and not compact:
        return
    said = f"{snapshot.label} is converted already"
    record = record_of(snapshot)
    if record is None:
        option = "compact" if compact else "manifest"
        raise ValueError(f"{said}, and without a record nothing tells how; drop {option}, or convert the original.")
    if compact and not record["recipe"]["compact"]:
        raise ValueError(f"{said} without compact; drop it, or convert the original with compact=True.")
    if manifest is not None and load_manifest(manifest).sha256 != record["recipe"]["manifest_sha256"]:
        stated = record["recipe"]["manifest"]
        raise ValueError(f"{said} with the manifest {stated}; drop manifest, or convert the original with this one.")
