"""The two pipelines of a comparison: opened and checked before anything runs, loaded one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...converter.format.record import Record
from ...converter.snapshot.access import HubAccess
from ...converter.snapshot.files import LocalFiles
from ...converter.snapshot.locate import local_folder
from ...converter.snapshot.snapshot import Snapshot
from ...converter.telling.errors import ConvertError, SettingsError
from ..assemble import assemble
from ..checkpoint import fetched, is_converted, open_snapshot, record_of
from ..pipeline import load_pipeline
from ..settings import Request, plan_for
from .alike import check_alike, differences

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Side:
    """One of the two pipelines.

    label: its Hub id, or its folder's name. load: gives the pipeline, computing in a dtype and on its device; None
    where it was handed over, as `pipe`. held: its description and its files, where it has files of its own. record:
    how it was converted. made: what it was converted with while loading.
    """

    label: str
    repo: str | None = None
    commit: str | None = None
    load: Callable[[torch.dtype], Any] | None = None
    pipe: Any = None
    held: tuple[Snapshot, LocalFiles] | None = None
    record: Record | None = None
    made: Mapping[str, Any] | None = None

    def get(self, dtype: torch.dtype) -> Any:
        return self.pipe if self.load is None else self.load(dtype)


@dataclass(frozen=True)
class Placing:
    """Where pipelines run. offload: components wait in the CPU's memory until they are needed."""

    device: torch.device
    offload: bool = False

    def __post_init__(self) -> None:
        if self.offload and self.device.type != "cuda":
            raise SettingsError("offload moves components to a GPU one at a time, and the device is the CPU; drop it.")

    @property
    def loading(self) -> torch.device:
        return torch.device("cpu") if self.offload else self.device

    def placed(self, pipe: Any) -> Any:
        if self.offload:
            pipe.enable_model_cpu_offload(device=self.device)
        return pipe


def open_sides(
    fp8: Any, original: Any, placing: Placing, options: HubAccess, fp8_revision: str | None, loading: Mapping[str, Any]
) -> tuple[Side, Side, tuple[str, ...]]:
    """Both sides, FP8 first, and notes on what differs between them beside FP8.

    fp8: None for the original, converted while it loads. loading: further arguments of `load_pipeline`. Raises
    ConvertError, LoadError and SettingsError for what cannot be compared, before anything is run.
    """
    named = [isinstance(one, (str, os.PathLike)) for one in (fp8, original)]
    if not any(named) and fp8 is not None:
        _check_classes(fp8, original)
        return _handed(fp8, "FP8 pipeline"), _handed(original, "original pipeline"), ()
    if not all(named) and not (fp8 is None and named[1]):
        raise SettingsError("A pipeline that is handed over is compared with another one; hand over both, or neither.")
    mine = None if fp8 is None else open_snapshot(fp8, replace(options, revision=fp8_revision, variant=None))
    record = record_of(mine[1]) if mine is not None else None
    theirs = open_snapshot(original, _of_record(options, original, record))
    if any(is_converted(component) for component in theirs[0].components):
        raise ConvertError(f"{theirs[0].label} is converted already; give what it was converted from as the original.")
    if mine is None:
        return (*_converted_while_loading(theirs[0], placing, options, loading, theirs), ())
    if not any(is_converted(component) for component in mine[0].components):
        raise ConvertError(
            f"{mine[0].label} is not converted; convert it first, or give the original alone to convert it while it "
            "loads."
        )
    check_alike(mine[0], theirs[0])
    notes = tuple(differences(mine, theirs, record))
    root, files = _fetched(mine)

    def load(dtype: torch.dtype) -> Any:
        return placing.placed(load_pipeline(root, device=placing.loading, dtype=dtype, **loading))

    side = Side(_label(mine[0], root), mine[0].repo, mine[0].commit, load, held=(mine[0], files), record=record)
    return side, _plain(theirs, placing, options.variant), notes


def _plain(opened: tuple[Snapshot, Any], placing: Placing, variant: str | None) -> Side:
    """The original, as diffusers and transformers load it."""
    snapshot = opened[0]
    root, files = _fetched(opened)

    def load(dtype: torch.dtype) -> Any:
        return placing.placed(assemble(root, {}, dtype, variant).to(placing.loading))

    return Side(_label(snapshot, root), snapshot.repo, snapshot.commit, load, held=(snapshot, files))


def _converted_while_loading(
    snapshot: Snapshot, placing: Placing, options: HubAccess, loading: Mapping[str, Any], opened: tuple[Snapshot, Any]
) -> tuple[Side, Side]:
    request = {"quantization": "fp8", "quantization_config": None, "manifest": None, "compact": False}
    asked = request | {key: value for key, value in loading.items() if key in request}
    plan_for(snapshot, Request(**asked).of(snapshot, opened[1]))  # what is wrong with it is said before anything runs
    plain = _plain(opened, placing, options.variant)
    assert plain.held is not None
    root = plain.held[1].root

    def load(dtype: torch.dtype) -> Any:
        settings = {**loading, **asked, "variant": options.variant}
        return placing.placed(load_pipeline(root, device=placing.loading, dtype=dtype, **settings))

    made = {key: value for key, value in asked.items() if value and key != "quantization"}
    return Side(f"{plain.label}, converted while loading", plain.repo, plain.commit, load, made=made), plain


def _of_record(options: HubAccess, original: Source, record: Record | None) -> HubAccess:
    """A repository that the record names is taken at the record's commit, unless another one is asked for."""
    if record is None or options.revision is not None or record.source.commit is None:
        return options
    if record.source.repo != os.fspath(original) or local_folder(original) is not None:
        return options
    return replace(options, revision=record.source.commit)


def _fetched(opened: tuple[Snapshot, Any]) -> tuple[Path, LocalFiles]:
    root = fetched(*opened)
    return root, opened[1] if isinstance(opened[1], LocalFiles) else LocalFiles(root)


def _label(snapshot: Snapshot, root: Path) -> str:
    return snapshot.repo or root.resolve().name or "the original"


def _handed(pipe: Any, label: str) -> Side:
    if not callable(pipe):
        raise SettingsError(f"The {label} is {pipe!r:.80}; give a folder, a Hub id or a pipeline.")
    return Side(label, pipe=pipe)


def _check_classes(fp8: Any, original: Any) -> None:
    """Refuse pipelines of two classes, and components of two configs; functions say nothing of themselves."""
    parts: list[Mapping[str, Any]] = [getattr(pipe, "components", {}) for pipe in (fp8, original)]
    if not all(parts):
        return
    if type(fp8) is not type(original):
        raise ConvertError(
            f"The pipelines cannot be compared: one is {type(fp8).__name__} and the other {type(original).__name__}."
        )
    for name in parts[0].keys() | parts[1].keys():
        one, other = (type(part.get(name)).__name__ for part in parts)
        if one != other:
            raise ConvertError(f"The pipelines cannot be compared: {name} is {one} in one and {other} in the other.")
