"""What a target decides about a conversion. The base class is the native target: this project's own loader reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..format.layout import Block, WeightFormat
from ..snapshot.snapshot import Component


@dataclass(frozen=True)
class Layer:
    """A linear or convolution of a component, as it was decided: `format` is None for one that stays as it is.

    name: its module's, as the source spells it.
    """

    name: str
    kind: str
    format: WeightFormat | None


class Target:
    """The native target, and what others change of it.

    name: what `--target` takes. readers: who reads what is written for it, as the subject of a sentence.
    single_files: whether every component is one file, under the names of the model's first release.
    """

    name = "native"
    readers = "fp8-convert's own load_pipeline"
    single_files = False

    def settings_problem(self, *, compact: bool, block: Block | None) -> str | None:
        """Why settings do not go with the target, as a sentence; None where they do."""
        return None

    def why_kept(self, component: Component, components: Sequence[Component]) -> str | None:
        """Why a component of a snapshot (of `components`) stays as it is, as a clause; None where FP8 can be read."""
        return None

    def kept_layers(self, component: Component) -> Sequence[tuple[str, str]]:
        """Patterns, as in manifests, of layers that the reader cannot take in FP8, each with the reason."""
        return ()

    def block(self, component: Component, block: Block | None) -> Block | None:
        """The block of a component's weight scales, None for one scale per tensor; `block`: of manifest or settings."""
        return block

    def ignored_layers(
        self, component: Component, kept: Iterable[str], components: Sequence[Component]
    ) -> Collection[str]:
        """The component's `ignored_layers`, in any order; `kept` are its linears that are not FP8."""
        return set(kept)

    def snapshot_problem(self, components: Sequence[Component], converted: Collection[str]) -> str | None:
        """Why the reader cannot take a snapshot of which only the components `converted` become FP8, as a sentence."""
        return None

    def notes(self, components: Sequence[Component]) -> Iterator[str]:
        """What the user should know of the snapshot in this reader, one clause each."""
        return iter(())

    def problems(self, component: Component, layers: Sequence[Layer], ignored: Collection[str]) -> Iterator[str]:
        """What the reader would skip, cast without a scale or not find, one sentence each.

        layers: of a component that is converted. ignored: what `ignored_layers` gave.
        """
        return iter(())


NATIVE = Target()
