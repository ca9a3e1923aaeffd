"""How a serving runtime names and runs the linears of a DiT, and what it would make of a plan.

Such a runtime builds its own modules. Each has a name of its own, which the runtime's skip rule looks for in
`ignored_layers`; several projections may be fused into one module. A linear that it runs in FP8 and does not skip needs
codes and a scale; any other one takes what the file holds as plain numbers. Both mistakes are silent there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .target import Layer

SkipRule = Callable[[str, Collection[str]], bool]
"""Whether a runtime leaves the module of this name, in its own spelling, unquantised, given `ignored_layers`."""


@dataclass(frozen=True)
class Dit:
    """One DiT class as a runtime builds it. All patterns are regular expressions over whole module names.

    fp8: our names of the linears that the runtime can run in FP8; it builds the others without quantisation.
    renames: (pattern, replacement) from our name to the runtime's, the first that matches.
    fused: members by the fused module's last segment, for modules below `fused_in`.
    """

    fp8: str
    renames: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused_in: str = r".*"

    def name(self, module: str) -> str:
        """The runtime's name of one of our modules; for a member of a fused module its own, beside its siblings."""
        for pattern, replacement in self.renames:
            if re.fullmatch(pattern, module):
                return re.sub(pattern, replacement, module)
        return module

    def fused_name(self, module: str) -> str | None:
        """The runtime's name of the fused module that one of our modules becomes a part of, None for any other."""
        parent, _, member = self.name(module).rpartition(".")
        if not re.fullmatch(self.fused_in, parent):
            return None
        return next((f"{parent}.{fused}" for fused, members in self.fused.items() if member in members), None)

    def spellings(self, kept: Iterable[str]) -> set[str]:
        """Kept modules in our spelling and in the runtime's, fused modules too where all their members are kept."""
        kept = list(kept)
        names = {*kept, *map(self.name, kept)}
        fused = {module for name in kept if (module := self.fused_name(name)) is not None}
        return names | {module for module in fused if self._members(module) <= names}

    def _members(self, module: str) -> set[str]:
        parent, _, last = module.rpartition(".")
        return {f"{parent}.{member}" for member in self.fused[last]}

    def problems(
        self, layers: Sequence[Layer], ignored: Collection[str], skips: SkipRule, runtime: str
    ) -> Iterator[str]:
        """What the runtime would do wrong with the layers, one sentence each."""
        for layer in layers:
            module = self.fused_name(layer.name) or self.name(layer.name)
            runs_fp8 = re.fullmatch(self.fp8, layer.name) is not None
            if not runs_fp8 and layer.format is not None:
                yield f"{runtime} builds {module} without FP8 and would read the codes of {layer.name} as weights"
                continue
            if layer.format is not None and layer.format.channel:
                yield f"{runtime} reads one scale per tensor or block, and {layer.name} has one per row"
                continue
            skipped = skips(module, ignored)
            if runs_fp8 and skipped and layer.format is not None:
                yield f"{runtime} would skip {module} and read the codes of {layer.name} as weights"
            if runs_fp8 and not skipped and layer.format is None:
                yield f"{runtime} would cast {layer.name} to FP8 without a scale: nothing it looks for names {module}"
