"""One component from its plan to the chunks of its output: what disk, loader and verification have in common.

They differ in what they do with the chunks. Which groups have to be measured before a shard, and in which shards their
members lie, is known here alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..format.record import RecordedError
from ..plan.plan import ComponentPlan, ShardPlan
from ..snapshot.files import SourceFile
from .engine import Engine
from .measuring import measure, measured_bytes
from .shard_stream import Chunk, stream_shard
from .supply import Supply

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True)
class ShardStream:
    """A shard whose conversion begins: the file that is read, the chunks to come, and the digest that grows with them.

    digest: of the source file, where somebody asked for it. errors: what the codes miss of each FP8 weight, by module,
    where somebody asked for it.
    """

    plan: ShardPlan
    source: SourceFile
    chunks: Generator[Chunk, None, None]
    digest: _Hash | None = None
    errors: Mapping[str, RecordedError] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The source file's digest, once the chunks came to their end."""
        assert self.digest is not None, "no digest was asked for"
        return self.digest.hexdigest()


def convert_component(
    component: ComponentPlan,
    supply: Supply,
    engine: Engine,
    *,
    shards: Sequence[ShardPlan] | None = None,
    hashed: bool = False,
    with_errors: bool = False,
) -> Generator[ShardStream, None, None]:
    """Yield the component's shards one after the other; a shard's chunks are to be taken before the next is asked for.

    The arguments are those of `begin_shards`. Raises ConvertError.
    """
    begun = begin_shards(component, supply, engine, shards=shards, hashed=hashed, with_errors=with_errors)
    for stream in begun:
        with closing(stream.chunks):
            yield stream


def begin_shards(
    component: ComponentPlan,
    supply: Supply,
    engine: Engine,
    *,
    shards: Sequence[ShardPlan] | None = None,
    hashed: bool = False,
    with_errors: bool = False,
    on_measured: Callable[[int], None] = lambda _: None,
) -> Iterator[ShardStream]:
    """Yield the component's shards, whose chunks are taken whenever it suits, in any thread, and then closed.

    shards: those to convert, in order; None is all. hashed: whether the source's digest is wanted, which costs time.
    with_errors: whether it is wanted what codes miss of their weights.
    on_measured: told the bytes that were read to measure fusion groups. Raises ConvertError.
    """
    amaxes: dict[str, float] = {}
    for shard in component.shards if shards is None else shards:
        source = supply.open(shard.source)
        if missing := [group for group in shard.schedule.measured if group not in amaxes]:
            amaxes |= measure(component.shards, missing, supply, engine)
            on_measured(measured_bytes(component.shards, missing))
        digest = hashlib.sha256() if hashed else None
        errors: dict[str, RecordedError] | None = {} if with_errors else None
        scales = {group: amaxes[group] for group in shard.schedule.measured}
        chunks = stream_shard(shard, source, engine, amaxes=scales, hasher=digest, errors=errors)
        yield ShardStream(shard, source, chunks, digest, {} if errors is None else errors)
