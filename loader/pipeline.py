"""`load_pipeline`: from a snapshot, converted or not, to a diffusers pipeline that runs.

FP8 components are built here without memory and filled from their files; what has no FP8 weights is loaded by
diffusers and transformers themselves, and diffusers puts the pipeline together.
"""

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..converter.output.record import load_record
from ..converter.output.work import Work
from ..converter.plan.settings import Settings
from ..converter.snapshot.access import HubAccess
from ..converter.snapshot.files import Files
from ..converter.snapshot.snapshot import Snapshot
from ..converter.telling.errors import LoadError, SettingsError
from ..converter.telling.progress import Silent
from .arguments import choose_device, choose_dtype, without_habits
from .assemble import accepted_arguments, assemble, pipeline_class
from .backend import Backend
from .checkpoint import check_digests, fetched, is_converted, open_snapshot
from .component import Target, is_dit, load
from .fully_sharded import keep_in_place
from .parallel import choose_ranks
from .settings import Planned, Request, Wanted, plan_for
from .steps import check_steps, set_high_precision_steps

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
    backend: Backend = "auto",
    cuda_graphs: bool = False,
    high_precision_steps: tuple[int, int] | None = None,
    parallel_config: Any = None,
    fully_shard: Any = False,
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
    cuda_graphs: record the DiT's repeated blocks and replay them (`cuda_graphs.py`), for hosts that are slower than
    their GPU.
    high_precision_steps: (first, last): in so many first and last denoising steps of each run the W8A8 linears
    dequantise (`steps.py`).
    parallel_config, fully_shard: for the DiTs, in each of several processes (`parallel.py`): diffusers'
    ContextParallelConfig or TensorParallelConfig; True, or a DeviceMesh, to spread their weights over the ranks.
    revision, token, cache_dir, local_files_only, variant: as in huggingface_hub and diffusers.
    torch_dtype, device_map: diffusers' names for dtype and, where it names a single device, for device.
    pipeline_arguments: components to use instead of the snapshot's, and whatever else the pipeline class
    takes.

    Returns the snapshot's pipeline class, in evaluation mode, on the device. Raises ConvertError for a source
    that cannot be read or converted, LoadError for one that does not hold what it promises, ValueError for
    arguments that contradict each other, TypeError for one that neither this function nor the pipeline takes.
    """
    _check_backend(backend)
    place = choose_device(device, device_map)
    ranks = choose_ranks(parallel_config, fully_shard, place)
    target = Target(place, choose_dtype(dtype, torch_dtype), backend, strict, cuda_graphs, ranks)
    _check_graphs(target)
    if save_as is not None and ranks.several:
        raise SettingsError("save_as is for one process, and this is one of several ranks; convert the snapshot first.")
    access = HubAccess(revision, token, cache_dir, local_files_only, variant)
    request = Request(quantization, quantization_config, manifest, compact)
    snapshot, files = open_snapshot(source, access)
    if snapshot.pipeline is None:
        raise LoadError(f"{snapshot.label} is a single component, not a pipeline; use load_component.")
    taker = pipeline_class(snapshot.pipeline)
    check_steps(high_precision_steps, taker)
    given = without_habits(pipeline_arguments, accepted_arguments(taker), taker.__name__, _options(load_pipeline))
    wanted = request.of(snapshot, files)
    if save_as is not None:
        _convert_to(source, save_as, wanted, access, target.device)
        access = HubAccess()
        (snapshot, files), wanted = open_snapshot(save_as, access), None
    planned = plan_for(snapshot, wanted)
    _check_merged(given, planned)
    to_load = [c for c in snapshot.components if c.name not in given and (c.name in planned or is_converted(c))]
    dits = [component for component in to_load if is_dit(component, planned)]
    others = {c.name for c in snapshot.components if c not in dits and c.name not in given}
    ranks.check(dits, sorted(others | {name for name, part in given.items() if part is not None}), snapshot.label)
    root = _fetch(snapshot, files, wanted, access, verify)
    components = {**given, **{component.name: load(component, root, planned, target) for component in to_load}}
    pipe = assemble(root, components, target.dtype, variant).to(target.device)
    if ranks.mesh is not None:
        keep_in_place(pipe)
    if high_precision_steps is not None:
        set_high_precision_steps(pipe, high_precision_steps)
    _log(type(pipe).__name__, snapshot, root, target.device)
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
    backend: Backend = "auto",
    cuda_graphs: bool = False,
    parallel_config: Any = None,
    fully_shard: Any = False,
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
    place = choose_device(device, device_map)
    ranks = choose_ranks(parallel_config, fully_shard, place)
    target = Target(place, choose_dtype(dtype, torch_dtype), backend, strict, cuda_graphs, ranks)
    _check_graphs(target)
    access = HubAccess(revision, token, cache_dir, local_files_only, variant)
    request = Request(quantization, quantization_config, manifest, compact)
    snapshot, files = open_snapshot(source, access)
    names = [c.name for c in snapshot.components]
    name = component or ""
    if name not in names:
        raise LoadError(f"{snapshot.label} has no component {name!r} with weights; it has {', '.join(names)}.")
    wanted = request.of(snapshot, files, name)
    planned = plan_for(snapshot, wanted)
    found = next(c for c in snapshot.components if c.name == name)
    if name not in planned and not is_converted(found):
        raise LoadError(f"{found.label} of {snapshot.label} has no FP8 weights; load it with from_pretrained.")
    ranks.check([found] if is_dit(found, planned) else [], (), found.label)
    root = _fetch(snapshot, files, wanted, access, verify)
    model = load(found, root, planned, target)
    _log(f"{type(model).__name__} ({found.label})", snapshot, root, target.device)
    return model


def _check_backend(backend: str) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; use {', '.join(map(repr, get_args(Backend)))}.")


def _check_graphs(target: Target) -> None:
    if target.cuda_graphs and target.ranks.several:
        raise ValueError("cuda_graphs=True is for one process, and this is one of several ranks; leave it out.")
    if target.cuda_graphs and target.device.type != "cuda":
        raise ValueError(f"cuda_graphs=True needs a CUDA device, and the device is {target.device}; leave it out.")


def _check_merged(given: Mapping[str, Any], planned: Planned) -> None:
    """Refuse a LoRA for a component that is given, and so not loaded."""
    for name in given.keys() & planned.keys():
        if any(tensor.merges for tensor in planned[name].tensors):
            raise ValueError(
                f"merge_lora is for {name}, and {name} is given, so that nothing is merged; drop one of them."
            )


def _options(function: Callable[..., Any]) -> list[str]:
    """The names of a function's keyword arguments."""
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD]


