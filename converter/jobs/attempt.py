"""One attempt at a job, in this process. Whatever goes wrong is its outcome, and stops nothing else."""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from ..conversion import convert, plan_conversion
from ..plan.plan import Plan
from ..snapshot.access import HubAccess
from ..telling.errors import Fp8Error, ResumableError, one_clause
from ..telling.progress import Progress
from .job import Job
from .outcome import Outcome, Status

_HUB = ("revision", "cache_dir", "local_files_only", "variant")
_WORK = ("device", "workers", "shards", "read_back", "stream", "force", "check")  # which a plan does not depend on


def convert_job(
    job: Job,
    token: str | bool | None = None,
    work: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Convert, or take up an interrupted conversion. work: how, where the job does not say."""

    def run() -> tuple[Status, dict[str, Any]]:
        settings = {**(work or {}), **job.settings}
        result = convert(job.source, job.output, token=token, progress=progress, quiet=True, **settings)
        return "already done" if result.already_done else "converted", result.to_json()

    return _outcome(job, run)


def plan_job(job: Job, token: str | bool | None = None) -> Outcome:
    """What a conversion would read and write, from headers alone."""

    def run() -> tuple[Status, dict[str, Any]]:
        access = HubAccess(token=token, quiet=True, **{key: job.settings[key] for key in _HUB if key in job.settings})
        settings = {key: value for key, value in job.settings.items() if key not in (*_HUB, *_WORK)}
        plan = plan_conversion(job.source, options=access, **settings)
        return "planned", {
            "bytes_before": plan.bytes_to_read,
            "bytes_after": plan.weight_bytes,
            "notes": list(plan.notes),
            "disk_bytes": plan.bytes_to_write + _bytes_to_fetch(plan, stream=bool(job.settings.get("stream"))),
        }

    return _outcome(job, run)


def _bytes_to_fetch(plan: Plan, *, stream: bool) -> int:
    """Bytes of a Hub repository that come onto the disk besides the output, if none are there yet."""
    if plan.snapshot.repo is None:
        return 0
    sizes = [shard.source.size for shard in plan.shards]
    return sum(sorted(sizes)[-2:]) if stream else sum(sizes)


def _outcome(job: Job, run: Callable[[], tuple[Status, dict[str, Any]]]) -> Outcome:
    started, hosts = time.monotonic(), (socket.gethostname(),)
    try:
        status, result = run()
    except Fp8Error as error:
        again = isinstance(error, ResumableError)
        return Outcome(job, "failed", str(error), again, hosts, time.monotonic() - started)
    except Exception as error:  # of one job, and maybe of its source alone
        at = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__} at {at.filename}:{at.lineno} ({one_clause(error)}): a bug, please report it."
        return Outcome(job, "failed", said, hosts=hosts, seconds=time.monotonic() - started)
    return Outcome(job, status, hosts=hosts, seconds=time.monotonic() - started, result=result)
