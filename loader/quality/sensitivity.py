"""`sensitivity`: which layers FP8 hurts, by how much, and what to keep for a budget.

Three things are measured of the original pipeline, on its own prompts and steps: what FP8 does to the output of each
layer (`layer_errors.py`), what FP8 of each unit alone does to the output of its whole model (`influence.py`), by which
the units are ranked, and what all of them do together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from ...converter.output.writing import write_small
from ...converter.plan.recipe import tool_version
from ...converter.plan.settings import Settings
from ...converter.snapshot.access import HubAccess
from ...converter.telling.errors import SettingsError
from ...converter.telling.notebook import html_table, one_line
from ...converter.telling.progress import Progress, Silent
from ...converter.telling.quantities import byte_count, plural
from ..arguments import choose_device
from .asked import Prompts, asked_prompts, asked_seeds, described
from .choosing import Budget
from .layer_errors import decibels
from .measuring import Run, run_original
from .original import open_original
from .pictures import psnr
from .proposal import Proposal, propose, proposed_manifest, remaining
from .ranking import Ranked, Suspect, errors_alone, rank, suspects
from .result_file import new_file
from .running import Case, Sampling, cases, generate
from .simulation import PlannedWeights, simulated
from .snapshot_weights import snapshot_weights
from .units import By, Unit, units


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """The ranking, worst first.

    plain: the output error of each component with every layer in FP8. added: the sum of its units' errors, which is the
    same where layers err independently. rounding: what of errors is there without FP8; it was subtracted everywhere.
    suspects: wrong layers of the snapshot, if one was given. how: of the run.
    """

    ranked: tuple[Ranked, ...]
    plain: Mapping[str, float]
    added: Mapping[str, float]
    rounding: Mapping[str, float]
    suspects: tuple[Suspect, ...]
    proposal: Proposal | None
    notes: tuple[str, ...]
    how: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with the snapshot that was given, if one was."""
        return not self.suspects

    def to_json(self) -> dict[str, Any]:
        """The same for scripts; errors are squared errors over squared outputs, infinite ones null."""
        found: dict[str, Any] = _finite({"ok": self.ok, **asdict(self)})
        return found

    def __repr__(self) -> str:
        worst = f", worst {self.ranked[0].label}" if self.ranked else ""
        return one_line(self, f"{plural(len(self.ranked), 'unit')}{worst}")

    def _repr_html_(self) -> str:
        from .sensitivity_text import HEAD, row

        return html_table(repr(self).strip("<>"), HEAD, map(row, self.ranked), self.notes)

    def __str__(self) -> str:
        from .sensitivity_text import text

        return text(self)


def sensitivity(
    original: str | os.PathLike[str],
    *,
    prompts: Prompts,
    fp8: str | os.PathLike[str] | None = None,
    seeds: int | Sequence[int] = 1,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    guidance: float | None = None,
    extra: Mapping[str, Any] | None = None,
    by: By = "layer",
    budget: str | None = None,
    output: str | os.PathLike[str] | None = None,
    check: bool = False,
    manifest: str | None = None,
    ignored_layers: Sequence[str] = (),
    components: Sequence[str] = (),
    compact: bool = False,
    weight_block_size: Sequence[int] | None = None,
    activation_scheme: str = "dynamic",
    input_scales: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    force: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
    **pipeline_arguments: Any,
) -> Sensitivity:
    """Rank the FP8 layers of a pipeline by what FP8 of each does to the output of its model.

    original: a pipeline's folder or Hub id, not converted. prompts: a file, or a list of texts. fp8: measures this
    snapshot of it instead, and names the layers whose weights are not what FP8 of the original's would be. seeds: how
    many, from 0 on, or which. steps, height, width, frames, guidance, extra: of the pipeline's call, None for its own
    defaults. by: "layer" (with its fusion group), "block" or "pattern". budget: "40dB", the least signal-to-noise ratio
    of the models' outputs, or "200MB", the most bytes beyond plain FP8: proposes what to keep. output: writes the
    proposal there as a manifest. check: also makes every picture without and with the proposal. manifest,
    ignored_layers, components, compact, weight_block_size, activation_scheme, input_scales: of the conversion, as
    `convert` takes them. device: None is CUDA where there is one. dtype: of the pipeline; None is float32 where memory
    allows, else bfloat16, whose rounding hides small errors. force: replaces the file `output`. revision, token,
    cache_dir, local_files_only, variant: how the Hub is read. quiet: no progress bars of libraries. pipeline_arguments:
    components to use instead of the original's.

    Raises ConvertError and LoadError for sources that cannot be read or run so, SettingsError (a ValueError) for
    settings that mean nothing or contradict each other.
    """
    settings = Settings.among(locals())
    limit = _budget(by, budget, output, check, fp8, settings)
    path = None if output is None else new_file(output, ".toml", force=force)
    sampling = Sampling(steps, asked_seeds(seeds), height, width, frames, guidance, extra or {})
    sampled = cases(asked_prompts(prompts), sampling)
    access = HubAccess(revision, token, cache_dir, local_files_only, variant, quiet=quiet)
    progress = progress or Silent()
    target = choose_device(device, None)
    source = open_original(original, settings, access, device=target, dtype=dtype, given=pipeline_arguments)
    held = None if fp8 is None else snapshot_weights(fp8, source, replace(access, revision=None, variant=None))
    layers = source.layers() if held is None else [*held.modules]
    planned = PlannedWeights(layers)
    progress.start(len(sampled) + len(layers), "runs and layers")
    run = run_original(source, layers, held or planned, None if held is None else planned, sampled, sampling, progress)
    parts = units(run.layers, by)
    alone = errors_alone(run, parts, progress)
    proposal = None if limit is None else propose(run, parts, alone, limit)
    if proposal is not None and check:
        proposal = replace(proposal, pictures=_pictures(run, parts, proposal, sampled, sampling))
    how = _how(run, sampling, sampled, by)
    ranked = rank(run, parts, alone)
    if path is not None and proposal is not None:
        _write(path, run, parts, proposal, ranked, how)
    added = {c: sum(one.error for one in ranked if one.component == c) for c in run.models}
    progress.close()
    return Sensitivity(ranked, run.plain, added, run.rounding, suspects(run), proposal, _notes(run, alone), how)


