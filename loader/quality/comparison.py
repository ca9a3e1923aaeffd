"""`compare`: the same prompts and seeds through an FP8 pipeline and its original, one after the other."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...converter.format.reader import as_json
from ...converter.snapshot.access import HubAccess
from ...converter.telling.errors import ConvertError, Fp8Error, SettingsError, one_clause
from ...converter.telling.progress import Progress, Silent, bars_of_libraries
from ..arguments import choose_device, choose_dtype, without_habits
from ..pipeline import load_pipeline
from .asked import asked_prompts, asked_seeds
from .compared import ComparedCase, Comparison, Controlled, Ran
from .control import Control, changed, check_control, described
from .findings import farness, limits, problems
from .machine import machine
from .page import Page, View, open_page
from .passes import Generate, Run, Shelf, free, run_cases
from .pictures import Distance, Lpips, distance, load_lpips
from .prompts import Prompt
from .running import Case, Sampling, call_arguments, cases, generate
from .sides import Placing, Side, open_sides
from .weight_errors import LayerError, weight_errors

FP8, ORIGINAL, CONTROL = "FP8", "original", "control"  # on the shelf, and whose pictures are broken


def compare(
    fp8: Any,
    original: Any,
    *,
    prompts: str | os.PathLike[str] | Sequence[str | Prompt],
    seeds: int | Sequence[int] = 1,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    guidance: float | None = None,
    extra: Mapping[str, Any] | None = None,
    control: Control = "attention",
    lpips: bool | None = None,
    fail_below: float | None = None,
    output: str | os.PathLike[str] | None = None,
    shown: int = 12,
    force: bool = False,
    device: str | int | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    offload: bool = False,
    fp8_revision: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
    **loading: Any,
) -> Comparison:
    """Run an FP8 pipeline and its original on the same prompts and noise, and tell how far their pictures are apart.

    fp8: a converted snapshot's folder or Hub id; None converts the original while it loads, as `loading` says.
    original: the folder or Hub id that it was converted from. Both are loaded one after the other, never together; or
    both are pipelines that are handed over as they are.
    prompts: a file (`read_prompts`), or a list of texts. seeds: how many for each prompt, from 0 on, or which. steps,
    height, width, frames, guidance, extra: as in `Sampling`.
    control: the harmless change of the original to compare FP8 with: "attention", "dtype", "batch" or "none".
    lpips: None measures it where the extra is installed, True raises where it cannot be measured.
    fail_below: dB; a frame whose PSNR is lower is a problem.
    output: an HTML page to write, with the `shown` farthest cases. force: replaces a file that is no such page.
    device, dtype: of both pipelines, as in `load_pipeline`. offload: components wait on the CPU until they are needed.
    fp8_revision: of the FP8 repository; revision, token, cache_dir, local_files_only, variant: as in `load_pipeline`,
    of the original. quiet: no progress bars of libraries.
    loading: what else `load_pipeline` takes for the FP8 pipeline, such as backend or quantization_config.

    Where both have files, their weights are compared too, and layers that are not the original's are named. Raises
    ConvertError, LoadError and SettingsError for what cannot be compared; what is wrong with the pictures is among the
    result's problems.
    """
    placing, computing = _place(device, offload), _dtype(dtype)
    loading = without_habits(loading, _taken(load_pipeline), "compare", _taken(compare))
    sampling = Sampling(steps, asked_seeds(seeds), height, width, frames, guidance, extra or {})
    work = cases(asked_prompts(prompts), sampling)
    _check_limits(fail_below, shown)
    page = None if output is None else open_page(output, force=force)
    access = HubAccess(revision, token, cache_dir, local_files_only, variant, quiet=quiet)
    ours, theirs, apart = open_sides(fp8, original, placing, access, fp8_revision, loading)
    check_control(control, handed_over=theirs.load is None)
    measure, unmeasured = load_lpips(placing.device, lpips)
    job = _Job(work, sampling, placing.device, computing, measure, progress or Silent())
    layers = job.weights(ours, theirs)
    with bars_of_libraries(quiet=quiet), _shelf() as shelf:
        ran = job.run(FP8, ours, shelf), job.run(ORIGINAL, theirs, shelf)
        controlled = job.control(control, theirs, shelf)
        compared = tuple(job.compared(shelf, controlled))
        found = Comparison(*ran, controlled, compared, layers, sampling, machine(placing.device))
        notes = (*apart, *([unmeasured] if unmeasured else []), *limits(found, ours, theirs))
        found = replace(found, notes=notes, problems=tuple(problems(found, fail_below)))
        return found if page is None else _with_page(found, page, shelf, shown)


@dataclass(frozen=True)
class _Job:
    """What is done with each pipeline, and with what they made."""

    cases: Sequence[Case]
    sampling: Sampling
    device: torch.device
    dtype: torch.dtype
    lpips: Lpips | None
    progress: Progress

    def weights(self, ours: Side, theirs: Side) -> tuple[LayerError, ...] | None:
        """The errors of the weights, where both have files, and one is not made of others by a LoRA."""
        if ours.held is None or theirs.held is None or (ours.record and ours.record.recipe.merged_loras):
            return None
        self.progress.say(f"comparing the weights of {ours.label} and {theirs.label}")
        return weight_errors(ours.held, theirs.held, self.device, self.progress)

    def run(self, whose: str, side: Side, shelf: Shelf) -> Ran:
        self.progress.say(f"{whose}: {side.label}")
        run = self._pass(whose, side, self.dtype, shelf, lambda pipe, case: generate(pipe, case, self.sampling))
        recipe = side.made if side.record is None else as_json(side.record.recipe)
        return Ran(side.label, side.repo, side.commit, run, recipe)

    def control(self, kind: Control, side: Side, shelf: Shelf) -> Controlled | None:
        """Run the original with a harmless change. What fails there is told and costs nothing else."""
        if kind == "none":
            return None
        change = described(kind, self.device)
        self.progress.say(f"{CONTROL}: the original {change}")
        dtype, failed = torch.float32 if kind == "dtype" else self.dtype, None
        try:
            self._pass(CONTROL, side, dtype, shelf, lambda pipe, case: changed(kind, pipe, case, self.sampling))
        except (RuntimeError, Fp8Error) as error:  # no memory for it, or no such kernel
            failed = one_clause(error)
        return Controlled(kind, change, failed)

    def _pass(self, whose: str, side: Side, dtype: torch.dtype, shelf: Shelf, generated: Generate) -> Run:
        def load() -> Any:
            pipe = side.get(dtype)
            for case in self.cases:
                call_arguments(pipe, case, self.sampling)  # what it does not take is said before the first picture
            return pipe

        if side.load is not None:
            free()  # of the pipeline before
        keep = functools.partial(shelf.put, whose)
        return run_cases(load, self.cases, generated, keep, self.device, self.progress)

    def compared(self, shelf: Shelf, control: Controlled | None) -> Iterator[ComparedCase]:
        """The distances of every case. Raises ConvertError where two pictures differ in size."""
        controlled = control is not None and control.failed is None
        for number, case in enumerate(self.cases):
            truth = shelf.get(ORIGINAL, number)
            frames = {whose: shelf.get(whose, number) for whose in (FP8, *([CONTROL] if controlled else []))}
            for whose, found in frames.items():
                _check_size(whose, found, truth, case)
            broken = tuple(w for w, found in {ORIGINAL: truth, **frames}.items() if not bool(found.isfinite().all()))
            distances = {whose: tuple(self._distances(found, truth)) for whose, found in frames.items()}
            yield ComparedCase(case, distances[FP8], distances.get(CONTROL, ()), broken)

    def _distances(self, frames: Tensor, truth: Tensor) -> Iterator[Distance | None]:
        for frame, true in zip(frames, truth, strict=True):
            finite = bool(frame.isfinite().all() and true.isfinite().all())
            yield distance(frame, true, self.lpips) if finite else None


def _with_page(found: Comparison, page: Page, shelf: Shelf, shown: int) -> Comparison:
    """Write the page; where that fails the numbers are not lost, and its error is one of the problems."""
    ranked = sorted(range(len(found.cases)), key=lambda number: farness(found.cases[number]))
    views = [_view(found, number, shelf) for number in ranked[:shown]]
    try:
        page.write(found, views)
    except ConvertError as error:
        return replace(found, problems=(*found.problems, str(error)))
    return replace(found, page=page.path)


def _view(found: Comparison, number: int, shelf: Shelf) -> View:
    case = found.cases[number]
    whose = (ORIGINAL, FP8, *([CONTROL] if case.control else []))
    return View(case, {w: shelf.get(w, number)[case.worst_frame] for w in whose})


@contextlib.contextmanager
def _shelf() -> Iterator[Shelf]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="fp8-convert-compare-")
    except OSError as error:
        raise ConvertError(
            f"No temporary folder can be made for the pictures ({error.strerror}); set TMPDIR to one with room."
        ) from error
    with folder as path:
        yield Shelf(Path(path))


def _check_size(whose: str, found: Tensor, truth: Tensor, case: Case) -> None:
    if found.shape != truth.shape:
        one, other = (" x ".join(map(str, t.shape)) for t in (found, truth))
        raise ConvertError(
            f"For {case.label:.120}, {whose} gives frames of {one} (frames, height, width, channels) and the original "
            f"{other}; they cannot be compared: give height and width, or check that both are the same pipeline."
        )


def _check_limits(fail_below: float | None, shown: int) -> None:
    if fail_below is not None and not (isinstance(fail_below, int | float) and math.isfinite(fail_below)):
        raise SettingsError(f"fail_below is {fail_below!r:.80}; give decibels, such as 30.")
    if isinstance(shown, bool) or not isinstance(shown, int) or shown < 0:
        raise SettingsError(f"shown is {shown!r:.80}; give how many cases the page is to show.")


def _place(device: Any, offload: bool) -> Placing:
    try:
        return Placing(choose_device(device, None), offload)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _dtype(dtype: Any) -> torch.dtype:
    try:
        return choose_dtype(dtype, None)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _taken(function: Callable[..., Any]) -> set[str]:
    """The names of a function's keyword arguments."""
    parameters = inspect.signature(function).parameters
    return {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
