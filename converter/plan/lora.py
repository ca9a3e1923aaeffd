"""A LoRA as pairs of matrices by the weights of a snapshot that they are for.

A weight W [N, K] becomes W + factor * (B @ A), with A [rank, K], B [N, rank] and factor = scale * alpha / rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..snapshot.snapshot import Snapshot
from ..telling.errors import ConvertError
from ..telling.notebook import Brief
from .lora_config import check_config, config_of, stated_alpha
from .lora_file import LoraFile, open_lora
from .lora_names import read_modules
from .lora_request import LoraRequest

_DIT = "transformer"


@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Brief):
    """What is added to a weight [N, K]: factor * (b @ a), with a [rank, K] and b [N, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    factor: float


@dataclass(frozen=True, eq=False, repr=False)
class Lora(Brief):
    """One LoRA file and what it adds, by component and module. component: the DiT that was named for it."""

    label: str
    sha256: str
    config_sha256: str | None
    scale: float
    component: str | None
    changes: Mapping[tuple[str, str], LowRank]

    def to_json(self) -> dict[str, Any]:
        """As the recipe states it."""
        return {
            "sha256": self.sha256,
            "config_sha256": self.config_sha256,
            "scale": self.scale,
            "component": self.component,
        }


def read_lora(request: LoraRequest, snapshot: Snapshot, converted: Collection[str] = ()) -> Lora:
    """Read a LoRA for the snapshot. converted: the components that were asked for, all of them where that is empty.

    Raises ConvertError for what is no plain LoRA of one of its components.
    """
    file = open_lora(request.path)
    check_config(file)
    changes: dict[tuple[str, str], LowRank] = {}
    place = _Placing(file.label, request.component, snapshot, converted)
    for module, parts in read_modules(file, snapshot).items():
        where = place.of(module)
        if where in changes:
            raise ConvertError(f"The LoRA {file.label} has two pairs of matrices for {module}; give another file.")
        changes[where] = _low_rank(module, parts, file, where, request.scale)
    return Lora(file.label, file.sha256, file.config_sha256, request.scale, request.component, changes)


class _Placing:
    """Which component and module a name of diffusers' means."""

    def __init__(self, label: str, component: str | None, snapshot: Snapshot, converted: Collection[str]) -> None:
        self.label, self.component, self.classes, self.source = label, component, snapshot.classes, snapshot.label
        self.converted = converted or self.classes
        if component is not None and "" in self.classes:
            raise ConvertError(
                f"{self.source} is a component on its own, so the LoRA {label} needs no name before it; drop "
                f"{component}=."
            )
        if component is not None and component not in self.classes:
            raise ConvertError(
                f"{self.source} has no component {component!r} for the LoRA {label}; it has {self._names()}."
            )

    def of(self, name: str) -> tuple[str, str]:
        first, _, rest = name.partition(".")
        if first == _DIT and rest:
            return self._dit(), rest
        if first not in self.classes or not rest:  # its names begin inside the DiT
            return self._dit(), name
        if self.component not in (None, first):
            raise ConvertError(
                f"{name}, of the LoRA {self.label}, is for {first}, and not for {self.component}; name the component "
                "that it is for."
            )
        return first, rest

    def _dit(self) -> str:
        if self.component is not None:
            return self.component
        if "" in self.classes:
            return ""
        if _DIT not in self.classes:
            raise ConvertError(
                f"{self.source} has no {_DIT} for the LoRA {self.label}; name the component that it is for, as "
                f"NAME=FILE, among {self._names()}."
            )
        alike = [n for n in self.classes if self.classes[n] == self.classes[_DIT] and n in self.converted]
        if len(alike) > 1:
            raise ConvertError(
                f"The LoRA {self.label} may be for {' or '.join(alike)}; say which as {_DIT}=FILE, or for each of them."
            )
        return alike[0] if alike else _DIT

    def _names(self) -> str:
        return ", ".join(self.classes)


# Values


def _low_rank(
    name: str, parts: Mapping[str, torch.Tensor], file: LoraFile, where: tuple[str, str], scale: float
) -> LowRank:
    a, b = parts.get("a"), parts.get("b")
    if a is None or b is None:
        missing = "matrices for its alpha" if a is b else "up (lora_B) matrix" if b is None else "down (lora_A) matrix"
        raise ConvertError(f"{name}, of the LoRA {file.label}, has no {missing}; give a file that is whole.")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ConvertError(
            f"{name}, of the LoRA {file.label}, has matrices {list(a.shape)} and {list(b.shape)}, which are not "
            "those of a linear layer's LoRA; only linear layers can be merged."
        )
    first = name.removesuffix(where[1]).removesuffix(".") or _DIT  # bare names are of the DiT
    return LowRank(a, b, _factor(where[1], parts, file, config_of(file, first)) * scale)


def _factor(module: str, parts: Mapping[str, torch.Tensor], file: LoraFile, config: Mapping[str, Any]) -> float:
    """What b @ a is still to be multiplied by."""
    rank, stated = parts["a"].shape[0], stated_alpha(config, module)
    own = float(parts.get("alpha", parts.get("baked", math.nan)))
    if not math.isnan(own) and stated not in (None, own):
        raise ConvertError(
            f"{module}, of the LoRA {file.label}, has the alpha {own:g} in the file and {stated:g} in the config; take "
            "out the one that is wrong."
        )
    rooted = bool(config.get("use_rslora"))
    if "baked" not in parts:
        alpha = own if not math.isnan(own) else rank if stated is None else stated  # the rank, as in diffusers
        return alpha / (rank**0.5 if rooted else rank)
    if rooted:
        raise ConvertError(
            f"{module}, of the LoRA {file.label}, has an alpha beside it, and the config has use_rslora, which "
            "contradict each other; give the file in diffusers' names, with its alphas in the config."
        )
    return 1.0


def read_loras(
    requests: Iterable[LoraRequest], snapshot: Snapshot, converted: Collection[str] = ()
) -> tuple[Lora, ...]:
    """The LoRAs that were asked for, in order, as `read_lora` reads each."""
    return tuple(read_lora(request, snapshot, converted) for request in requests)
