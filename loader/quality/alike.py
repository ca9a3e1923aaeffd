"""Are two snapshots the same pipeline but for FP8? What cannot be compared is refused, what is not alike is told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ...converter.format import layout
from ...converter.format.record import Record
from ...converter.snapshot.files import Files, content_sha256, read_json
from ...converter.snapshot.snapshot import MODEL_INDEX, Component, Snapshot
from ...converter.telling.errors import ConvertError
from ..checkpoint import fp8_modules

# What a config says of who wrote it, and not of the model.
_OF_THE_WRITER = {
    "_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "transformers_version", "dtype",
    "torch_dtype", layout.CONFIG_KEY,
}  # fmt: skip
_TEXTS = (".md", ".txt", ".gitattributes")


def check_alike(fp8: Snapshot, original: Snapshot) -> None:
    """Raise ConvertError unless both are the same pipeline of the same components, with the same tensors."""
    said = f"{fp8.label} and {original.label} cannot be compared"
    if fp8.pipeline != original.pipeline:
        raise ConvertError(f"{said}: one is {_pipeline(fp8)} and the other {_pipeline(original)}.")
    if fp8.pipeline is None:
        raise ConvertError(f"{said}: they are single components, and pictures need pipelines; give those.")
    if fp8.classes != original.classes:
        one, other = (sorted(f"{n} ({c})" for n, c in s.classes.items()) for s in (fp8, original))
        apart = [*(x for x in one if x not in other), *(x for x in other if x not in one)]
        raise ConvertError(f"{said}: not both have {', '.join(apart)}.")
    theirs = {component.name: component for component in original.components}
    for component in fp8.components:
        _check_tensors(component, theirs[component.name], said)


def differences(fp8: tuple[Snapshot, Files], original: tuple[Snapshot, Files], record: Record | None) -> Iterator[str]:
    """What differs beside FP8, a sentence each: configs, schedulers, tokenizers, and where the FP8 one came from."""
    theirs = {component.name: component for component in original[0].components}
    for component in fp8[0].components:
        if keys := _keys_apart(component.config, theirs[component.name].config):
            yield f"the configs of {component.label} differ in {_listed(keys)}"
    yield from _sidecars(fp8, original)
    if record is None:
        return
    source = record.source
    if source.repo and original[0].repo and (source.repo, source.commit) != (original[0].repo, original[0].commit):
        yield (
            f"the FP8 snapshot was made from {source.repo} at commit {source.commit}, and the original here is "
            f"{original[0].repo} at commit {original[0].commit}"
        )
    for lora in record.recipe.merged_loras:
        yield f"{lora} is merged into the FP8 snapshot, and not into the original"


def _pipeline(snapshot: Snapshot) -> str:
    return snapshot.pipeline or "a single component"


def _check_tensors(fp8: Component, original: Component, said: str) -> None:
    scales = {module + suffix for module in fp8_modules(fp8).modules for suffix in layout.SCALE_SUFFIXES}
    mine = {t.name: t.shape for t in fp8.tensors if t.name not in scales}
    theirs = {t.name: t.shape for t in original.tensors}
    if mine == theirs:
        return
    name = next(n for n in [*mine, *theirs] if mine.get(n) != theirs.get(n))
    one, other = (f"the shape {list(held[name])}" if name in held else "no place" for held in (mine, theirs))
    keys = _keys_apart(fp8.config, original.config)
    because = f" (their configs differ in {_listed(keys)})" if keys else ""
    raise ConvertError(
        f"{said}: {name} of {fp8.label} has {one} in one and {other} in the other{because}; give the original that the "
        "FP8 snapshot was converted from."
    )


def _sidecars(fp8: tuple[Snapshot, Files], original: tuple[Snapshot, Files]) -> Iterator[str]:
    """Schedulers, tokenizers, processors and the model index: every file that a pipeline is built from."""
    mine, theirs = ({p for p in s.sidecars if not p.endswith(_TEXTS)} for s, _ in (fp8, original))
    configs = {component.path("config.json") for component in fp8[0].components}
    for path in sorted((mine | theirs) - configs - {layout.RECORD_FILE}):
        if "/" not in path and path != MODEL_INDEX:
            continue
        if path not in mine or path not in theirs:
            yield f"{path} is in {'the original' if path in theirs else 'the FP8 snapshot'} alone"
        elif content_sha256(fp8[1], path) != content_sha256(original[1], path):
            keys = _keys_apart(read_json(fp8[1], path), read_json(original[1], path)) if _is_config(path) else []
            if keys or not _is_config(path):
                yield f"{path} differs{f' in {_listed(keys)}' if keys else ''}"


def _is_config(path: str) -> bool:
    return path.endswith(("config.json", MODEL_INDEX))


def _keys_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, with both."""
    keys = sorted((one.keys() | other.keys()) - _OF_THE_WRITER)
    return [f"{k} ({_brief(one.get(k))} and {_brief(other.get(k))})" for k in keys if one.get(k) != other.get(k)]


def _brief(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False)!s:.60}"


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
