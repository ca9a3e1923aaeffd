"""`load_pipeline`: from a snapshot, converted or not, to a diffusers pipeline that runs.

FP8 components are built here without memory and filled from their files; what has no FP8 weights is loaded by
diffusers and transformers themselves, and diffusers puts the pipeline together.
"""

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..converter.format import layout
from ..converter.output.record import read_record
from ..converter.snapshot.access import SourceOptions
from ..converter.snapshot.source import Component, LocalFiles, Snapshot
from ..converter.stream.engine import Engine
from ..converter.stream.supply import FolderSupply
from ..converter.telling.errors import LoadError
from .arguments import choose_device, choose_dtype, without_habits
from .assemble import accepted_arguments, assemble, pipeline_class
from .backend import Choice
from .build import build, install_all, tensor_names
from .checkpoint import (
    Fp8Modules,
    check_digests,
    check_record,
    fetched,
    fp8_modules,
    is_converted,
    one_line,
    open_snapshot,
)
from .fill import Filler, fill_from_shards, fill_from_stream
from .quantizer import Fp8Config, Fp8DiffusersQuantizer, Fp8TransformersQuantizer, adopt, planned_modules
from .settings import Planned, Settings, plan_for, settings_for

logger = logging.getLogger(__name__)


def load_pipeline(
    source: str | os.PathLike[str],
    *,
    device: str | int | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    manifest: str | None = None,
    compact: bool = False,
    save_as: str | os.PathLike[str] | None = None,
    verify: bool = False,
    strict: bool = True,
    backend: Choice = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    **pipeline_arguments: Any,
) -> Any:
    """Load a diffusers pipeline whose weights are FP8, from a converted snapshot or converting an original
    one.

    source: a pipeline's folder or a Hub repo id. device: None is CUDA where there is one, else the CPU.
    dtype: of everything that is not FP8, and of the computation; None is BF16.
    quantization: "fp8" converts an original snapshot while it loads; a converted one ignores it.
    quantization_config: the same with settings, vLLM-Omni's keys: {"method": "fp8", "ignored_layers": [...],
    "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, or one such dict or None for each
    component. manifest, compact: as in `fp8_convert.converter.convert`. save_as: also writes the converted
    snapshot there. verify: first check every digest, as `fp8-convert verify` does. strict: raise where the
    installed FP8 modules are not those that the record and config promise; else warn.
    backend: "auto", "scaled_mm" or "dequantize", for every W8A8 linear (`backend.py`).
    revision, token, cache_dir, local_files_only, variant: as in huggingface_hub and diffusers.
    torch_dtype, device_map: diffusers' names for dtype and, where it names a single device, for device.
    pipeline_arguments: components to use instead of the snapshot's, and whatever else the pipeline class
    takes.

    Returns the snapshot's pipeline class, in evaluation mode, on the device. Raises ConvertError for a source
    that cannot be read or converted, LoadError for one that does not hold what it promises, ValueError for
    arguments that contradict each other, TypeError for one that neither this function nor the pipeline takes.
    """
    _check_backend(backend)
    target, compute = choose_device(device, device_map), choose_dtype(dtype, torch_dtype)
    options = SourceOptions(revision, token, cache_dir, local_files_only, variant)
    snapshot = open_snapshot(source, options)
    if snapshot.pipeline is None:
        raise LoadError(f"{snapshot.label} is a single component, not a pipeline; use load_component.")
    taker = pipeline_class(snapshot.pipeline)
    given = without_habits(pipeline_arguments, accepted_arguments(taker), taker.__name__, _options(load_pipeline))
    settings = settings_for(snapshot, quantization, quantization_config, manifest, compact)
    if save_as is not None:
        _convert_to(source, save_as, settings, manifest, compact, options, target)
        snapshot, settings = open_snapshot(save_as, SourceOptions()), None
        options = SourceOptions()
    snapshot, root = _fetch(snapshot, settings, options, verify)
    planned = plan_for(snapshot, settings, manifest, compact)
    components = dict(given)
    for component in snapshot.components:
        if component.name not in components and (component.name in planned or is_converted(component)):
            components[component.name] = _load(component, root, planned, target, compute, strict, backend)
    pipe = assemble(root, components, compute, variant).to(target)
    _log(type(pipe).__name__, snapshot, root, target)
    return pipe


