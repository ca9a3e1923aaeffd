"""A LoRA as pairs of matrices by the weights of a snapshot that they are for.

Names come in many spellings. diffusers' own converters, those of the snapshot's pipeline class, bring them into the
names of its modules, and bake in what alphas kohya's files state. A weight W [N, K] becomes
W + factor * (B @ A), with A [rank, K], B [N, rank] and factor = scale * alpha / rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..snapshot.building import quiet_libraries
from ..snapshot.snapshot import Snapshot
from ..telling.errors import ConvertError, one_clause
from ..telling.notebook import Brief
from .lora_file import PEFT_CONFIG, PEFT_PREFIX, LoraFile, open_lora
from .lora_request import LoraRequest

_DIT = "transformer"
_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_|lora\.|lora_linear_layer\.)(?P<part>A|B|down|up)(?:\.default)?\.weight|(?P<of>.+)\.alpha"
)
_PARTS = {"A": "a", "down": "a", "B": "b", "up": "b"}

State = Mapping[str, torch.Tensor]


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


def read_lora(request: LoraRequest, snapshot: Snapshot) -> Lora:
    """Read a LoRA for the snapshot. Raises ConvertError for what is no plain LoRA of one of its components."""
    file = open_lora(request.path)
    _check_config(file)
    state, alphas = _in_diffusers_names(file, snapshot)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in (*state.items(), *((k if k.endswith(".alpha") else f"{k}.alpha", v) for k, v in alphas.items())):
        if (match := _KEY.fullmatch(key)) is None:
            raise ConvertError(f"{key}, of the LoRA {file.label}, is no name of a LoRA's tensor; give another file.")
        found.setdefault(match["module"] or match["of"], {})[_PARTS.get(match["part"], "alpha")] = value
    changes = {}
    place = _Placing(file.label, request.component, snapshot)
    for module, parts in found.items():
        where = place.of(module)
        if where in changes:
            raise ConvertError(f"The LoRA {file.label} has two pairs of matrices for {module}; give another file.")
        changes[where] = _low_rank(module, parts, file, where[1], request.scale)
    return Lora(file.label, file.sha256, file.config_sha256, request.scale, request.component, changes)


# Names


def _in_diffusers_names(file: LoraFile, snapshot: Snapshot) -> tuple[State, Mapping[str, Any]]:
    """The tensors by diffusers' names, and the alphas that its converter hands out apart from them."""
    state = dict(file.tensors)
    if all(name.startswith(PEFT_PREFIX) for name in state) and file.config_sha256 is not None:
        return {name.removeprefix(PEFT_PREFIX): value for name, value in state.items()}, {}
    if any(name.startswith(PEFT_PREFIX) for name in state) and not any(name.endswith(".alpha") for name in state):
        raise ConvertError(
            f"The LoRA {file.label} is a PEFT adapter, whose alpha stands in its {PEFT_CONFIG}; put that beside it."
        )
    pairs = sum(not name.endswith(".alpha") for name in state)
    convert = _converter(snapshot.pipeline)
    if convert is None:
        return state, {}
    try:
        with quiet_libraries():
            state, alphas = convert(state)
    except Exception as error:  # whatever its converters stumble over, they cannot take the file
        raise ConvertError(
            f"diffusers cannot bring the names of the LoRA {file.label} into those of {snapshot.pipeline} "
            f"({one_clause(error)}); check that it was trained for this model."
        ) from error
    if sum(not name.endswith(".alpha") for name in state) < pairs:
        raise ConvertError(
            f"diffusers leaves out some of the LoRA {file.label} when it reads it for {snapshot.pipeline}, so that it "
            "cannot be merged whole; give the file in diffusers' names."
        )
    return state, alphas


