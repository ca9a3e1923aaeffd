"""A diffusers snapshot as data: components, shards, validated headers, sidecars. No weights are read here.

The same code describes a local folder and a Hub repository that is not downloaded; what differs stands behind
`Files`. Everything found here is untrusted: names that leave the snapshot are refused, only safetensors count.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from .errors import ConvertError, ResumableError
from .header import Header, TensorInfo, read_header
from .layout import RECORD_FILE
from .notebook import Brief

MODEL_INDEX = "model_index.json"
CONFIG = "config.json"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}

_MAX_JSON_BYTES = 256 * 1024 * 1024
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SIDECAR_SUFFIXES = {
    ".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".merges", ".bpe", ".yaml", ".yml", ".md",
    ".py",
}  # fmt: skip
_SIDECAR_NAMES = re.compile(r"(?i)(licen[cs]e|notice|copying|vocab|merges).*")


class Files(Protocol):
    """Where a snapshot's files lie: a folder, or a Hub repository at one commit."""

    @property
    def label(self) -> str:
        """How errors name the snapshot."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file, by its path relative to the snapshot (posix)."""

    def read(self, path: str) -> bytes:
        """The content of a small file."""

    def header(self, path: str) -> Header:
        """The validated header of a safetensors file."""

    def local(self, path: str) -> Path | None:
        """Where the file lies on this machine, None if it is not here."""

    def sha256(self, path: str) -> str | None:
        """The digest that the file must have, where the source states one."""


@dataclass(frozen=True, repr=False)
class Shard(Brief):
    """One safetensors file of a component."""

    path: str
    size: int
    header: Header
    local: Path | None
    sha256: str | None = None  # what the Hub says of it


@dataclass(frozen=True, repr=False)
class Component(Brief):
    """A component with weights. A component that is its own snapshot has the name ""."""

    name: str
    library: str
    class_name: str | None
    config: Mapping[str, Any]
    stem: str
    shards: tuple[Shard, ...]
    index: str | None

    def path(self, file: str) -> str:
        return f"{self.name}/{file}" if self.name else file

    @property
    def label(self) -> str:
        """How tables and messages call the component."""
        return self.name or self.class_name or "component"

    @property
    def tensors(self) -> Iterable[TensorInfo]:
        return (tensor for shard in self.shards for tensor in shard.header.tensors)


@dataclass(frozen=True, repr=False)
class Snapshot(Brief):
    """A described snapshot. `sidecars` are the files to carry over as they are, weights and indices excluded."""

    label: str
    repo: str | None
    commit: str | None
    pipeline: str | None
    components: tuple[Component, ...]
    sidecars: tuple[str, ...]
    files: Files


class LocalFiles:
    """A snapshot in a folder. Links may point inside it, or into the blobs of the Hub cache that it belongs to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.label = str(root)
        self._inside = (root.resolve(), (root / "../../blobs").resolve())

    def sizes(self) -> Mapping[str, int]:
        sizes = {}
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = sorted(f for f in subfolders if not f.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                try:
                    sizes[path.relative_to(self.root).as_posix()] = path.stat().st_size
                except OSError:  # a dangling link: reported when something needs the file
                    continue
        return sizes

    def local(self, path: str) -> Path:
        full = self.root / path
        resolved = full.resolve()
        if not any(resolved.is_relative_to(root) for root in self._inside):
            raise ConvertError(f"{path} in {self.label} links outside the snapshot; replace the link by its file.")
        return full

    def sha256(self, path: str) -> str | None:
        return None

    def read(self, path: str) -> bytes:
        try:
            return self.local(path).read_bytes()
        except OSError as error:
            raise ResumableError(
                f"{path} in {self.label} cannot be read ({error.strerror}); check its permissions."
            ) from error

    def header(self, path: str) -> Header:
        return read_header(self.local(path), f"{path} in {self.label}")


def describe(
    files: Files,
    *,
    repo: str | None = None,
    commit: str | None = None,
    variant: str | None = None,
    allow_converted: bool = False,
) -> Snapshot:
    """Read a snapshot's configs, indices and headers, and check that they fit together. Raises ConvertError."""
    sizes = files.sizes()
    if RECORD_FILE in sizes and not allow_converted:
        raise ConvertError(f"{files.label} was already converted by fp8-convert; give the original snapshot.")
    if MODEL_INDEX in sizes:
        model_index = read_json(files, MODEL_INDEX)
        pipeline = str(model_index.get("_class_name") or "") or None
        described = [_component(files, sizes, n, lib, cls, variant) for n, lib, cls in _entries(files, model_index)]
        components = tuple(c for c in described if c is not None)
        folders = {name for name, _, _ in _entries(files, model_index)}
    elif CONFIG in sizes:
        config = read_json(files, CONFIG)
        library = "diffusers" if "_class_name" in config else "transformers"
        alone = _component(files, sizes, "", library, _class_name(config), variant)
        pipeline, components, folders = None, (() if alone is None else (alone,)), set()
    else:
        raise ConvertError(
            f"{files.label} is no diffusers snapshot: it has neither {MODEL_INDEX} nor {CONFIG}; "
            "give a pipeline's folder, a component's folder or a Hub id."
        )
    if not components:
        raise ConvertError(f"{files.label} holds no safetensors weights; give a snapshot that does.")
    indices = {c.index for c in components}
    sidecars = tuple(p for p in sizes if _is_sidecar(p, folders) and p not in indices)
    for path in sidecars:
        _check_plain(path, files)
    return Snapshot(files.label, repo, commit, pipeline, components, sidecars, files)


