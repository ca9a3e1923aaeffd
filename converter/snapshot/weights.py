"""Which safetensors files a component's weights are in: what diffusers and transformers would load."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ..telling.errors import ConvertError
from .files import Files, read_json
from .snapshot import STEMS, Component


def choose_weights(
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


def check_tensors(files: Files, component: Component) -> None:
    """Every tensor lies in one shard, and each that the index names lies where it says."""
    where: dict[str, str] = {}
    for shard in component.shards:
        for tensor in shard.header.tensors:
            if tensor.name in where:
                raise ConvertError(
                    f"{tensor.name} is in both {where[tensor.name]} and {shard.path} of {files.label}; "
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
                f"{index} in {files.label} puts {tensor!r} into {shard!r}, which is not a shard of {label}; "
                "download it again."
            )
        if shard not in names:
            raise ConvertError(f"{index} in {files.label} names the shard {shard}, which is missing; download it.")
    return sorted(set(weight_map.values()))
