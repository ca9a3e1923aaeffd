"""`load_pipeline`: from a snapshot, converted or not, to a diffusers pipeline that runs.

FP8 components are built here without memory and filled from their files; what has no FP8 weights is loaded by
diffusers and transformers themselves, and diffusers puts the pipeline together.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..converter import layout
from ..converter.conversion import convert
from ..converter.locate import SourceOptions
from ..converter.manifest import choose_manifest, load_manifest
from ..converter.pattern import matches
from ..converter.plan import ComponentPlan, make_plan
from ..converter.recipe import Recipe
from ..converter.scales import read_input_scales
from ..converter.source import Component, Snapshot
from ..converter.stream import Engine
from .assemble import assemble
from .backend import Choice
from .build import build, install_all, tensor_names
from .checkpoint import Fp8Modules, LoadError, check_record, fetched, fp8_modules, is_converted, open_snapshot
from .fill import Filler, fill_from_shards, fill_from_stream
from .quantizer import Fp8Config, Fp8DiffusersQuantizer, Fp8TransformersQuantizer, adopt, planned_modules

logger = logging.getLogger(__name__)

_CONFIG_KEYS = ("method", "ignored_layers", "activation_scheme", "weight_block_size", "input_scales")
_Planned = Mapping[str, tuple[ComponentPlan, Mapping[str, float]]]


def load_pipeline(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantization: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    manifest: str | None = None,
    compact: bool = False,
    save_as: str | os.PathLike[str] | None = None,
    strict: bool = True,
    backend: Choice = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    **pipeline_arguments: Any,
) -> Any:
    """Load a diffusers pipeline whose weights are FP8, from a converted snapshot or converting an original
    one.

    source: a pipeline's folder or a Hub repo id. device: None is CUDA where there is one, else the CPU.
    dtype: of everything that is not FP8, and of the computation.
    quantization: "fp8" converts an original snapshot while it loads; a converted one ignores it.
    quantization_config: the same with settings, vLLM-Omni's keys: {"method": "fp8", "ignored_layers": [...],
    "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, or one such dict or None for each
    component. manifest, compact: as in `fp8_convert.converter.convert`. save_as: also writes the converted
    snapshot there. strict: raise where the installed FP8 modules are not those that the record and config
    promise; else warn. backend: "auto", "scaled_mm" or "dequantize", for every W8A8 linear (`backend.py`).
    revision, token, cache_dir, local_files_only, variant: as in huggingface_hub and diffusers.
    pipeline_arguments: components to use instead of the snapshot's, and whatever else the pipeline class
    takes.

    Returns the snapshot's pipeline class, in evaluation mode, on the device. Raises ConvertError for a source
    that cannot be read or converted, LoadError for one that does not hold what it promises, ValueError for
    arguments that contradict each other.
    """
    target = _device(device)
    options = SourceOptions(revision, token, cache_dir, local_files_only, variant)
    snapshot = open_snapshot(source, options)
    if snapshot.pipeline is None:
        raise LoadError(f"{snapshot.label} is a single component, not a pipeline; use load_component.")
    settings = _settings(snapshot, quantization, quantization_config)
    if save_as is not None:
        _convert_to(source, save_as, settings, manifest, compact, options, target)
        snapshot, settings = open_snapshot(save_as, SourceOptions()), None
        options = SourceOptions()
    snapshot, root = fetched(snapshot, options)
    planned = _plan(snapshot, settings, manifest, compact)
    components = dict(pipeline_arguments)
    for component in snapshot.components:
        if component.name not in components and (component.name in planned or is_converted(component)):
            components[component.name] = _load(component, root, planned, target, dtype, strict, backend)
    return assemble(root, components, dtype, variant).to(target)


def load_component(
    source: str | os.PathLike[str],
    component: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantization: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    manifest: str | None = None,
    compact: bool = False,
    strict: bool = True,
    backend: Choice = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
) -> nn.Module:
    """Load one FP8 component: `component` of a pipeline's snapshot, or a folder that is a component itself.

    The other arguments are those of `load_pipeline`, and so is what it raises.
    """
    target = _device(device)
    options = SourceOptions(revision, token, cache_dir, local_files_only, variant)
    snapshot = open_snapshot(source, options)
    names = [c.name for c in snapshot.components]
    wanted = component or ""
    if wanted not in names:
        raise LoadError(f"{snapshot.label} has no component {wanted!r} with weights; it has {', '.join(names)}.")
    settings = _settings(snapshot, quantization, quantization_config, wanted)
    snapshot, root = fetched(snapshot, options)
    if settings is not None and wanted:
        settings = {wanted: settings.get(wanted, settings.get(""))}
    planned = _plan(snapshot, settings, manifest, compact)
    found = next(c for c in snapshot.components if c.name == wanted)
    if wanted not in planned and not is_converted(found):
        raise LoadError(f"{found.label} of {snapshot.label} has no FP8 weights; load it with from_pretrained.")
    return _load(found, root, planned, target, dtype, strict, backend)


def _device(device: str | torch.device | None) -> torch.device:
    found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", torch.cuda.current_device())
    return found


# What is to be converted, and how


def _settings(
    snapshot: Snapshot, quantization: str | None, config: Mapping[str, Any] | None, only: str | None = None
) -> dict[str, Mapping[str, Any] | None] | None:
    """Per component the settings of a conversion, under "" those for all; None for a converted snapshot.

    Raises ValueError for settings that mean nothing or contradict the snapshot, LoadError where some are
    needed.
    """
    if quantization not in (None, "fp8"):
        raise ValueError(f"quantization is {quantization!r}; the only one is 'fp8'.")
    names = [c.name for c in snapshot.components]
    settings: dict[str, Mapping[str, Any] | None] = {"": {}}
    if config is not None:
        per_component = bool(config) and all(key in names and key for key in config)
        settings = dict(config) if per_component else {"": config}
    for value in settings.values():
        _check_settings(value)
    converted = [c for c in snapshot.components if is_converted(c)]
    if converted:
        if config is not None:
            for component in converted:
                _check_agreement(component, settings.get(component.name, settings.get("")))
        return None
    if quantization is None and config is None:
        label = f"{snapshot.label}" if only is None else f"{only or snapshot.label}"
        raise LoadError(
            f'{label} is not converted: pass quantization="fp8" to convert it while it loads, or convert it first '
            f"with `fp8-convert {snapshot.repo or snapshot.label} -o OUT`."
        )
    return settings


def _check_settings(settings: Mapping[str, Any] | None) -> None:
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise ValueError(f"quantization_config has {settings!r} for a component; give a dict or None.")
    if unknown := [key for key in settings if key not in _CONFIG_KEYS]:
        raise ValueError(f"quantization_config has the unknown key {unknown[0]!r}; it knows {', '.join(_CONFIG_KEYS)}.")
    if settings.get("method", "fp8") != "fp8":
        raise ValueError(f"quantization_config has the method {settings['method']!r}; the only one is 'fp8'.")


def _check_agreement(component: Component, settings: Mapping[str, Any] | None) -> None:
    """A converted component is what it is: settings that would have made another one are refused."""
    found = fp8_modules(component)
    said = f"{component.label} is converted already"
    if settings is None:
        raise ValueError(f"{said}, but quantization_config keeps it as it was; load the original snapshot.")
    w8a8 = [name for name, (mode, _) in found.modules.items() if mode == layout.W8A8]
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


def _plan(
    snapshot: Snapshot, settings: Mapping[str, Mapping[str, Any] | None] | None, manifest: str | None, compact: bool
) -> _Planned:
    """The plans of the components that are to be converted while they load; empty for a converted
    snapshot.
    """
    if settings is None:
        return {}
    classes = {c.name: c.class_name for c in snapshot.components}
    rules = load_manifest(manifest) if manifest else choose_manifest(snapshot.repo, snapshot.pipeline, classes)
    planned: dict[str, tuple[ComponentPlan, Mapping[str, float]]] = {}
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
            block=None if block is None else (int(block[0]), int(block[1])),
            activation_scheme=wanted.get("activation_scheme", "dynamic"),
            input_scales=None if scales is None else read_input_scales(Path(scales)),
        )
        plan = make_plan(snapshot, recipe)
        for part in plan.components:
            if part.rules is not None and (not name or part.source.name == name):
                planned[part.source.name] = (part, plan.input_scales)
    return planned


def _convert_to(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Mapping[str, Mapping[str, Any] | None] | None,
    manifest: str | None,
    compact: bool,
    options: SourceOptions,
    device: torch.device,
) -> None:
    """Writes the converted snapshot, which is then what is loaded."""
    if settings is None:
        raise ValueError("save_as is for an original snapshot, and this one is converted already; copy its folder.")
    given = {name: value for name, value in settings.items() if value is not None}
    first = next(iter(given.values()), {})
    if any(value != first for value in given.values()):
        raise ValueError(
            "save_as writes one recipe: give every component the same quantization_config, or leave it out."
        )
    convert(
        source,
        output,
        manifest=manifest,
        ignored_layers=tuple(first.get("ignored_layers") or ()),
        components=tuple(name for name in given if name),
        compact=compact,
        weight_block_size=first.get("weight_block_size"),
        activation_scheme=first.get("activation_scheme", "dynamic"),
        input_scales=first.get("input_scales"),
        device="cuda" if device.type == "cuda" else "cpu",
        revision=options.revision,
        token=options.token,
        cache_dir=options.cache_dir,
        local_files_only=options.local_files_only,
        variant=options.variant,
    )


# One component


def _load(
    component: Component,
    root: Path,
    planned: _Planned,
    device: torch.device,
    dtype: torch.dtype,
    strict: bool,
    backend: Choice,
) -> nn.Module:
    """Builds the component, installs its FP8 layers, fills everything from its files and checks the
    outcome.
    """
    plan, input_scales = planned.get(component.name, (None, {}))
    fp8 = fp8_modules(component) if plan is None else planned_modules(plan)
    keys = (
        [t.name for t in component.tensors]
        if plan is None
        else [o.name for s in plan.shards for o in s.schedule.outputs]
    )
    model = build(component, dtype)
    names = tensor_names(model, keys, fp8.modules)
    install_all(
        model,
        fp8.modules,
        names,
        dtype=dtype,
        activation_scheme=fp8.activation_scheme,
        backend=backend,
        label=component.label,
    )
    filler = Filler(model, names, dtype, device)
    if plan is None:
        fill_from_shards(filler, component.shards)
    else:
        with Engine(device, workers=max(1, (os.cpu_count() or 2) - 1), readers=8) as engine:
            fill_from_stream(filler, plan.shards, engine, input_scales)
    filler.finish(component.label)
    _check(model, component, root, fp8, names, strict, filler.unexpected, plan is None)
    _adopt(model, component, root, fp8, names)
    return model


def _check(
    model: nn.Module,
    component: Component,
    root: Path,
    fp8: Fp8Modules,
    names: Mapping[str, str],
    strict: bool,
    unexpected: list[str],
    converted: bool,
) -> None:
    from .report import unlisted_linears

    problem = check_record(root, component, fp8) if converted else None
    if problem is None and (plain := unlisted_linears(model, fp8, names)):
        problem = f"config.json does not ignore {plain[0]}, but its weight is not FP8"
    if unexpected:
        logger.warning("%s: %d tensors of the checkpoint belong to no module, such as %s",
                       component.label, len(unexpected), unexpected[0])  # fmt: skip
    if problem is not None:
        message = f"{component.label} is not what it promises: {problem}; convert the snapshot again."
        if strict:
            raise LoadError(message + " strict=False loads it all the same.")
        logger.warning("%s", message)


def _adopt(model: Any, component: Component, root: Path, fp8: Fp8Modules, names: Mapping[str, str]) -> None:
    """Gives the model its config, generation settings and quantizer, as `from_pretrained` does."""
    own = {module: names[module + layout.WEIGHT].removesuffix(layout.WEIGHT) for module in fp8.modules}
    folder = str(root / component.name) if component.name else str(root)
    quantizer: Any
    if component.library == "diffusers":
        quantizer = Fp8DiffusersQuantizer(Fp8Config(**fp8.config))
        model.register_to_config(_name_or_path=folder)
    else:
        quantizer = Fp8TransformersQuantizer(Fp8Config(**fp8.config))
        model.name_or_path = folder
        _generation_config(model, folder)
    quantizer.fp8, quantizer.names = fp8, own
    adopt(model, quantizer)


def _generation_config(model: Any, folder: str) -> None:
    if hasattr(model, "can_generate") and model.can_generate() and Path(folder, "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