def require_folder(path: Path) -> None:
    """Raise ConvertError unless a snapshot's folder lies at `path`."""
    if path.is_dir():
        return
    problem = f"{path} is a file" if path.exists() else f"The folder {path} does not exist"
    raise ConvertError(f"{problem}; give the folder of a snapshot on this machine.")


def needed_files(snapshot: Snapshot) -> list[str]:
    """Every file of the snapshot that a conversion reads or copies, sorted."""
    weights = [shard.path for c in snapshot.components for shard in c.shards]
    indices = [c.index for c in snapshot.components if c.index]
    return sorted({*weights, *indices, *snapshot.sidecars})


def read_json(files: Files, path: str) -> dict[str, Any]:
    """A JSON object from the snapshot. Raises ConvertError for anything else."""
    try:
        data = json.loads(files.read(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path} in {files.label} is not valid JSON; download it again.") from error
    if not isinstance(data, dict):
        raise ConvertError(f"{path} in {files.label} is not a JSON object; download it again.")
    return data


def _entries(files: Files, model_index: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(component, library, class) of every component that a model_index.json names."""
    entries = []
    for name, value in model_index.items():
        if name.startswith("_") or not (isinstance(value, list) and len(value) == 2):
            continue
        if not all(isinstance(v, str) for v in value):
            continue  # [null, null]: an optional component that this snapshot does without
        if PurePosixPath(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise ConvertError(
                f"{MODEL_INDEX} in {files.label} names the component {name!r}, which is no folder name; "
                "download it again."
            )
        entries.append((name, value[0], value[1]))
    return entries


def _component(
    files: Files,
    sizes: Mapping[str, int],
    name: str,
    library: str,
    class_name: str | None,
    variant: str | None,
) -> Component | None:
    """Describe one component; None if it has no weights to have (a tokenizer, a scheduler)."""
    prefix = f"{name}/" if name else ""
    names = [p.removeprefix(prefix) for p in sizes if p.startswith(prefix) and "/" not in p.removeprefix(prefix)]
    label = f"{name or 'the component'} in {files.label}"
    if not names:
        raise ConvertError(
            f"{MODEL_INDEX} names the component {label}, but there is no such folder with files in it (a link does "
            "not count); download it."
        )
    config = read_json(files, prefix + CONFIG) if CONFIG in names else {}
    if not any(n.endswith(".safetensors") for n in names):
        pickles = [n for n in names if n.endswith(_PICKLES) and n != "training_args.bin"]
        if pickles:
            raise ConvertError(
                f"{label} has only pickled weights ({pickles[0]}), and fp8-convert reads safetensors alone; "
                "save the pipeline with save_pretrained(safe_serialization=True) first."
            )
        if name == "" or "_class_name" in config or "architectures" in config:
            raise ConvertError(f"{label} has no weights; download its safetensors files.")
        return None
    default_stem = STEMS.get(library, STEMS["diffusers"])
    stem, index, shard_names = _choose_weights(files, prefix, names, default_stem, variant, label)
    shards = tuple(
        Shard(p, sizes[p], files.header(p), files.local(p), files.sha256(p)) for p in (prefix + n for n in shard_names)
    )
    component = Component(
        name, library, class_name or _class_name(config), config, stem, shards, index and prefix + index
    )
    _check_tensors(files, component)
    return component


def _choose_weights(
    files: Files, prefix: str, names: list[str], default_stem: str, variant: str | None, label: str
) -> tuple[str, str | None, list[str]]:
    """(stem, index file or None, shard files) of a component: what diffusers and transformers would load."""
    stems = [default_stem, *(s for s in STEMS.values() if s != default_stem)]
    for suffix in dict.fromkeys([variant, None]):
        for stem in stems:
            for index in _index_names(stem, suffix):
                if index in names:
                    return default_stem, index, _shards_of(files, prefix + index, names, label)
            single = f"{stem}.{suffix}.safetensors" if suffix else f"{stem}.safetensors"
            if single in names:
                return default_stem, None, [single]
    found = next(n for n in sorted(names) if n.endswith(".safetensors"))
    if re.search(r"-\d{5}-of-\d{5}\.safetensors$", found):
        raise ConvertError(f"{label} has shards such as {found} but no index file; download the .index.json too.")
    hint = re.fullmatch(r"(?:diffusion_pytorch_model|model)\.(\w+?)(?:-\d{5}-of-\d{5})?\.safetensors", found)
    advice = f"pass --variant {hint[1]}" if hint else f"rename it to {default_stem}.safetensors"
    raise ConvertError(f"{label} has {found} but no {default_stem}.safetensors; {advice}.")


def _index_names(stem: str, variant: str | None) -> list[str]:
    if variant is None:
        return [f"{stem}.safetensors.index.json"]
    return [
        f"{stem}.safetensors.index.{variant}.json",
        f"{stem}.safetensors.{variant}.index.json",
        f"{stem}.{variant}.safetensors.index.json",
    ]


def _shards_of(files: Files, index: str, names: list[str], label: str) -> list[str]:
    weight_map = read_json(files, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConvertError(f"{index} in {files.label} has no weight_map; download it again.")
    for tensor, shard in weight_map.items():
        if PurePosixPath(shard).name != shard or not shard.endswith(".safetensors") or not shard.isprintable():
            raise ConvertError(
                f"{index} in {files.label} puts {tensor!r} into {shard!r}, which is no shard of {label}; "
                "download it again."
            )
        if shard not in names:
            raise ConvertError(f"{index} in {files.label} names the shard {shard}, which is missing; download it.")
    return sorted(set(weight_map.values()))


def _check_tensors(files: Files, component: Component) -> None:
    """Every tensor lies in one shard, and each that the index names lies where it says."""
    where: dict[str, str] = {}
    for shard in component.shards:
        for tensor in shard.header.tensors:
            if tensor.name in where:
                raise ConvertError(
                    f"{tensor.name} stands in both {where[tensor.name]} and {shard.path} of {files.label}; "
                    "download the snapshot again."
                )
            where[tensor.name] = shard.path
    if component.index is None:
        return
    for name, file in read_json(files, component.index)["weight_map"].items():
        if where.get(name) != component.path(file):
            raise ConvertError(
                f"{component.index} in {files.label} puts {name!r} into {file}, which does not hold it; "
                "download both again."
            )


def _class_name(config: Mapping[str, Any]) -> str | None:
    architectures = config.get("architectures")
    name = config.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else None
    )
    return name if isinstance(name, str) else None


def _is_sidecar(path: str, folders: set[str]) -> bool:
    *parents, name = path.split("/")
    if parents and parents[0] not in folders:
        return False
    if name.startswith(".") or ".safetensors." in name or name.endswith((".bin.index.json", ".msgpack")):
        return False  # indices are written anew, or belong to weights that are left out
    return PurePosixPath(name).suffix.lower() in _SIDECAR_SUFFIXES or _SIDECAR_NAMES.fullmatch(name) is not None


def _check_plain(path: str, files: Files) -> None:
    if not path.isprintable():
        raise ConvertError(f"{files.label} holds a file whose name has control characters ({path!r}); rename it.")
    files.local(path)  # refuses a link that leaves the snapshot now, not when the file is copied
