"""What a record says that codes miss of their weights: by layer, and whether it can be so of what the files hold."""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..format import layout
from ..format.header import TensorInfo
from ..format.record import RecordedComponent, RecordedError, measured_columns
from ..snapshot.fp8 import Fp8Component
from ..snapshot.snapshot import Component
from ..targets.key_maps import key_map
from ..telling.errors import ConvertError
from ..telling.notebook import Brief
from .finding import Finding


@dataclass(frozen=True, repr=False, kw_only=True)
class LayerError(Brief):
    """What the codes of one FP8 module miss of its source; the fields of `RecordedError`, and what the module is.

    mode, scheme: as its file states them, None where it does not. shape: of its weight in the source's form, None where
    it is a part of one in the file.
    """

    module: str
    mode: str | None
    scheme: str | None
    shape: tuple[int, ...] | None
    error: RecordedError

    @property
    def badness(self) -> float:
        """What layers are ranked by: minus the SQNR by row."""
        return -math.inf if self.error.row_sqnr_db is None else -self.error.row_sqnr_db


def layer_errors(
    component: Component, recorded: RecordedComponent, fp8: Fp8Component, *, single: bool
) -> tuple[LayerError, ...]:
    """The recorded errors of a component's modules, numbers in names in their order. single: whether it is one file."""
    names = _names_in_file(component, recorded, single=single)
    tensors = {tensor.name: tensor for tensor in component.tensors}
    found = []
    for module in sorted(recorded.errors, key=_in_order):
        error, how = recorded.errors[module], fp8.stated.get(names[module])
        tensor = tensors.get(names[module] + layout.WEIGHT)
        shape = tensor.shape if tensor is not None and tensor.numel == error.weights else None
        found.append(
            LayerError(
                module=module,
                mode=how.mode if how else None,
                scheme=how.scheme if how else None,
                shape=shape,
                error=error,
            )
        )
    return tuple(found)


def check_errors(
    component: Component, recorded: RecordedComponent, fp8: Fp8Component, *, single: bool
) -> Iterator[Finding]:
    """Whether the recorded errors are of the modules that the files hold, and such as there can be."""
    if not single and Counter(how.mode for how in fp8.stated.values()) != Counter(recorded.fp8_modules):
        return  # which is a finding of its own
    names = _names_in_file(component, recorded, single=single)
    tensors = {tensor.name: tensor for tensor in component.tensors}
    weights: dict[str, int] = defaultdict(int)
    for module, error in recorded.errors.items():
        weights[names[module]] += error.weights
        if not _can_be(error):
            yield Finding(layout.RECORD_FILE, f"states an error of {module} in {component.label} that no weight has")
    for module in sorted({*fp8.stated, *weights}):
        tensor = tensors.get(module + layout.WEIGHT)
        due = _measured(tensor) if module in fp8.stated else 0
        if weights.get(module, 0) not in ((due, 0) if recorded.imported else (due,)):
            stated = f"of {weights[module]} weights" if module in weights else "of none"
            yield Finding(
                layout.RECORD_FILE, f"states errors {stated} of {module} in {component.label}, which has {due} to state"
            )


def _measured(tensor: TensorInfo | None) -> int:
    """Weights of a module whose error is to be stated."""
    return tensor.numel if tensor is not None and measured_columns(tensor.shape) is not None else 0


def _can_be(error: RecordedError) -> bool:
    ratios = [value for value in (error.sqnr_db, error.row_sqnr_db) if value is not None]
    return (
        all(0 <= value < math.inf for value in ratios)
        and 0 <= error.row_error <= 1
        and error.saturated + error.subnormal + error.vanished <= error.weights
    )


def _names_in_file(component: Component, recorded: RecordedComponent, *, single: bool) -> Mapping[str, str]:
    """What the files call each module that has an error."""
    if not single:
        return {module: module for module in recorded.errors}
    with contextlib.suppress(ConvertError):  # a name without a rule, which is found as an error of nothing
        if (names := key_map(component.class_name, component.config)) is not None:
            return {module: names.original_module(module) for module in recorded.errors}
    return {module: module for module in recorded.errors}


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts `blocks.2` before `blocks.10`."""
    parts = re.split(r"([0-9]+)", name)
    return [(len(number := part.lstrip("0")), number) if i % 2 else (-1, part) for i, part in enumerate(parts)]