def _budget(by: str, budget: str | None, output: Any, check: bool, fp8: Any, settings: Settings) -> Budget | None:
    if by not in get_args(By):
        raise SettingsError(f"by is {by!r:.80}; use one of {', '.join(get_args(By))}.")
    if budget is None and (output is not None or check):
        raise SettingsError("A manifest is written, and a proposal checked, for a budget; add one, such as 40dB.")
    if fp8 is not None and budget is not None:
        raise SettingsError("A budget is for a conversion to come, and a snapshot is converted already; drop one.")
    changed = [name for name in settings.given if getattr(settings, name) != getattr(Settings(), name)]
    if fp8 is not None and changed:
        raise SettingsError(f"The snapshot is what it is: {sorted(changed)[0]} changes nothing in it; drop it.")
    return None if budget is None else Budget.read(budget)


def _pictures(
    run: Run, parts: Sequence[Unit], proposal: Proposal, sampled: Sequence[Case], sampling: Sampling
) -> tuple[tuple[float | None, float | None], ...]:
    """PSNR of each case's pictures against the original's, with every layer in FP8 and with the proposal."""
    kept = [unit for unit in parts if unit.label in proposal.kept]
    proposed, weights = proposal.layers(remaining(run, kept)), run.weights
    if proposal.blocks:
        weights = PlannedWeights(proposed)
    found = []
    for layers, how in ((run.layers, run.weights), (proposed, weights)):
        with simulated(layers, how):
            pictures = [generate(run.original.pipe, case, sampling).frames for case in sampled]
        found.append([psnr(mine, its) for mine, its in zip(pictures, run.frames, strict=True)])
    return tuple(zip(*found, strict=True))


def _notes(run: Run, alone: Sequence[float]) -> tuple[str, ...]:
    notes = []
    if run.silent:
        names = sorted({layer.component for layer in run.silent})
        notes.append(
            f"{plural(len(run.silent), 'layer')} of {' and '.join(names)} never ran, such as {run.silent[0].name}: "
            "nothing is known of them; raise --steps"
        )
    hidden = sum(error == 0 for error in alone)
    if hidden and any(run.rounding.values()):
        notes.append(f"{plural(hidden, 'unit')} changed no more than rounding does; --dtype float32 tells them apart")
    return tuple(notes)


def _how(run: Run, sampling: Sampling, sampled: Sequence[Case], by: By) -> dict[str, Any]:
    plan, pipe = run.original.plan, run.original.pipe
    return {
        "source": plan.snapshot.repo or "a local folder",
        "commit": plan.snapshot.commit,
        "manifest": plan.recipe.manifest.name,
        "by": by,
        **described(sampling, sampled),
        "steps_seen": len(run.own.steps),
        "device": pipe.device.type,
        "dtype": str(run.layers[0].module.weight.dtype).removeprefix("torch."),
        "version": tool_version(),
    }


def _write(
    path: Path, run: Run, parts: Sequence[Unit], proposal: Proposal, ranked: Sequence[Ranked], how: Mapping[str, Any]
) -> None:
    """The proposal as a manifest. Raises ConvertError, where the disk is full too."""
    evidence = {r.label: _evidence(r, how) for r in ranked}
    written = proposed_manifest(path.stem, run, parts, proposal, evidence)
    write_small(path, written.text.encode(), str(path))


def _evidence(ranked: Ranked, how: Mapping[str, Any]) -> str:
    runs = f"{plural(how['prompts'], 'prompt')}, {plural(how['seeds'], 'seed')}, {plural(how['steps_seen'], 'step')}"
    return (
        f"fp8-convert sensitivity: {ranked.share:.1%} of the error of {ranked.component}'s output for "
        f"{byte_count(ranked.cost)}; its own output has {_db(ranked.own.both)} in FP8 (weights alone "
        f"{_db(ranked.own.weights)}, activations alone {_db(ranked.own.activations)}) over {runs} in {how['dtype']}"
    )


def _db(error: float) -> str:
    return f"{decibels(error):.1f} dB"


def _finite(value: Any) -> Any:
    """Data with null for numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
