"""A diffusers snapshot as data: components, shards, validated headers, sidecars. No weights are read here.

The same code describes a local folder and a Hub repository that is not downloaded; what differs stands behind
`Files`. Everything found here is untrusted: names that leave the snapshot are refused, only safetensors count.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ..format.header import Header, TensorInfo, read_header
from ..format.layout import RECORD_FILE
from ..format.untrusted import check_regular, open_regular, parse_json, read_whole
from ..telling.errors import ConvertError, ResumableError
from ..telling.notebook import Brief

MODEL_INDEX = "model_index.json"
CONFIG = "config.json"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}

# Several times what the largest real ones have: configs with lists of labels, indices with 100,000 tensors.
_MAX_CONFIG_BYTES = 4 * 1024 * 1024
_MAX_INDEX_BYTES = 32 * 1024 * 1024
_PIECE_BYTES = 4 * 1024 * 1024
_MAX_NAME_BYTES = 255  # what file systems take
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OTHER_WEIGHTS = "only the safetensors that a component loads are converted"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Weights in whatever format, and their indices: only the safetensors that are converted count.
_WEIGHTS = re.compile(
    r"(?i).*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|onnx|onnx_data\w*|msgpack|h5|gguf|ggml|pb|tflite|ot|engine|mlmodel"
    r"|pdparams)(\.data|(\.[\w-]+)?\.index(\.[\w-]+)?\.json)?|.*\.safetensors\..*"
)
_BLOAT = re.compile(
    r"(?i).*\.(png|jpe?g|gif|webp|bmp|tiff?|svg|ico|mp4|mov|webm|avi|wav|mp3|flac|pdf|zip|tar|t?gz|bz2|xz|7z|rar|pyc|log"
    r"|ipynb)|events\.out\.tfevents.*"
)
# Beside a pipeline's folders lie whole repositories: of them only what documents or configures.
_TOP_LEVEL_SUFFIXES = {
    ".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".merges", ".bpe", ".yaml", ".yml", ".md",
    ".py",
}  # fmt: skip
_TOP_LEVEL_NAMES = re.compile(r"(?i)(licen[cs]e|notice|copying|vocab|merges).*")
# What schedulers, tokenizers and processors are loaded from where their folder is missing: diffusers then looks here.
_ROOT_CONFIGS = {
    "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json",
}  # fmt: skip


class Files(Protocol):
    """Where a snapshot's files lie: a folder, or a Hub repository at one commit."""

    @property
    def label(self) -> str:
        """How errors name the snapshot."""

    @property
    def repo(self) -> str | None:
        """The Hub id, None for a folder."""

    @property
    def commit(self) -> str | None:
        """The Hub repository's commit, None for a folder."""

    @property
    def remote(self) -> bool:
        """Whether the files have yet to be downloaded."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file, by its path relative to the snapshot (posix). Listed once."""

    def read(self, path: str, limit: int) -> bytes:
        """The content of a file of at most `limit` bytes. Raises ConvertError."""

    def pieces(self, path: str) -> Iterator[bytes]:
        """The content of a file, whatever its size, a few megabytes at a time; as many bytes as `sizes` says."""

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
class LeftOut(Brief):
    """Files of a source that are not carried over: one file, or those of a folder (a path that ends in "/")."""

    path: str
    files: int
    bytes: int
    reason: str


