"""From files to a described snapshot: its configs, indices and headers are read, no weights.

The same for a local folder and a Hub repository that is not downloaded. Everything found here is untrusted: names that
leave the snapshot are refused, only safetensors count.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..format.layout import RECORD_FILE
from ..telling.errors import ConvertError
from .files import MAX_NAME_BYTES, Files, read_json
from .sidecars import beside_weights
from .single_files import describe_single_files
from .snapshot import CONFIG, MODEL_INDEX, STEMS, Component, Shard, Snapshot
from .weights import check_tensors, choose_weights

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# What schedulers, tokenizers and processors are loaded from where their folder is missing: diffusers then looks here.
_ROOT_CONFIGS = {
    "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json",
}  # fmt: skip


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
        found = [_component(files, *entry, variant, pipeline, remarks) for entry in entries]
        folders = {name for name, _, _ in entries}
        root_is_component = bool(_ROOT_CONFIGS & sizes.keys()) and any(not _names_in(sizes, f"{n}/") for n in folders)
    elif CONFIG in sizes:
        config = read_json(files, CONFIG)
        library = "diffusers" if "_class_name" in config else "transformers"
        found = [_component(files, "", library, None, variant, None, remarks)]
        pipeline, folders, root_is_component = None, set(), True
    elif RECORD_FILE in sizes:
        return describe_single_files(files)
    else:
        raise ConvertError(
            f"{files.label} is not a diffusers snapshot: it has neither {MODEL_INDEX} nor {CONFIG}; "
            "give a pipeline's folder, a component's folder or a Hub id."
        )
    components = tuple(c for c in found if c is not None)
    if not components:
        raise ConvertError(f"{files.label} has no safetensors weights; give a snapshot that does.")
    read = {path for c in components for path in (*(s.path for s in c.shards), c.index)}
    sidecars, left_out = beside_weights(files, [p for p in sizes if p not in read], folders, root_is_component)
    return Snapshot(
        files.label,
        files.repo,
        files.commit,
        pipeline,
        components,
        sidecars,
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
    return None, {"": _class_name(files, CONFIG, read_json(files, CONFIG))} if CONFIG in sizes else {}


def _entries(files: Files, model_index: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(component, library, class) of every component that a model_index.json names."""
    entries = []
    for name, value in model_index.items():
        if name.startswith("_") or not (isinstance(value, list) and len(value) == 2):
            continue
        if not all(isinstance(v, str) for v in value):
            continue  # [null, null]: an optional component that this snapshot does without
        if not name.isidentifier() or len(name.encode()) > MAX_NAME_BYTES:  # a pipeline takes it as an argument
            raise ConvertError(
                f"{MODEL_INDEX} in {files.label} names the component {name!r:.80}, which is not a name that a pipeline "
                "can take; download it again."
            )
        entries.append((name, _checked(files, MODEL_INDEX, value[0]), _checked(files, MODEL_INDEX, value[1])))
    return entries


def _component(
    files: Files,
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
    names = _names_in(files.sizes(), prefix)
    label = f"{name or 'the component'} in {files.label}"
    config = read_json(files, prefix + CONFIG) if CONFIG in names else {}
    if not any(n.endswith(".safetensors") for n in names):
        remark = _without_weights(files, name, library, config, pipeline)
        remarks += [remark] if remark else []
        return None
    default_stem = STEMS.get(library, STEMS["diffusers"])
    stem, index, shard_names = choose_weights(files, prefix, names, default_stem, variant, label)
    shards = tuple(_shard(files, prefix + n) for n in shard_names)
    class_name = class_name or _class_name(files, prefix + CONFIG, config)
    component = Component(name, library, class_name, config, stem, shards, index and prefix + index)
    check_tensors(files, component)
    return component


def _without_weights(
    files: Files, name: str, library: str, config: Mapping[str, Any], pipeline: str | None
) -> str | None:
    """The remark on a component that has no safetensors weights, None where that is usual.

    Raises ConvertError where its weights are missing, or are pickled.
    """
    names = _names_in(files.sizes(), f"{name}/" if name else "")
    label = f"{name or 'the component'} in {files.label}"
    if not names:
        if _ROOT_CONFIGS & files.sizes().keys():
            return f"{name} has no folder of its own: its files beside {MODEL_INDEX} are carried over"
        if not _is_taken(pipeline, name):
            return f"{MODEL_INDEX} names {name}, which has no files and which {pipeline} does not take"
        raise ConvertError(
            f"{MODEL_INDEX} names the component {label}, but there is no such folder with files in it (a link does "
            "not count); download it."
        )
    pickles = [n for n in names if n.endswith(_PICKLES) and n != "training_args.bin"]
    if not pickles and name and "_class_name" not in config and "architectures" not in config:
        return None
    if name and (not _is_taken(pipeline, name) or not _is_known(library)):
        return f"{name} has no safetensors weights: its other files are carried over as they are"
    if pickles:
        raise ConvertError(
            f"{label} has only pickled weights ({pickles[0]}), and fp8-convert reads safetensors alone; "
            "save the pipeline with save_pretrained(safe_serialization=True) first."
        )
    raise ConvertError(f"{label} has no weights; download its safetensors files.")


def _shard(files: Files, path: str) -> Shard:
    return Shard(path, files.sizes()[path], files.header(path), files.sha256(path))


def _names_in(sizes: Mapping[str, int], prefix: str) -> list[str]:
    """Names of the files that lie directly in a folder."""
    return [p.removeprefix(prefix) for p in sizes if p.startswith(prefix) and "/" not in p.removeprefix(prefix)]


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


def _class_name(files: Files, path: str, config: Mapping[str, Any]) -> str | None:
    """The class that the config at `path` names."""
    architectures = config.get("architectures")
    name = config.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else None
    )
    return _checked(files, path, name) if isinstance(name, str) else None


def _checked(files: Files, path: str, name: str) -> str:
    """The name of a component's class or library, as the file at `path` gives it, if messages can repeat it."""
    if not name.isprintable() or len(name) > MAX_NAME_BYTES:
        raise ConvertError(
            f"{path} in {files.label} gives a class or a library the name {name!r:.80}; download it again."
        )
    return name
