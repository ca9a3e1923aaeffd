"""What to keep so that a budget is met, measured on the same inputs, and the manifest that says so."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ...converter.format.layout import W8A8, WeightFormat
from ...converter.plan.decide import STORAGE_FORMAT, expand_aliases, scale_bytes
from ...converter.plan.manifest import Manifest, Rule
from ...converter.plan.manifest_text import Changes, changed
from ...converter.telling.notebook import Brief
from ...converter.telling.quantities import byte_count, plural
from .choosing import Budget, Candidate, choose, estimate
from .layer_errors import decibels
from .measuring import Run, without_rounding
from .original import Layer
from .simulation import PlannedWeights
from .units import Unit

BLOCKS = WeightFormat(W8A8, (128, 128))  # what --weight-block-size 128 128 makes of a layer
_ROUNDS = 4  # of choosing again with what was measured, where an estimate promised too much
_WRONG_DB = 1.0  # by which an estimate must miss to be called wrong

Errors = Mapping[str, float]  # by component: squared error of its output over the squared output


@dataclass(frozen=True, repr=False)
class Proposal(Brief):
    """kept: units by label. blocks: whether block scales are proposed instead. cost: bytes beyond plain FP8.

    estimated, measured: output errors of the components. stored: measured, and its cost, with the kept units in FP8
    storage, as --compact has them. in_blocks: measured with block scales and nothing kept. pictures: PSNR in dB of each
    case without the proposal and with it, where that was checked; None for equal pictures.
    """

    budget: str
    kept: tuple[str, ...]
    blocks: bool
    cost: int
    estimated: Errors
    measured: Errors
    stored: Errors
    stored_cost: int
    in_blocks: Errors
    met: bool
    pictures: tuple[tuple[float | None, float | None], ...] = field(default=())

    @property
    def off_db(self) -> float:
        """By how many dB the estimate missed what was measured, at worst; positive where it promised too much."""
        misses = [decibels(self.estimated[c]) - decibels(self.measured[c]) for c in self.measured if self.measured[c]]
        return max(misses, key=abs, default=0.0)

    @property
    def wrong(self) -> bool:
        """Whether the estimate was wrong."""
        return not self.blocks and abs(self.off_db) > _WRONG_DB

    def layers(self, remaining: Sequence[Layer]) -> list[Layer]:
        """Those that are FP8, in the format that is proposed."""
        return _blocked(remaining) if self.blocks else [*remaining]


def propose(run: Run, units: Sequence[Unit], alone: Sequence[float], budget: Budget) -> Proposal:
    """Choose what to keep of the units; alone: the output error of each one's component when it alone is FP8.

    What was chosen is measured; where that misses a budget in decibels, the estimate is corrected and more is kept.
    """
    candidates = [Candidate(u.component, error, u.cost, u.stored) for u, error in zip(units, alone, strict=True)]
    in_blocks = _in_blocks(run)
    dynamic = run.original.plan.recipe.activation_scheme == "dynamic"
    if dynamic and budget.decibels is not None and not _meets(run.plain, budget) and _meets(in_blocks, budget):
        extra = sum(_block_cost(layer) for layer in run.layers)
        return Proposal(str(budget), (), True, extra, in_blocks, in_blocks, in_blocks, extra, in_blocks, True)
    plain = dict(run.plain)
    for _ in range(_ROUNDS):
        chosen = choose(candidates, plain, budget)
        estimated, measured = estimate(candidates, chosen, plain), _measured(run, [units[i] for i in chosen])
        if budget.bytes is not None or _meets(measured, budget) or len(chosen) == len(units):
            break
        plain = {c: plain[c] * max(1.0, measured[c] / estimated[c]) if estimated[c] else plain[c] for c in plain}
    kept = [units[i] for i in chosen]
    promised = estimate(candidates, chosen, run.plain)  # as it was before anything corrected it
    return Proposal(
        budget=str(budget),
        kept=tuple(unit.label for unit in kept),
        blocks=False,
        cost=sum(unit.cost for unit in kept),
        estimated=promised,
        measured=measured,
        stored=_stored(run, kept),
        stored_cost=sum(_stored_cost(layer) for unit in kept for layer in unit.layers),
        in_blocks=in_blocks,
        met=budget.bytes is not None or _meets(measured, budget),
    )


def _meets(errors: Errors, budget: Budget) -> bool:
    return all(error <= budget.error for error in errors.values())


def remaining(run: Run, kept: Collection[Unit]) -> list[Layer]:
    """The layers that are FP8 with these units kept."""
    held = {layer for unit in kept for layer in unit.layers}
    return [layer for layer in run.layers if layer not in held]


def _measured(run: Run, kept: Collection[Unit]) -> Errors:
    return without_rounding(run.output_errors(remaining(run, kept), run.weights), run.rounding)


def _in_blocks(run: Run) -> Errors:
    layers = _blocked(run.layers)
    return without_rounding(run.output_errors(layers, PlannedWeights(layers)), run.rounding)


def _blocked(layers: Sequence[Layer]) -> list[Layer]:
    return [layer.in_format(BLOCKS) if layer.format.mode == W8A8 else layer for layer in layers]


def _stored(run: Run, kept: Collection[Unit]) -> Errors:
    held = {layer for unit in kept for layer in unit.layers}
    layers = [layer.in_format(STORAGE_FORMAT) if layer in held else layer for layer in run.layers]
    return without_rounding(run.output_errors(layers, PlannedWeights(layers)), run.rounding)


def _block_cost(layer: Layer) -> int:
    return scale_bytes(layer.tensor.info.shape, BLOCKS) - scale_bytes(layer.tensor.info.shape, layer.format)


def _stored_cost(layer: Layer) -> int:
    return scale_bytes(layer.tensor.info.shape, STORAGE_FORMAT) - scale_bytes(layer.tensor.info.shape, layer.format)


def proposed_manifest(
    name: str, run: Run, units: Sequence[Unit], proposal: Proposal, evidence: Mapping[str, str]
) -> Manifest:
    """The plan's manifest with the proposal in it, to be written as NAME.toml. evidence: of each kept unit, by label.

    What the run was asked to ignore beside its manifest is ignored in it too.
    """
    recipe = run.original.plan.recipe
    changes = {}
    for component in run.original.plan.components:
        rules = component.rules
        if rules is None or not rules.runs_in_fp8:
            continue
        asked = expand_aliases(recipe.ignored_layers, rules.fusion_groups)
        named = tuple(Rule(pattern, "ignored layer that the user named", optional=True) for pattern in asked)
        own = [u for u in units if u.component == component.source.name and u.label in proposal.kept]
        kept = tuple(Rule(unit.pattern, evidence[unit.label]) for unit in own)
        block = BLOCKS.block if proposal.blocks else recipe.block
        stored = () if recipe.compact else kept  # with --compact what is kept was measured as kept
        changes[component.source.name] = Changes((*named, *kept), stored, block)
    about = f"{recipe.manifest.description}; {_about(proposal)}"
    return changed(recipe.manifest, name, about, changes, run.original.plan.snapshot.classes)


def _about(proposal: Proposal) -> str:
    if proposal.blocks:
        return f"block scales for a budget of {proposal.budget}"
    return f"{plural(len(proposal.kept), 'unit')} kept for a budget of {proposal.budget} ({byte_count(proposal.cost)})"
