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
    ray: str | bool | None = None,
    cpus_per_job: int = 2,
    retries: int = 2,
    wait_s: float = 5.0,
    dry_run: bool = False,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Batch:
    """Convert many snapshots. What fails is told in its outcome, and the others go on.

    jobs: a JSONL file, or mappings: each the arguments of `convert` by their names, `source` and `output` at least.
    ray: None runs one job after the other in this process; True starts Ray on this machine; an address uses the
    cluster there, whose machines have this package and see the same paths. cpus_per_job: what a job is given on Ray.
    retries: how often a job is tried again that stopped for a cause outside it (a connection, a full disk, a lost
    worker), first after `wait_s` seconds, then after twice as long each time; it resumes where it stopped.
    dry_run: plan each job, from headers alone. token: the Hub's, for all jobs.

    Raises ConvertError for a file that cannot be read and a cluster that does not answer.
    """
    for name, value, least in (("cpus_per_job", cpus_per_job, 1), ("retries", retries, 0)):
        if type(value) is not int or value < least:
            raise SettingsError(f"{name} is {value!r:.80}; use a whole number, {least} or more.")
    if ray == "":
        raise SettingsError("The address of the Ray cluster is empty; name it, or say only that Ray is to be used.")
    started, told = time.monotonic(), progress or Silent()
    todo = read_jobs(jobs)
    told.start(len(todo), "jobs")
    outcomes: dict[int, Outcome] = {}
    with closing(_place(ray, cpus_per_job, dry_run, token, told)) as place:
        for outcome in _outcomes(todo, place, retries, wait_s, told):
            outcomes[outcome.job.line] = outcome
            told.advance(1)
            told.say(f"[{len(outcomes)}/{len(todo)}] {outcome}")
            for note in outcome.result.get("notes", ()) if ray or dry_run else ():  # else the conversion has said it
                told.say(f"  note: {note}")
    return Batch(tuple(outcomes[job.line] for job in todo), time.monotonic() - started)


class _Words(Silent):
    """Passes on what a conversion says, not how far it is nor that it is too late to stop: the batch goes on."""

    def __init__(self, told: Progress) -> None:
        super().__init__()
        self._told = told

    def say(self, line: str) -> None:
        self._told.say(f"  {line}")


def _place(ray: str | bool | None, cpus: int, dry_run: bool, token: str | bool | None, told: Progress) -> Place:
    if not ray:
        plan, convert = partial(plan_job, token=token), partial(convert_job, token=token, progress=_Words(told))
        return Here(plan if dry_run else convert)
    from .on_ray import OnRay

    told.say("starting Ray" if ray is True else f"connecting to Ray at {ray}")
    return OnRay(None if ray is True else ray, cpus, dry_run, token)


def _outcomes(jobs: list[Job], place: Place, retries: int, wait_s: float, told: Progress) -> Iterator[Outcome]:
    """The last outcome of each job. Between its attempts those go first that have had fewer."""
    yield from (Outcome(job, "failed", job.problem) for job in jobs if job.problem is not None)
    # A heap: when it may begin, then their order.
    waiting = [(0.0, number, job) for number, job in enumerate(jobs) if job.problem is None]
    under_way: dict[int, tuple[int, Job]] = {}  # by line, with its place in the order
    hosts: dict[int, tuple[str | None, ...]] = {}
    while waiting or under_way:
        while waiting and len(under_way) < place.most and waiting[0][0] <= time.monotonic():
            _, number, job = heapq.heappop(waiting)
            under_way[job.line] = number, job
            place.begin(job)
        if not under_way:  # all that is left was stopped, and is to be tried again later
            time.sleep(max(0.0, waiting[0][0] - time.monotonic()))
            continue
        for found in place.finished(_POLL_S):
            number, job = under_way.pop(found.job.line)
            tried = hosts[job.line] = hosts.get(job.line, ()) + found.hosts
            if not found.again or len(tried) > retries:
                yield replace(found, hosts=tried, again=False)
                continue
            pause = min(_LONGEST_WAIT_S, wait_s * 2 ** min(len(tried) - 1, 10))
            heapq.heappush(waiting, (time.monotonic() + pause, number, job))
            told.say(f"attempt {len(tried)} of {retries + 1} on {tried[-1] or 'a machine that was lost'}, {found}")
