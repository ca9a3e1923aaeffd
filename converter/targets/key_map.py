"""A component's tensors under two names: diffusers' (native) and those of the model's first release (original).

Single files, which ComfyUI reads and others publish, have original names. A key map is a table of rules that gives the
original tensors of native ones; whoever reads a single file looks its names up there. Names and shapes alone: an
original tensor is one or more native ones, one below the other, so that each native tensor is one range of its bytes,
and reshaping moves no byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..format.layout import WEIGHT
from ..telling.errors import ConvertError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Original:
    """A tensor under its original name. `members` are the native tensors whose rows it has, in this order."""

    name: str
    shape: Shape
    members: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """How leading segments of names correspond; what follows them is the same on both sides.

    native: several are one original tensor, one below the other. `{}` is any number, the same ones on both sides.
    pointwise: weights are matrices in diffusers and 1x1 convolutions in the original.
    """

    native: str | tuple[str, ...]
    original: str
    pointwise: bool = False

    @property
    def natives(self) -> tuple[str, ...]:
        return (self.native,) if isinstance(self.native, str) else self.native


@dataclass(frozen=True)
class KeyMap:
    """The rules of one class's tensors, the first that fits a name decides.

    prefixes: what may stand before every original name in files of whole models. dropped: original tensors that
    diffusers' class does without.
    """

    class_name: str
    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def to_original(self, shapes: Mapping[str, Sequence[int]]) -> tuple[Original, ...]:
        """The original tensors that native ones make, in the order of their first members.

        Raises ConvertError for a name that has no rule, a member that is missing, and members of different shapes.
        """
        found: dict[str, dict[int, str]] = {}
        rules: dict[str, Rule] = {}
        for name in shapes:
            original, rule, part = self._original_of(name)
            other = found.setdefault(original, {}).setdefault(part, name)
            if other != name:
                raise ConvertError(f"{name} and {other} are both {original} in the original layout; keep one of them.")
            rules[original] = rule
        return tuple(self._joined(name, rules[name], parts, shapes) for name, parts in found.items())

    def original_module(self, module: str) -> str:
        """The original module that a native one is, or is a part of. Raises ConvertError for one without a rule."""
        return self._original_of(module)[0]

    def prefix_of(self, names: Iterable[str]) -> str:
        """What stands before every one of these original names, such as "model.diffusion_model."; mostly nothing."""
        names = list(names)
        return next((p for p in self.prefixes if names and all(name.startswith(p) for name in names)), "")

    def _original_of(self, name: str) -> tuple[str, Rule, int]:
        """An original name, the rule that gave it, and which of its members the native name is."""
        for rule in self.rules:
            for part, template in enumerate(rule.natives):
                if (renamed := _renamed(name, template, rule.original)) is not None:
                    return renamed, rule, part
        raise ConvertError(
            f"{name} is not a tensor that the original layout of {self.class_name} has; this model cannot be written "
            "with original names."
        )

    def _joined(self, name: str, rule: Rule, parts: Mapping[int, str], shapes: Mapping[str, Sequence[int]]) -> Original:
        if missing := [t for part, t in enumerate(rule.natives) if part not in parts]:
            last = missing[0].rpartition(".")[2]
            raise ConvertError(f"{name} is made of {len(rule.natives)} tensors, and its {last} is missing.")
        members = tuple(parts[part] for part in sorted(parts))
        first = tuple(shapes[members[0]])
        if differing := [m for m in members if tuple(shapes[m]) != first]:
            raise ConvertError(
                f"{differing[0]} has the shape {list(shapes[differing[0]])} and {members[0]} {list(first)}; the "
                f"original layout has them as equal parts of {name}."
            )
        shape = (first[0] * len(members), *first[1:]) if len(members) > 1 else first
        if rule.pointwise and name.endswith(WEIGHT):
            shape = (*shape, 1, 1)
        return Original(name, shape, members)


def _renamed(name: str, before: str, after: str) -> str | None:
    """The name with its leading segments `before` turned into `after`; None where they are others."""
    segments, template = name.split("."), before.split(".")
    if len(segments) < len(template):
        return None
    numbers = []
    for segment, wanted in zip(segments, template, strict=False):
        if wanted == "{}" and segment.isdecimal():
            numbers.append(segment)
        elif segment != wanted:
            return None
    return ".".join([after.replace("{}", "%s") % tuple(numbers), *segments[len(template) :]])
