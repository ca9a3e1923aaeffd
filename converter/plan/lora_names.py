"""The tensors of a LoRA by diffusers' names, with each tensor of the file accounted for.

diffusers' own converters, those of the snapshot's pipeline class, bring the many spellings into the names of its
modules. They drop in silence what they do not know. So each converts a probe too, with the file's names and with a
number of its own in every tensor: a number that does not come out belongs to a tensor that was left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch

from ..snapshot.building import quiet_libraries
from ..snapshot.snapshot import Snapshot
from ..telling.errors import ConvertError, one_clause
from .lora_file import ALPHA, PEFT_CONFIG, PEFT_PREFIX, LoraFile

_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_|lora\.|lora_linear_layer\.)(?P<part>A|B|down|up)(?:\.default)?\.weight|(?P<of>.+)\.alpha"
)
_PARTS = {"A": "a", "down": "a", "B": "b", "up": "b"}
_SOURCE_DOWN = re.compile(r".+(A|down)(\.default)?\.weight")

State = Mapping[str, torch.Tensor]
Modules = dict[str, dict[str, Any]]  # by module "a", "b" and "alpha", and "baked": an alpha that a and b contain
Convert = Callable[[State], Iterable[tuple[str, Any]]]


def read_modules(file: LoraFile, snapshot: Snapshot) -> Modules:
    """The parts of each module. Raises ConvertError for a tensor that diffusers cannot take, or leaves out."""
    convert = None if _is_adapter(file) else _converter(snapshot.pipeline)
    if convert is None:
        return _modules(file.tensors.items(), file)
    try:
        with quiet_libraries():
            modules = _modules(convert(file.tensors), file)
            plain = list(convert(_probe(file, with_alphas=False)))
            scaled = _modules(convert(_probe(file, with_alphas=True)), file)
    except ConvertError:
        raise
    except Exception as error:  # whatever its converters stumble over, they cannot take the file
        raise ConvertError(
            f"diffusers cannot bring the names of the LoRA {file.label} into those of {snapshot.pipeline} "
            f"({one_clause(error)}); check that it was trained for this model."
        ) from error
    applied = _applied(_modules(plain, file), scaled)
    left_out = [*_missing(file, plain), *_missing_alphas(file, applied.values())]
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        raise ConvertError(
            f"diffusers leaves out {left_out[0]}{more} of the LoRA {file.label} when it reads it for "
            f"{snapshot.pipeline}, so that it cannot be merged whole; give the file in diffusers' names."
        )
    names = list(file.tensors)
    for module, number in applied.items():
        if number != 1 and "alpha" not in modules[module]:
            modules[module]["baked"] = file.tensors[names[number - 2]]
    return modules


def _is_adapter(file: LoraFile) -> bool:
    """Whether it is a PEFT adapter whose alpha is known, and whose names are the model's."""
    if all(name.startswith(PEFT_PREFIX) for name in file.tensors) and file.config_sha256 is not None:
        return True
    if any(name.startswith(PEFT_PREFIX) for name in file.tensors) and not any(n.endswith(ALPHA) for n in file.tensors):
        raise ConvertError(
            f"The LoRA {file.label} is a PEFT adapter, whose alpha stands in its {PEFT_CONFIG}; put that beside it."
        )
    return False


def _converter(pipeline: str | None) -> Convert | None:
    """`lora_state_dict` of the pipeline's class, which calls the converters; None where it has none."""
    import diffusers

    method = getattr(getattr(diffusers, pipeline or "", None), "lora_state_dict", None)
    if method is None:
        return None

    def convert(state: State) -> Iterable[tuple[str, Any]]:
        found = method(dict(state), return_alphas=True)  # which classes that have none to give ignore
        state, alphas = found if isinstance(found, tuple) else (found, None)
        apart = ((key if key.endswith(ALPHA) else key + ALPHA, value) for key, value in (alphas or {}).items())
        return chain(state.items(), apart)

    return convert


def _modules(tensors: Iterable[tuple[str, Any]], file: LoraFile) -> Modules:
    found: Modules = {}
    for key, value in tensors:
        if (match := _KEY.fullmatch(key)) is None:
            raise ConvertError(f"{key}, of the LoRA {file.label}, is no name of a LoRA's tensor; give another file.")
        module = (match["module"] or match["of"]).removeprefix(PEFT_PREFIX)
        part = _PARTS.get(match["part"], "alpha")
        if part in found.setdefault(module, {}):
            raise ConvertError(f"The LoRA {file.label} has two tensors that mean {key}; give another file.")
        found[module][part] = value
    return found


# What becomes of each tensor


def _probe(file: LoraFile, *, with_alphas: bool) -> State:
    """The file's names with matrices of rank 1 that are full of 2, 3, 4, ...; alphas are 1, or such a number too."""
    state = {}
    for number, (name, tensor) in enumerate(file.tensors.items(), start=2):
        shape = list(tensor.shape)
        if not name.endswith(ALPHA) and len(shape) > 1:
            shape[0 if _SOURCE_DOWN.fullmatch(name) else 1] = 1
        value = 1 if name.endswith(ALPHA) and not with_alphas else number
        state[name] = torch.full(shape, float(value), dtype=torch.float64)
    return state


def _missing(file: LoraFile, plain: Iterable[tuple[str, Any]]) -> list[str]:
    """Matrices of which some elements do not come out of the probe."""
    seen: Counter[float] = Counter()
    for key, value in plain:
        if not key.endswith(ALPHA):
            values, counts = value.unique(return_counts=True)
            seen.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    sent = _probe(file, with_alphas=False)
    return [
        name
        for number, (name, tensor) in enumerate(sent.items(), start=2)
        if not name.endswith(ALPHA) and seen[number] < tensor.numel()
    ]


def _applied(plain: Modules, scaled: Modules) -> dict[str, int]:
    """By module the number of the alpha that scales its matrices, or that comes with them; 1 where none does."""
    applied = {}
    for module, parts in scaled.items():
        number = float(parts.get("alpha", 1))
        for part in parts.keys() & {"a", "b"}:
            number *= float(parts[part].flatten()[0] / plain[module][part].flatten()[0])
        applied[module] = round(number)
    return applied


def _missing_alphas(file: LoraFile, applied: Iterable[int]) -> list[str]:
    numbers = set(applied)
    return [n for number, n in enumerate(file.tensors, start=2) if n.endswith(ALPHA) and number not in numbers]
