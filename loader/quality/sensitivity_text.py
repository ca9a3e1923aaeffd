"""A sensitivity as text: the ranking's first rows, what is wrong, and what is proposed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...converter.telling.quantities import byte_count, plural
from .layer_errors import LayerError, decibels
from .proposal import Errors, Proposal

if TYPE_CHECKING:
    from .ranking import Ranked
    from .sensitivity import Sensitivity

HEAD = ("layers", "share", "alone", "keeping", "own output", "weights", "activations", "first", "middle", "last")
_ROWS = 20


def row(ranked: Ranked) -> tuple[str, ...]:
    """A unit in the columns of HEAD; decibels are signal-to-noise ratios, so that less is worse."""
    steps = [*ranked.steps.values()]
    over_time: list[LayerError] = [steps[0], steps[len(steps) // 2], steps[-1]]
    own = (ranked.own.both, ranked.own.weights, ranked.own.activations, *(step.both for step in over_time))
    sizes = (f"{ranked.share:.1%}", _db(ranked.error), byte_count(ranked.cost))
    return (ranked.label, *sizes, *(_db(error) for error in own))


def text(found: Sensitivity) -> str:
    """The whole result for a terminal."""
    table = [HEAD, *(row(ranked) for ranked in found.ranked[:_ROWS])]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    lines = ["share of the output error, the output with it alone in FP8, bytes to keep it; then its own output"]
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
    if len(found.ranked) > _ROWS:
        lines.append(f"… and {len(found.ranked) - _ROWS} more (--json has all)")
    lines.append("")
    for name, error in found.plain.items():
        lines.append(f"{name}: {_db(error)} with every layer in FP8 ({_db(found.added[name])} by adding up)")
    lines += [f"note: {note}" for note in found.notes]
    lines += [str(suspect) for suspect in found.suspects]
    if found.proposal is not None:
        lines += ["", *_proposed(found.proposal, found)]
    return "\n".join(lines)


def _proposed(proposal: Proposal, found: Sensitivity) -> list[str]:
    if proposal.blocks:
        lines = [f"proposal for {proposal.budget}: scales of 128x128 blocks, {byte_count(proposal.cost)} more"]
        lines.append(f"measured: {_all(proposal.measured)}")
    else:
        nothing = "nothing: plain FP8 meets it" if proposal.budget.endswith("dB") else "nothing: each unit takes more"
        kept = plural(len(proposal.kept), "unit") if proposal.kept else nothing
        lines = [f"proposal for {proposal.budget}: keep {kept} ({byte_count(proposal.cost)} more)"]
        lines += [f"  {name}" for name in proposal.kept]
        lines.append(f"estimated {_all(proposal.estimated)}, measured {_all(proposal.measured)}")
        if proposal.wrong:
            lines.append(f"the estimate was wrong by {abs(proposal.off_db):.1f} dB: errors of layers did not add up")
        if proposal.kept:
            more = byte_count(proposal.stored_cost)
            lines.append(f"the same in FP8 storage (--compact): {_all(proposal.stored)}, {more} more")
        lines.append(f"instead, scales of blocks for every layer: {_all(proposal.in_blocks)}")
    if not proposal.met:
        lines.append(f"NOT MET: {proposal.budget} is more than {plural(len(proposal.kept), 'kept unit')} give")
    for number, (plain, better) in enumerate(proposal.pictures, 1):
        lines.append(f"picture {number}: {_psnr(plain)} in plain FP8, {_psnr(better)} with the proposal")
    return lines


def _all(errors: Errors) -> str:
    return ", ".join(f"{name} {_db(error)}" for name, error in errors.items())


def _db(error: float) -> str:
    return f"{decibels(error):.1f} dB" if error else "exact"


def _psnr(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} dB"
