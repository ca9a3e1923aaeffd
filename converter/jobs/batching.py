"""`batch`: many conversions, here or on a Ray cluster, of which none stops the others. The door of a catalogue."""

from __future__ import annotations

import heapq
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from ..telling.errors import SettingsError
from ..telling.progress import Progress, Silent
from .attempt import convert_job, plan_job
from .job import Job, read_jobs
from .outcome import Batch, Outcome
from .places import Here, Place

_LONGEST_WAIT_S = 300.0
_POLL_S = 1.0


def batch(
    jobs: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    *,
    ray: str | bool = False,
    cpus_per_job: int = 2,
    retries: int = 2,
    wait_s: float = 5.0,
    dry_run: bool = False,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Batch:
    """Convert many snapshots. What fails is told in its outcome, and the others go on.

    jobs: a JSONL file, or mappings: each the arguments of `convert` by their names, `source` and `output` at least.
    ray: False runs one job after the other in this process; True starts Ray on this machine; an address uses the
    cluster there, whose machines have this package and see the same paths. cpus_per_job: what a job is given on Ray.
    retries: how often a job is tried again that stopped for a cause outside it (a connection, a full disk, a lost
    worker), first after `wait_s` seconds, then after twice as long each time; it resumes where it stopped.
    dry_run: plan each job, from headers alone. token: the Hub's, for all jobs.

    Raises ConvertError for a file that cannot be read and a cluster that does not answer.
    """
    for name, value, least in (("cpus_per_job", cpus_per_job, 1), ("retries", retries, 0)):
        if type(value) is not int or value < least:
            raise SettingsError(f"{name} is {value!r:.80}; use a whole number, {least} or more.")
    started, told = time.monotonic(), progress or Silent()
    todo = read_jobs(jobs)
    told.start(len(todo), "jobs")
    outcomes: dict[int, Outcome] = {}
    with closing(_place(ray, cpus_per_job, dry_run, token)) as place:
        for outcome in _outcomes(todo, place, retries, wait_s):
            if outcome.again:
                told.say(f"attempt {outcome.attempts} of {retries + 1}, to be repeated: {outcome}")
                continue
            outcomes[outcome.job.line] = outcome
            told.advance(1)
            told.say(f"[{len(outcomes)}/{len(todo)}] {outcome}")
    return Batch(tuple(outcomes[job.line] for job in todo), time.monotonic() - started)


def _place(ray: str | bool, cpus: int, dry_run: bool, token: str | bool | None) -> Place:
    if ray is False:
        return Here(partial(plan_job if dry_run else convert_job, token=token))
    from .on_ray import OnRay

    return OnRay(None if ray is True else ray, cpus, dry_run, token)


def _outcomes(jobs: list[Job], place: Place, retries: int, wait_s: float) -> Iterator[Outcome]:
    """The outcome of each job, and before it one for each attempt that is followed by another (`again`)."""
    yield from (Outcome(job, "failed", job.problem, attempts=0) for job in jobs if job.problem is not None)
    # A heap: when it may begin, then their order.
    waiting = [(0.0, number, job) for number, job in enumerate(jobs) if job.problem is None]
    under_way: dict[int, tuple[int, int, Job]] = {}  # by line: attempts, its place in the order
    attempts = dict.fromkeys((job.line for job in jobs), 0)
    while waiting or under_way:
        while waiting and len(under_way) < place.most and waiting[0][0] <= time.monotonic():
            _, number, job = heapq.heappop(waiting)
            attempts[job.line] += 1
            under_way[job.line] = attempts[job.line], number, job
            place.begin(job)
        if not under_way:  # all that is left was stopped, and is to be tried again later
            time.sleep(max(0.0, waiting[0][0] - time.monotonic()))
            continue
        for found in place.finished(_POLL_S):
            tried, number, job = under_way.pop(found.job.line)
            again = found.again and tried <= retries
            if again:
                pause = min(_LONGEST_WAIT_S, wait_s * 2 ** (tried - 1))
                heapq.heappush(waiting, (time.monotonic() + pause, number, job))
            yield replace(found, attempts=tried, again=again)