@dataclass(frozen=True, repr=False)
class Snapshot(Brief):
    """A described snapshot. `sidecars` are the files to carry over as they are, weights and indices excluded.

    remarks: sentences on what is unusual in it, for the user.
    """

    label: str
    repo: str | None
    commit: str | None
    pipeline: str | None
    components: tuple[Component, ...]
    sidecars: tuple[str, ...]
    files: Files
    left_out: tuple[LeftOut, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceFile:
    """A file of a snapshot on this machine.

    where: how errors name it. stat: what `file_stat` gave before its header was read.
    """

    path: Path
    where: str
    stat: tuple[int, ...]

    def check_unchanged(self) -> None:
        """Raise ResumableError if the file is no longer the one that was described."""
        if file_stat(self.path) != self.stat:
            raise ResumableError(f"{self.where} changed while it was read; run again.")


class LocalFiles:
    """A snapshot in a folder. Links may point inside it, or into the blobs of the Hub cache that it belongs to."""

    repo: str | None = None
    commit: str | None = None
    remote = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.label = str(root)
        self._inside = (root.resolve(), *_hub_blobs(root))
        self._listed: dict[str, int] | None = None
        self._stats: dict[str, tuple[int, ...]] = {}

    def sizes(self) -> Mapping[str, int]:
        if self._listed is None:
            self._listed = self._list()
        return self._listed

    def _list(self) -> dict[str, int]:
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

    def read(self, path: str, limit: int) -> bytes:
        return read_whole(self.local(path), f"{path} in {self.label}", limit)

    def pieces(self, path: str) -> Iterator[bytes]:
        return file_pieces(self.local(path), f"{path} in {self.label}", self.sizes()[path])

    def header(self, path: str) -> Header:
        self.open(path)  # before the header: what is read later must be the same file
        return read_header(self.local(path), f"{path} in {self.label}")

    def open(self, path: str) -> SourceFile:
        """The file as it was when this was first asked of it, or its header read."""
        local = self.local(path)
        if path not in self._stats:
            self._stats[path] = file_stat(local)
        return SourceFile(local, path, self._stats[path])


def content_sha256(files: Files, path: str) -> str:
    """sha256 of a file of the snapshot, read in pieces."""
    digest = hashlib.sha256()
    for piece in files.pieces(path):
        digest.update(piece)
    return digest.hexdigest()


def file_pieces(path: Path, where: str, size: int) -> Iterator[bytes]:
    """A regular file's `size` bytes, a few megabytes at a time. Raises ResumableError if it has others by now."""
    left = size
    try:
        with open(open_regular(path, where), "rb", buffering=0) as file:
            while piece := file.read(min(_PIECE_BYTES, left + 1)):
                left -= len(piece)
                if left < 0:
                    break
                yield piece
    except OSError as error:
        raise ResumableError(f"{where} cannot be read ({error.strerror}); check the disk and run again.") from error
    if left:
        raise ResumableError(f"{where} changed while it was read; run again.")


def file_stat(path: Path) -> tuple[int, ...]:
    """What tells, without reading it, that a file is the one seen before. Raises ResumableError."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ResumableError(f"{path} cannot be opened ({error.strerror}); check the path and permissions.") from error
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def describe(files: Files, *, variant: str | None = None, allow_converted: bool = False) -> Snapshot:
    """Read a snapshot's configs, indices and headers, and check that they fit together. Raises ConvertError."""
    sizes = files.sizes()
    if RECORD_FILE in sizes and not allow_converted:
        raise ConvertError(f"{files.label} was already converted by fp8-convert; give the original snapshot.")
    remarks: list[str] = []
    root_is_component = False
    if MODEL_INDEX in sizes:
        model_index = read_json(files, MODEL_INDEX)
        pipeline = str(model_index.get("_class_name") or "") or None
        entries = _entries(files, model_index)
        found = [_component(files, sizes, *entry, variant, pipeline, remarks) for entry in entries]
        folders = {name for name, _, _ in entries}
        root_is_component = bool(_ROOT_CONFIGS & sizes.keys()) and any(not _names_in(sizes, f"{n}/") for n in folders)
    elif CONFIG in sizes:
        config = read_json(files, CONFIG)
        library = "diffusers" if "_class_name" in config else "transformers"
        found = [_component(files, sizes, "", library, _class_name(config), variant, None, remarks)]
        pipeline, folders, root_is_component = None, set(), True
    else:
        raise ConvertError(
            f"{files.label} is no diffusers snapshot: it has neither {MODEL_INDEX} nor {CONFIG}; "
            "give a pipeline's folder, a component's folder or a Hub id."
        )
    components = tuple(c for c in found if c is not None)
    if not components:
        raise ConvertError(f"{files.label} holds no safetensors weights; give a snapshot that does.")
    read = {path for c in components for path in (*(s.path for s in c.shards), c.index)}
    sidecars, left_out = _beside_weights(files, [p for p in sizes if p not in read], folders, root_is_component)
    return Snapshot(
        files.label,
        files.repo,
        files.commit,
        pipeline,
        components,
        sidecars,
        files,
        left_out,
        tuple(remarks),
    )


def outline(files: Files) -> tuple[str | None, dict[str, str | None]]:
    """The pipeline's class and those of its components with weights, from the model index and the file names alone.

    A component that is its own snapshot has the name "". Raises ConvertError for an index that cannot be read.
    """
    sizes = files.sizes()
    if MODEL_INDEX in sizes:
        index = read_json(files, MODEL_INDEX)
        folders = {path.partition("/")[0] for path in sizes if path.endswith(".safetensors") and "/" in path}
        classes: dict[str, str | None] = {n: cls for n, _, cls in _entries(files, index) if n in folders}
        return str(index.get("_class_name") or "") or None, classes
    return None, {"": _class_name(read_json(files, CONFIG))} if CONFIG in sizes else {}


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
    """A JSON object from the snapshot: a config or an index. Raises ConvertError for anything else."""
    is_index = ".safetensors." in PurePosixPath(path).name
    raw = files.read(path, _MAX_INDEX_BYTES if is_index else _MAX_CONFIG_BYTES)
    try:
        data = parse_json(raw)
    except ValueError as error:
        raise ConvertError(f"{path} in {files.label} {error}; download it again.") from error
    if not isinstance(data, dict):
        raise ConvertError(f"{path} in {files.label} is not a JSON object; download it again.")
    return data


def _hub_blobs(root: Path) -> list[Path]:
    """The blobs that a Hub cache's snapshot (models--…/snapshots/COMMIT), or a folder in one, may link to."""
    whole = Path(os.path.abspath(root))
    for folder in (whole, *whole.parents):
        snapshots, repo = folder.parent, folder.parent.parent
        if snapshots.name == "snapshots" and repo.name.startswith("models--") and _COMMIT.fullmatch(folder.name):
            return [(repo / "blobs").resolve()]
    return []


def _entries(files: Files, model_index: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(component, library, class) of every component that a model_index.json names."""
    entries = []
    for name, value in model_index.items():
        if name.startswith("_") or not (isinstance(value, list) and len(value) == 2):
            continue
        if not all(isinstance(v, str) for v in value):
            continue  # [null, null]: an optional component that this snapshot does without
        if not name.isidentifier() or len(name.encode()) > _MAX_NAME_BYTES:  # a pipeline takes it as an argument
            raise ConvertError(
                f"{MODEL_INDEX} in {files.label} names the component {name!r:.80}, which is no name that a pipeline "
                "could take; download it again."
            )
        entries.append((name, value[0], value[1]))
    return entries


def _names_in(sizes: Mapping[str, int], prefix: str) -> list[str]:
    """Names of the files that lie directly in a folder."""
    return [p.removeprefix(prefix) for p in sizes if p.startswith(prefix) and "/" not in p.removeprefix(prefix)]


def _component(
    files: Files,
    sizes: Mapping[str, int],
    name: str,
    library: str,
    class_name: str | None,
    variant: str | None,
    pipeline: str | None,
    remarks: list[str],
) -> Component | None:
    """Describe one component; None if it has no weights to have (a tokenizer, a scheduler).

    What diffusers loads all the same, or never looks at, is no error: it is added to `remarks`.
    """
    prefix = f"{name}/" if name else ""
    names = _names_in(sizes, prefix)
    label = f"{name or 'the component'} in {files.label}"
    if not names:
        if _ROOT_CONFIGS & sizes.keys():
            remarks.append(f"{name} has no folder of its own: its files beside {MODEL_INDEX} are carried over")
        elif not _is_taken(pipeline, name):
            remarks.append(f"{MODEL_INDEX} names {name}, which has no files and which {pipeline} does not take")
        else:
            raise ConvertError(
                f"{MODEL_INDEX} names the component {label}, but there is no such folder with files in it (a link does "
                "not count); download it."
            )
        return None
    config = read_json(files, prefix + CONFIG) if CONFIG in names else {}
    if not any(n.endswith(".safetensors") for n in names):
        pickles = [n for n in names if n.endswith(_PICKLES) and n != "training_args.bin"]
        weightless = not pickles and name and "_class_name" not in config and "architectures" not in config
        if weightless:
            return None
        if name and (not _is_taken(pipeline, name) or not _is_known(library)):
            remarks.append(f"{name} has no safetensors weights: its other files are carried over as they are")
            return None
        if pickles:
            raise ConvertError(
                f"{label} has only pickled weights ({pickles[0]}), and fp8-convert reads safetensors alone; "
                "save the pipeline with save_pretrained(safe_serialization=True) first."
            )
        raise ConvertError(f"{label} has no weights; download its safetensors files.")
    default_stem = STEMS.get(library, STEMS["diffusers"])
    stem, index, shard_names = _choose_weights(files, prefix, names, default_stem, variant, label)
    shards = tuple(_shard(files, prefix + n) for n in shard_names)
    component = Component(
        name, library, class_name or _class_name(config), config, stem, shards, index and prefix + index
    )
    _check_tensors(files, component)
    return component


def _shard(files: Files, path: str) -> Shard:
    return Shard(path, files.sizes()[path], files.header(path), files.sha256(path))


def _is_taken(pipeline: str | None, name: str) -> bool:
    """Whether the pipeline's class takes the component: diffusers ignores what it does not.

    Asked where something is missing alone, for it imports diffusers.
    """
    import diffusers

    try:
        cls = getattr(diffusers, pipeline or "", None)
    except (ImportError, RuntimeError):  # one that needs what is not installed
        return True
    return not isinstance(cls, type) or name in inspect.signature(cls).parameters


def _is_known(library: str) -> bool:
    """Whether a component's class is one whose from_pretrained needs weights, as those of other libraries may not."""
    from diffusers import pipelines

    return library in STEMS or library in dir(pipelines)


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


def _hidden(path: str) -> bool:
    """Whether the file, or a folder on the way to it, is one of git's, the Hub client's or the like."""
    return any(part.startswith(".") for part in path.split("/"))


def _beside_weights(
    files: Files, paths: list[str], folders: set[str], root_is_component: bool
) -> tuple[tuple[str, ...], tuple[LeftOut, ...]]:
    """What to carry over of the files that are no weights or indices of components, and what is left out."""
    sizes = files.sizes()
    sidecars, groups = [], dict[tuple[str, str], list[str]]()
    for path in paths:
        if _hidden(path):
            continue
        reason = _why_left(path, folders, root_is_component, MODEL_INDEX in sizes)
        if reason is None:
            _check_sidecar(path, files)
            sidecars.append(path)
        else:  # one entry per top-level folder and reason; what lies beside model_index.json counts as one folder
            folder, slash, _ = path.partition("/")
            groups.setdefault((f"{folder}/" if slash else "./", reason), []).append(path)
    left_out = (
        LeftOut(paths[0] if len(paths) == 1 else folder, len(paths), sum(sizes[p] for p in paths), reason)
        for (folder, reason), paths in groups.items()
    )
    return tuple(sidecars), tuple(left_out)


def _why_left(path: str, folders: set[str], root_is_component: bool, is_pipeline: bool) -> str | None:
    """Why a file is not carried over, None if it is: all that the loading of a component may read."""
    *parents, name = path.split("/")
    if parents and parents[0] not in folders:
        return f"{MODEL_INDEX} does not name it" if is_pipeline else "a component's files lie in its own folder"
    if _WEIGHTS.fullmatch(name):
        return _OTHER_WEIGHTS
    known = PurePosixPath(name).suffix.lower() in _TOP_LEVEL_SUFFIXES or _TOP_LEVEL_NAMES.fullmatch(name)
    if not known and (_BLOAT.fullmatch(name) or not (parents or root_is_component)):
        return "no pipeline reads it"
    return None


def _check_sidecar(path: str, files: Files) -> None:
    if not path.isprintable():
        raise ConvertError(f"{files.label} holds a file whose name has control characters ({path!a}); rename it.")
    if any(not part or len(part.encode()) > _MAX_NAME_BYTES for part in path.split("/")):  # "..": hidden, as all dots
        raise ConvertError(f"{files.label} holds a file with a name that cannot be written ({path!a:.300}); rename it.")
    local = files.local(path)  # refuses a link that leaves the snapshot now, not when the file is copied
    if local is not None:
        check_regular(local, f"{path} in {files.label}")
