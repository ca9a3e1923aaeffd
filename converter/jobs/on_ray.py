"""Attempts as tasks of a Ray cluster, each of which declares the CPUs, the memory and the disk that it takes.

A job is planned first, which tells its bytes, and then converted, by tasks that Ray itself never repeats: a batch
counts attempts. Memory is the converter's bound, whatever the model's size. Disk is declared where machines have a
resource `disk_mb` (`ray start --resources='{"disk_mb": 500000}'`; Ray that is started here has what is free in the
current folder), so that what is under way fits at the same time; whether there is room at all the conversion finds out.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..output.capacity import memory_bound, shards_for
from ..plan.recipe import tool_version
from ..telling.errors import ConvertError, SettingsError, one_clause
from ..telling.quantities import byte_count, plural
from .attempt import convert_job, plan_job
from .job import Job
from .outcome import Outcome
from .places import Attempt

_DISK = "disk_mb"  # Ray counts in whole numbers
_LEAST = 64  # jobs under way on a small cluster: the next ones are planned while some are converted
_OBJECTS_BYTES = 80 * 1024 * 1024  # of memory that Ray sets apart for what tasks pass on, which here is next to nothing
_INSTALL = "`pip install 'fp8-convert[ray]'`"


@dataclass(frozen=True)
class Need:
    """What a task takes. memory, disk: bytes."""

    cpus: int
    memory: int
    disk: int = 0
    gpus: int = 0

    def options(self, machines: list[Mapping[str, float]]) -> dict[str, Any]:
        """For Ray. Disk is declared where machines have it, and at most all of one: whether a job, which may be done
        already, has room is for its conversion to say.
        """
        most = max((machine.get(_DISK, 0.0) for machine in machines), default=0.0)
        disk = min(-(-self.disk // 10**6), int(most))
        resources = {_DISK: disk} if disk else {}
        return {"num_cpus": self.cpus, "memory": self.memory, "num_gpus": self.gpus, "resources": resources}

    def missing(self, machines: list[Mapping[str, float]]) -> str | None:
        """What no machine of the cluster has, as a clause; None where one has all of it. Disk is not asked for."""
        wanted = {"CPU": float(self.cpus), "memory": float(self.memory), "GPU": float(self.gpus)}
        if any(all(machine.get(name, 0.0) >= value for name, value in wanted.items()) for machine in machines):
            return None
        gpus = f", {plural(self.gpus, 'GPU')}" if self.gpus else ""
        return f"{plural(self.cpus, 'CPU')}, {byte_count(self.memory)} of memory{gpus}"


class OnRay:
    """address: of a running cluster; None starts one on this machine, which ends with the batch."""

    def __init__(self, address: str | None, cpus: int, dry_run: bool, token: str | bool | None) -> None:
        self._ray = _ray()
        self._cpus, self._dry_run, self._token, self._folder = cpus, dry_run, token, os.getcwd()
        self._under_way: dict[Any, Job] = {}
        _connect(self._ray, address)
        self.most = max(_LEAST, 2 * int(self._ray.cluster_resources().get("CPU", 0)))
        if problem := self._conversion({}, disk=0).missing(self._machines()):
            self.close()
            raise SettingsError(f"A job takes {problem}, which no machine of the cluster has; pass --cpus-per-job.")

    def begin(self, job: Job) -> None:
        self._submit(job, partial(plan_job, token=self._token), Need(1, memory_bound(0)))

    def finished(self, seconds: float) -> list[Outcome]:
        done, _ = self._ray.wait([*self._under_way], num_returns=1, timeout=seconds)
        outcomes = [self._outcome(reference) for reference in done]
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        for reference in self._under_way:
            self._ray.cancel(reference, force=False)  # a KeyboardInterrupt, which leaves what can be taken up
        self._ray.shutdown()

    def _outcome(self, reference: Any) -> Outcome | None:
        """What came of a task; None where that was a plan, whose conversion is under way now."""
        job = self._under_way.pop(reference)
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # raised where the worker takes the task up
            said = (
                f"its worker could not begin it ({one_clause(error.cause)}); install the same fp8-convert everywhere."
            )
            return Outcome(job, "failed", said, hosts=(None,))
        except self._ray.exceptions.RayError as error:  # its worker was killed, or its machine is gone
            said = f"its worker was lost ({one_clause(error)}); run the same command again to resume."
            return Outcome(job, "failed", said, again=True, hosts=(None,))
        if outcome.status != "planned" or self._dry_run:
            return outcome
        need = self._conversion(job.settings, disk=outcome.result["disk_bytes"])
        if problem := need.missing(self._machines()):
            said = f"it takes {problem}, which no machine of the cluster has; add one, or let the job ask for less."
            return replace(outcome, status="failed", error=said, result={})
        work = {"workers": self._cpus, "shards": shards_for(self._cpus)}
        self._submit(job, partial(convert_job, token=self._token, work=work), need)
        return None

    def _conversion(self, settings: Mapping[str, Any], disk: int) -> Need:
        shards = settings.get("shards") or shards_for(self._cpus)
        cpus = settings.get("workers") or self._cpus
        return Need(cpus, memory_bound(shards), disk, int(settings.get("device") == "cuda"))

    def _submit(self, job: Job, attempt: Attempt, need: Need) -> None:
        task = self._ray.remote(_in_folder).options(max_retries=0, **need.options(self._machines()))
        self._under_way[task.remote(tool_version(), self._folder, attempt, job)] = job

    def _machines(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]


def _in_folder(version: str, folder: str, attempt: Attempt, job: Job) -> Outcome:
    """An attempt in a worker, from the folder that paths are relative to. version: of who asks for it."""
    host = socket.gethostname()
    if version != tool_version():
        said = f"{host} has fp8-convert {tool_version()}, and this is {version}; install the same one everywhere."
        return Outcome(job, "failed", said, hosts=(host,))
    try:
        os.chdir(folder)
    except OSError as error:
        said = f"{host} has no folder {folder} ({error.strerror}), where this command runs; let machines share it."
        return Outcome(job, "failed", said, hosts=(host,))
    return attempt(job)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConvertError(f"Ray is not installed ({one_clause(error)}); {_INSTALL}.") from None
    return ray


def _connect(ray: Any, address: str | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            free = shutil.disk_usage(os.getcwd()).free // 10**6
            here = {"include_dashboard": False, "object_store_memory": _OBJECTS_BYTES, "resources": {_DISK: free}}
            ray.init(address="local", **here, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ray.exceptions.RayError, ConnectionError, ValueError, RuntimeError, ImportError) as error:
        if address is None:
            raise ConvertError(f"Ray does not start here ({one_clause(error)}); run without --ray.") from error
        raise ConvertError(
            f"No Ray cluster answers at {address} ({one_clause(error)}); start one with `ray start --head`, set "
            "RAY_AUTH_MODE=token if it wants Ray's token, or pass --ray alone to start Ray on this machine."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray puts a handler of its own there
