"""A plan whose components are one file each, as ComfyUI reads them: files in its folders, card and licences.

Tokenizers, schedulers and configs are ComfyUI's own. What it has no names for is left out and said, or refused where
it was to become FP8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..format import layout
from ..snapshot.foreign_config import COMFY_METADATA
from ..snapshot.snapshot import Component, Snapshot
from ..targets.comfyui import Extra, extras_of, file_path, quantization_metadata
from ..targets.key_map import KeyMap
from ..targets.key_maps import key_map
from ..telling.errors import ConvertError
from ..telling.quantities import plural
from .plan import ComponentPlan, Plan
from .recipe import Recipe
from .single_file import lay_out_single_file, original_modules

_CARRIED = re.compile(r"(?i)(licen[cs]e|notice|copying)[^/]*|README\.md")  # what says whose the model is


def single_files(snapshot: Snapshot, recipe: Recipe, components: Sequence[ComponentPlan], notes: Iterable[str]) -> Plan:
    """The plan with every component in one file. notes: on what was decided.

    Raises ConvertError for what cannot be written so.
    """
    if recipe.max_shard_size is not None:
        raise ConvertError(f"--target {recipe.target} writes one file a component; drop --max-shard-size.")
    written: list[ComponentPlan] = []
    said = list(notes)
    for component in components:
        if why := _why_left_out(component, recipe, snapshot.sidecars):
            said.append(f"{component.source.label} is left out: {why}")
        else:
            written.append(_in_one_file(component, recipe, snapshot.sidecars))
    read = {e.file: snapshot.sidecars[e.file] for c in written if c.single for e in c.single.extras if e.file}
    carried = {path: size for path, size in snapshot.sidecars.items() if _CARRIED.fullmatch(path)}
    if others := snapshot.sidecars.keys() - carried.keys() - read.keys():
        said.append(f"{plural(len(others), 'file')} (configs, tokenizers and the like) left out: ComfyUI has its own")
    mine = replace(snapshot, components=tuple(c.source for c in written), sidecars=carried | read)
    return Plan(mine, recipe, tuple(written), {}, carried, (*snapshot.remarks, *said))


def _why_left_out(component: ComponentPlan, recipe: Recipe, sidecars: Mapping[str, int]) -> str | None:
    """Why a component is not written, as a clause. One that becomes FP8 is always written, or refused."""
    source = component.source
    if recipe.components and source.name not in recipe.components:
        return "not among the components asked for, and every file of ComfyUI's stands alone"
    if component.rules is not None:
        return None
    if _names(source) is None:
        return f"the names in ComfyUI of {source.class_name} are not known to this version; take ComfyUI's own file"
    try:
        extras_of(source, sidecars)
    except LookupError as error:
        return f"{error.args[0]}; take ComfyUI's own file"
    return None


def _in_one_file(component: ComponentPlan, recipe: Recipe, sidecars: Mapping[str, int]) -> ComponentPlan:
    source, names = component.source, _names(component.source)
    assert names is not None
    extras = _extras(source, sidecars)
    tensors = list(component.tensors)
    modules = original_modules(tensors, names)
    metadata = {}
    if modules:
        metadata = {layout.METADATA_KEY: layout.encode_modules(modules), COMFY_METADATA: quantization_metadata(modules)}
    path = file_path(recipe.manifest.name, source.name, source.class_name or "", bool(modules))
    single = lay_out_single_file(tensors, names, path, metadata, extras)
    shards = tuple(replace(shard, files=()) for shard in component.shards)
    return replace(component, shards=shards, config=None, single=single)


def _extras(source: Component, sidecars: Mapping[str, int]) -> tuple[Extra, ...]:
    try:
        return extras_of(source, sidecars)
    except LookupError as error:
        raise ConvertError(f"{source.label} cannot be written for ComfyUI: {error.args[0]}.") from error


def _names(component: Component) -> KeyMap | None:
    return key_map(component.class_name, component.config)
