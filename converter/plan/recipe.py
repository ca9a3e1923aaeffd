"""What the user asked for, as one frozen value: all that the output depends on beside the source and the tool."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..format.layout import Block
from ..format.reader import as_json
from ..format.record import RecordedLora
from ..targets.choosing import TARGETS
from ..targets.target import NATIVE, Target
from ..telling.errors import SettingsError
from ..telling.notebook import Brief
from .manifest import Manifest

if TYPE_CHECKING:
    from .lora import Lora

ACTIVATION_SCHEMES = ("dynamic", "static")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def tool_version() -> str:
    """The installed version of fp8-convert."""
    return version("fp8-convert")


@dataclass(frozen=True, repr=False)
class Recipe(Brief):
    """One conversion's settings.

    ignored_layers: patterns beside the manifest's. components: restricts the conversion to these folders; () is
    all that the manifest converts. block: block size for the DiT's weights, None for the manifest's choice.
    input_scales: per module the activation scale of the static scheme. max_shard_size: the most bytes of an output
    file, as far as whole tensors allow; None cuts none. target: who reads the output. loras: those to merge, one after
    the other; merged: those that an import's base was made with. `Settings.resolve` makes one of what a user states.
    """

    manifest: Manifest
    ignored_layers: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    compact: bool = False
    block: Block | None = None
    activation_scheme: str = "dynamic"
    input_scales: Mapping[str, float] | None = None
    max_shard_size: int | None = None
    target: str = NATIVE.name
    loras: tuple[Lora, ...] = ()
    merged: tuple[RecordedLora, ...] = ()

    @property
    def reader(self) -> Target:
        """What the target decides."""
        return TARGETS[self.target]

    def to_json(self) -> dict[str, Any]:
        """The recipe as the record states it."""
        return {
            "quantization": "fp8",
            "manifest": self.manifest.name,
            "manifest_sha256": self.manifest.sha256,
            "ignored_layers": list(self.ignored_layers),
            "components": list(self.components),
            "compact": self.compact,
            "weight_block_size": list(self.block) if self.block else None,
            "activation_scheme": self.activation_scheme,
            "max_shard_size": self.max_shard_size,
            "target": self.target,
            "input_scales_sha256": _digest(dict(self.input_scales)) if self.input_scales else None,
            "merged_loras": [*as_json(self.merged), *(lora.to_json() for lora in self.loras)],
        }

    def sha256(self) -> str:
        """A digest of the recipe and the tool's version: equal digests over equal sources give equal bytes."""
        return recipe_sha256(tool_version(), self.to_json())


def recipe_sha256(version: str, recipe: Mapping[str, Any]) -> str:
    """The digest of a recipe, as the record states it, under a version of the tool."""
    return _digest({"tool": version, **recipe})


def check_scales(activation_scheme: str, block: Block | None, has_input_scales: bool) -> None:
    """Raise SettingsError where activation scheme, block scales and input scales contradict one another."""
    static = activation_scheme == "static"
    if static and block is not None:
        raise SettingsError("Block scales come with dynamic activations alone; drop one of the two options.")
    if static and not has_input_scales:
        raise SettingsError("The static activation scheme needs calibrated scales; pass them with --input-scales FILE.")
    if has_input_scales and not static:
        raise SettingsError("Input scales are for --activation-scheme static; add it or drop --input-scales.")


def parse_size(size: int | str | None) -> int | None:
    """Bytes from a size as diffusers writes it: a number, or "5GB", "500MB", "200KB" (decimal units); None is no limit.

    Raises ValueError for anything else, and for sizes below one byte.
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size), re.IGNORECASE | re.ASCII)
    found = 0 if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
    if found < 1 or isinstance(size, bool):
        raise ValueError
    return found


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
