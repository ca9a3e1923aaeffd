"""What a snapshot says of itself: where its files are, which modules are FP8 in which mode, and how it was
made.

Read from safetensors headers, each shard's `__metadata__["fp8_convert"]`, the component's config.json and the
record; no weights are touched. Names here are checkpoint names: a safetensors key without `.weight`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..converter.format import layout
from ..converter.format.layout import STAGING, WeightFormat
from ..converter.format.record import Record
from ..converter.output.record import load_record
from ..converter.snapshot.access import HubAccess
from ..converter.snapshot.describing import describe
from ..converter.snapshot.files import Files, LocalFiles
from ..converter.snapshot.fp8 import Fault, read_fp8
from ..converter.snapshot.hub import HubFiles, download
from ..converter.snapshot.locate import fetch, open_files
from ..converter.snapshot.snapshot import CONFIG, Component, Snapshot
from ..converter.telling.errors import LoadError
from .config import METHODS, config_problem

_ABSENT = "{problem.module} of {label} should be FP8 by the shards' metadata, but is not; convert the snapshot again."
# What keeps a component from being loaded, for its user; what other tools write otherwise is read all the same.
_WORDS = {
    Fault.METADATA: "{problem.file} has damaged FP8 metadata ({problem.found}); convert the snapshot again.",
    Fault.ABSENT: _ABSENT,
    Fault.NOT_CODES: _ABSENT,
    Fault.NOT_WEIGHT: "{problem.name} of {label} holds FP8 codes but is not a weight; convert it again.",
    Fault.NOT_ROWS: "{label}: {problem}; convert the snapshot again.",
    Fault.NO_SCALE: (
        "{problem.name} of {label} holds FP8 codes, but {problem.due} is missing; without its scale the weight is "
        "wrong: convert the snapshot again."
    ),
    Fault.SCALE: (
        "{problem.name} of {label} is {problem.found}, which is not a scale for {problem.module}.weight; convert the "
        "snapshot again."
    ),
    Fault.INPUT_SCALE: (
        "{problem.name} of {label} is {problem.found}, which is not an activation scale; convert the snapshot again."
    ),
    Fault.NO_INPUT_SCALE: (
        "{label} has the static activation scheme, but {problem.module}.input_scale is missing; convert it with "
        "--activation-scheme dynamic, or with calibrated --input-scales."
    ),
}


@dataclass(frozen=True)
class Fp8Modules:
    """The FP8 modules that a component's checkpoint holds.

    `modules` are by checkpoint name; `config` is what config.json has under
    `quantization_config`.
    """

    modules: Mapping[str, WeightFormat]
    config: Mapping[str, Any]

    @property
    def activation_scheme(self) -> str:
        return str(self.config.get("activation_scheme") or "dynamic")


def open_snapshot(source: str | os.PathLike[str], options: HubAccess) -> tuple[Snapshot, Files]:
    """Describe what a folder or Hub id has, converted or not, and its files. A Hub repository is not downloaded.

    Raises ConvertError, and LoadError for the output of a conversion that has not finished.
    """
    folder = Path(source)
    if (folder / STAGING).is_dir() and not (folder / layout.RECORD_FILE).exists():
        raise LoadError(f"The conversion into {folder} is unfinished; run the same fp8-convert command again.")
    files = open_files(source, options)
    snapshot = describe(files, variant=options.variant, allow_converted=True)
    if snapshot.single_files:
        raise LoadError(
            f"{snapshot.label} was written with --target comfyui: files for ComfyUI's models folder, which diffusers "
            "cannot load; convert the source again without that option, or take it back with `fp8-convert import` and "
            "--base, which names its source."
        )
    return snapshot, files


def fetched(snapshot: Snapshot, files: Files, *, recorded: bool = False) -> Path:
    """The folder on this machine that the snapshot's files are in, downloaded if they are not.

    recorded: also the files that only the record lists, as checking its digests needs them.
    """
    also = {layout.RECORD_FILE}
    if recorded and isinstance(files, HubFiles) and (record := record_of(files)) is not None:
        also |= set(record.files)
    return fetch(snapshot, files, also & set(files.sizes())).root


def record_of(files: Files) -> Record | None:
    """The record among a snapshot's files, None where there is none; of a Hub repository nothing else is downloaded."""
    if isinstance(files, HubFiles):
        if layout.RECORD_FILE not in files.sizes():
            return None
        files = download(files, [layout.RECORD_FILE])
    assert isinstance(files, LocalFiles)
    return load_record(files.root)