def load_component(
    source: str | os.PathLike[str],
    component: str | None = None,
    *,
    device: str | int | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    quantization_config: Mapping[str, Any] | None = None,
    manifest: str | None = None,
    compact: bool = False,
    verify: bool = False,
    strict: bool = True,
    backend: Choice = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    **unknown: Any,
) -> nn.Module:
    """Load one FP8 component: `component` of a pipeline's snapshot, or a folder that is a component itself.

    The other arguments are those of `load_pipeline`, and so is what it raises; `verify` checks the whole snapshot.
    """
    _check_backend(backend)
    without_habits(unknown, (), "load_component", _options(load_component))
    target, compute = choose_device(device, device_map), choose_dtype(dtype, torch_dtype)
    options = SourceOptions(revision, token, cache_dir, local_files_only, variant)
    snapshot = open_snapshot(source, options)
    names = [c.name for c in snapshot.components]
    wanted = component or ""
    if wanted not in names:
        raise LoadError(f"{snapshot.label} has no component {wanted!r} with weights; it has {', '.join(names)}.")
    settings = settings_for(snapshot, quantization, quantization_config, manifest, compact, wanted)
    snapshot, root = _fetch(snapshot, settings, options, verify)
    planned = plan_for(snapshot, settings, manifest, compact)
    found = next(c for c in snapshot.components if c.name == wanted)
    if wanted not in planned and not is_converted(found):
        raise LoadError(f"{found.label} of {snapshot.label} has no FP8 weights; load it with from_pretrained.")
    model = _load(found, root, planned, target, compute, strict, backend)
    _log(f"{type(model).__name__} ({found.label})", snapshot, root, target)
    return model


def _check_backend(backend: str) -> None:
    if backend not in get_args(Choice):
        raise ValueError(f"backend is {backend!r}; use {', '.join(map(repr, get_args(Choice)))}.")


def _options(function: Callable[..., Any]) -> list[str]:
    """The names of a function's keyword arguments."""
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]


def _fetch(
    snapshot: Snapshot, settings: Settings | None, options: SourceOptions, verify: bool
) -> tuple[Snapshot, Path]:
    """The snapshot with its files on this machine, its digests checked where that is asked for.

    A variant that an original snapshot lacks is refused; a converted one has none, whatever it was made from.
    """
    if verify and settings is not None:
        raise ValueError(
            f"verify=True compares a converted snapshot with its record, and {snapshot.label} is not converted; leave "
            "it out, or write a snapshot with save_as=FOLDER."
        )
    shards = (shard.path.rpartition("/")[2] for c in snapshot.components for shard in c.shards)
    if settings is not None and options.variant and not any(f".{options.variant}" in name for name in shards):
        raise LoadError(
            f"No component of {snapshot.label} has weights of the variant {options.variant!r}; correct or drop it."
        )
    snapshot, root = fetched(snapshot, recorded=verify)
    if verify:
        check_digests(root)
    return snapshot, root


def _log(what: str, snapshot: Snapshot, root: Path, device: torch.device) -> None:
    """Says what was loaded, by digests where there are some: what a server's log needs to tell two runs apart."""
    commit = f" at commit {snapshot.commit}" if snapshot.commit else ""
    record = read_record(root)
    made = ""
    if record is not None:
        source = record["source"]
        original = f"{source['repo']} at commit {source['commit']}" if source["repo"] else "a local folder"
        made = (
            f"; snapshot {record.get('record_sha256')}, converted from {original} by fp8-convert "
            f"{record['tool_version']} with the recipe {record.get('recipe_sha256')}"
        )
    logger.info("loaded %s from %s%s onto %s%s", what, snapshot.label, commit, device, made)


# Before and after the weights


def _convert_to(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings | None,
    manifest: str | None,
    compact: bool,
    options: SourceOptions,
    device: torch.device,
) -> None:
    """Writes the converted snapshot, which is then what is loaded."""
    from ..converter.conversion import convert  # only here: loading needs none of what writing needs

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
    planned: Planned,
    device: torch.device,
    dtype: torch.dtype,
    strict: bool,
    backend: Choice,
) -> nn.Module:
    """Builds the component, installs its FP8 layers, fills everything from its files and checks the
    outcome.
    """
    plan, supply = planned.get(component.name), FolderSupply(LocalFiles(root))
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
    filler = Filler(model, names, dtype, device, component.label)
    if plan is None:
        fill_from_shards(filler, component.shards, supply)
    else:
        with Engine(device, workers=max(1, (os.cpu_count() or 2) - 1), readers=8) as engine:
            fill_from_stream(filler, plan, supply, engine)
    filler.finish()
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

        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # whatever transformers raises for a file it cannot use
            raise LoadError(
                f"generation_config.json in {folder} cannot be used ({one_line(error)}); download it again."
            ) from error