def _fetch(snapshot: Snapshot, files: Files, wanted: Wanted | None, access: HubAccess, verify: bool) -> Path:
    """The folder on this machine that has the snapshot's files, their digests checked where that is asked for.

    A variant that an original snapshot lacks is refused; a converted one has none, whatever it was made from.
    """
    if verify and wanted is not None:
        raise ValueError(
            f"verify=True compares a converted snapshot with its record, and {snapshot.label} is not converted; leave "
            "it out, or write a snapshot with save_as=FOLDER."
        )
    shards = (shard.path.rpartition("/")[2] for c in snapshot.components for shard in c.shards)
    if wanted is not None and access.variant and not any(f".{access.variant}" in name for name in shards):
        raise LoadError(
            f"No component of {snapshot.label} has weights of the variant {access.variant!r}; correct or drop it."
        )
    root = fetched(snapshot, files, recorded=verify)
    if verify:
        check_digests(root)
    return root


def _log(what: str, snapshot: Snapshot, root: Path, device: torch.device) -> None:
    """Says what was loaded, by digests where there are some: what a server's log needs to tell two runs apart."""
    commit = f" at commit {snapshot.commit}" if snapshot.commit else ""
    record = load_record(root)
    made = ""
    if record is not None:
        source = record.source
        original = f"{source.repo} at commit {source.commit}" if source.repo else "a local folder"
        made = (
            f"; snapshot {record.record_sha256}, converted from {original} by fp8-convert "
            f"{record.tool_version} with the recipe {record.recipe_sha256}"
        )
    logger.info("loaded %s from %s%s onto %s%s", what, snapshot.label, commit, device, made)


def _convert_to(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    wanted: Wanted | None,
    access: HubAccess,
    device: torch.device,
) -> None:
    """Writes the converted snapshot, which is then what is loaded."""
    from ..converter.conversion import convert_with  # only here: loading needs none of what writing needs

    if wanted is None:
        raise SettingsError("save_as is for an original snapshot, and this one is converted already; copy its folder.")
    given = {name: settings for name, settings in wanted.items() if settings is not None}
    settings = next(iter(given.values()), Settings())
    if any(other != settings for other in given.values()):
        raise SettingsError(
            "save_as writes one recipe: give every component the same quantization_config, or leave it out."
        )
    convert_with(
        replace(settings, components=tuple(name for name in given if name)),
        source,
        Path(output),
        access,
        Work(device="cuda" if device.type == "cuda" else "cpu"),
        Silent(),
    )