def check_digests(root: Path) -> None:
    """Compare every byte of the snapshot in `root` with its record. Raises LoadError."""
    from ..converter.verification import verify  # only here: loading needs none of what checking needs

    if not (root / layout.RECORD_FILE).is_file():
        raise LoadError(
            f"verify=True needs the record {layout.RECORD_FILE}, and {root} has none; give the folder that fp8-convert "
            "wrote (to load_component with the component's name), or leave verify out."
        )
    findings = verify(root).findings
    if findings:
        first, more = findings[0], len(findings) - 1
        raise LoadError(
            f"{root} is not what was converted: {first.path} {first.problem}{f' (and {more} more)' if more else ''}; "
            f"`fp8-convert verify {root}` lists all {len(findings)} findings: convert or download it again."
        )


def is_converted(component: Component) -> bool:
    """Whether the component's checkpoint holds FP8 weights of this project's layout."""
    config = component.config.get(layout.CONFIG_KEY)
    method = config.get("quant_method") if isinstance(config, dict) else None
    return method in METHODS or any(layout.METADATA_KEY in s.header.metadata for s in component.shards)


def fp8_modules(component: Component) -> Fp8Modules:
    """The FP8 modules of a converted component, as its own files say.

    Raises LoadError for FP8 codes without a scale or without a mode, for named modules without codes, and for a
    quantization_config that means nothing.
    """
    config = _config_of(component)
    fp8 = read_fp8(component)
    static = config.get("activation_scheme") == "static"
    for problem in fp8.problems:
        if problem.fault in _WORDS and (static or problem.fault is not Fault.INPUT_SCALE):
            words = _WORDS[problem.fault].format(problem=problem, label=component.label)
            raise LoadError(words)
    return Fp8Modules(fp8.formats, config)


def check_record(root: Path, component: Component, found: Fp8Modules) -> str | None:
    """What the record or the config claims of the component and its shards do not hold; None if all is
    well.
    """
    record = load_record(root)
    entry = record.components.get(component.name) if record is not None else None
    if entry is not None:
        for mode, count in entry.fp8_modules.items():
            here = sum(1 for how in found.modules.values() if how.mode == mode)
            if here != count:
                return f"the record counts {count} {mode} modules, the shards hold {here}"
    ignored = found.config.get("ignored_layers") or []
    if both := sorted(set(ignored) & set(found.modules)):
        return f"config.json ignores {both[0]}, which is FP8 in the shards"
    return None


def check_scale(name: str, scale: torch.Tensor, where: str) -> None:
    """Raise LoadError unless all values of the scale `name` are finite and positive; waits for its device."""
    values = scale.detach().flatten()
    bad = values[~(values.isfinite() & (values > 0))]
    if bad.numel():
        raise LoadError(
            f"{name} of {where} holds {float(bad[0])}, and a scale is finite and positive: the file is damaged; "
            "convert or download the snapshot again."
        )


def _config_of(component: Component) -> dict[str, Any]:
    """What config.json has under `quantization_config`; empty if it has nothing there."""
    config = component.config.get(layout.CONFIG_KEY)
    if config is None:
        return {}
    problem = config_problem(config) if isinstance(config, dict) else f"it is {config!r:.80}; it must be an object"
    if problem:
        where = f" of {component.label}" if not component.name else ""
        raise LoadError(
            f"{component.path(CONFIG)}{where} has a {layout.CONFIG_KEY} that cannot be used: {problem}: convert the "
            "snapshot again."
        )
    return dict(config)
