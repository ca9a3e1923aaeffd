"""What a snapshot holds beside its weights: what is carried over as it is, and what is left out and why."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ..format.untrusted import check_regular
from ..telling.errors import ConvertError
from .files import MAX_NAME_BYTES, Files
from .snapshot import MODEL_INDEX, LeftOut

_OTHER_WEIGHTS = "only the safetensors that a component loads are converted"
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


def beside_weights(
    files: Files, paths: list[str], folders: set[str], root_is_component: bool
) -> tuple[dict[str, int], tuple[LeftOut, ...]]:
    """What to carry over of the files that are no weights or indices of components, and what is left out.

    What is carried over is given with its bytes, by path.
    """
    sizes = files.sizes()
    sidecars, groups = dict[str, int](), dict[tuple[str, str], list[str]]()
    for path in paths:
        if _hidden(path):
            continue
        reason = _why_left(path, folders, root_is_component, MODEL_INDEX in sizes)
        if reason is None:
            _check_sidecar(path, files)
            sidecars[path] = sizes[path]
        else:  # one entry per top-level folder and reason; what lies beside model_index.json counts as one folder
            folder, slash, _ = path.partition("/")
            groups.setdefault((f"{folder}/" if slash else "./", reason), []).append(path)
    left_out = (
        LeftOut(paths[0] if len(paths) == 1 else folder, len(paths), sum(sizes[p] for p in paths), reason)
        for (folder, reason), paths in groups.items()
    )
    return sidecars, tuple(left_out)


def _why_left(path: str, folders: set[str], root_is_component: bool, is_pipeline: bool) -> str | None:
    """Why a file is not carried over, None if it is: all that the loading of a component may read."""
    *parents, name = path.split("/")
    if parents and parents[0] not in folders:
        return f"{MODEL_INDEX} does not name it" if is_pipeline else "a component's files are in its own folder"
    if _WEIGHTS.fullmatch(name):
        return _OTHER_WEIGHTS
    known = PurePosixPath(name).suffix.lower() in _TOP_LEVEL_SUFFIXES or _TOP_LEVEL_NAMES.fullmatch(name)
    if not known and (_BLOAT.fullmatch(name) or not (parents or root_is_component)):
        return "no pipeline reads it"
    return None


def _hidden(path: str) -> bool:
    """Whether the file, or a folder on the way to it, is one of git's, the Hub client's or the like."""
    return any(part.startswith(".") for part in path.split("/"))


def _check_sidecar(path: str, files: Files) -> None:
    if not path.isprintable():
        raise ConvertError(f"{files.label} holds a file whose name has control characters ({path!a}); rename it.")
    if any(not part or len(part.encode()) > MAX_NAME_BYTES for part in path.split("/")):  # "..": hidden, as all dots
        raise ConvertError(f"{files.label} holds a file with a name that cannot be written ({path!a:.300}); rename it.")
    local = files.local(path)  # refuses a link that leaves the snapshot now, not when the file is copied
    if local is not None:
        check_regular(local, f"{path} in {files.label}")