def _converter(pipeline: str | None) -> Callable[[State], tuple[dict[str, torch.Tensor], Mapping[str, Any]]] | None:
    """`lora_state_dict` of the pipeline's class, which calls the converters; None where it has none."""
    import diffusers

    method = getattr(getattr(diffusers, pipeline or "", None), "lora_state_dict", None)
    if method is None:
        return None

    def convert(state: State) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
        found = method(dict(state), return_alphas=True)  # which classes that have none to give ignore
        state, alphas = found if isinstance(found, tuple) else (found, None)
        return dict(state), alphas or {}

    return convert


class _Placing:
    """Which component and module a name of diffusers' means."""

    def __init__(self, label: str, component: str | None, snapshot: Snapshot) -> None:
        self.label, self.component, self.classes, self.source = label, component, snapshot.classes, snapshot.label
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
        alike = [name for name, class_name in self.classes.items() if class_name == self.classes[_DIT]]
        if len(alike) > 1:
            raise ConvertError(
                f"The LoRA {self.label} may be for {' or '.join(alike)}; say which as {_DIT}=FILE, or for each of them."
            )
        return _DIT

    def _names(self) -> str:
        return ", ".join(self.classes)


# Values


def _low_rank(name: str, parts: Mapping[str, torch.Tensor], file: LoraFile, module: str, scale: float) -> LowRank:
    a, b = parts.get("a"), parts.get("b")
    if a is None or b is None:
        missing = "up (lora_B)" if b is None else "down (lora_A)"
        raise ConvertError(f"{name}, of the LoRA {file.label}, has no {missing} matrix; give a file that is whole.")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ConvertError(
            f"{name}, of the LoRA {file.label}, has matrices {list(a.shape)} and {list(b.shape)}, which are not "
            "those of a linear layer's LoRA; only linear layers can be merged."
        )
    rank, config = a.shape[0], _config_of(file, name)
    alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(config, module, rank)
    return LowRank(a, b, alpha / (rank**0.5 if config.get("use_rslora") else rank) * scale)


def _config_of(file: LoraFile, name: str) -> Mapping[str, Any]:
    """The adapter's config; diffusers puts the name of a component before each of its keys."""
    first = name.partition(".")[0] + "."
    return {key.removeprefix(first): value for key, value in file.config.items()}


def _alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The alpha that the adapter's config states: for some modules, or for all; else the rank, as in diffusers."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        plain = pattern.removeprefix("^")
        if module == plain or (plain == pattern and module.endswith(f".{plain}")):
            return float(alpha)
    return float(config.get("lora_alpha") or rank)


def _check_config(file: LoraFile) -> None:
    """Refuse what a config asks for beside two matrices and an alpha."""
    for key, value in file.config.items():
        name = key.rpartition(".")[2]
        if name in ("use_dora", "lora_bias", "fan_in_fan_out", "megatron_config") and value:
            raise ConvertError(f"The LoRA {file.label} was trained with {name}, which cannot be merged.")
        if name == "bias" and value not in (None, "none"):
            raise ConvertError(f"The LoRA {file.label} was trained with biases, which cannot be merged.")
        if name == "peft_type" and value not in (None, "LORA"):
            raise ConvertError(f"{file.label} is an adapter of the type {value!r:.40}, and only LoRAs can be merged.")
        if name == "lora_alpha" and not _is_number(value):
            raise ConvertError(f"The LoRA {file.label} has the lora_alpha {value!r:.80}, which is no number.")
        if name == "alpha_pattern" and (bad := _strange_patterns(value)):
            raise ConvertError(f"The LoRA {file.label} has the alpha_pattern {bad[0]!r:.80}; write out its names.")


def _strange_patterns(patterns: Any) -> list[str]:
    """Patterns that are no names: they may be any regular expression, and numbers may be none."""
    if not isinstance(patterns, dict):
        return [] if patterns is None else [str(patterns)]
    return [key for key, value in patterns.items() if not re.fullmatch(r"\^?[\w.]+", key) or not _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_loras(requests: Iterable[LoraRequest], snapshot: Snapshot) -> tuple[Lora, ...]:
    """The LoRAs that were asked for, in order."""
    return tuple(read_lora(request, snapshot) for request in requests)
