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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..output.capacity import memory_bound, shards_for
from ..telling.errors import ConvertError, SettingsError, one_clause
from ..telling.quantities import byte_count, plural
from .attempt import convert_job, plan_job
from .job import Job
from .outcome import Outcome

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

    def options(self, known: Mapping[str, float]) -> dict[str, Any]:
        """For Ray; of its own resources, those that are `known` in the cluster."""
        disk = {_DISK: -(-self.disk // 10**6)} if self.disk and _DISK in known else {}
        return {"num_cpus": self.cpus, "memory": self.memory, "num_gpus": self.gpus, "resources": disk}

    def missing(self, machines: list[Mapping[str, float]], known: Mapping[str, float]) -> str | None:
        """What no machine of the cluster has, as a clause; None where one has all of it."""
        wanted = {"CPU": float(self.cpus), "memory": float(self.memory), "GPU": float(self.gpus)}
        if _DISK in known:
            wanted[_DISK] = self.disk / 1e6
        if any(all(machine.get(name, 0.0) >= value for name, value in wanted.items()) for machine in machines):
            return None
        said = [plural(self.cpus, "CPU"), f"{byte_count(self.memory)} of memory"]
        said += [plural(self.gpus, "GPU")] if self.gpus else []
        said += [f"{byte_count(self.disk)} of disk"] if _DISK in wanted else []
        return ", ".join(said)


class OnRay:
    """address: of a running cluster; None starts one on this machine, which ends with the batch."""

    def __init__(self, address: str | None, cpus: int, dry_run: bool, token: str | bool | None) -> None:
        self._ray = _ray()
        self._cpus, self._dry_run, self._token, self._folder = cpus, dry_run, token, os.getcwd()
        self._under_way: dict[Any, Job] = {}
        _connect(self._ray, address)
        self._known: Mapping[str, float] = self._ray.cluster_resources()
        self.most = max(_LEAST, 2 * int(self._known.get("CPU", 0)))
        if problem := self._conversion({}, disk=0).missing(self._machines(), {}):
            self.close()
            raise SettingsError(f"A job takes {problem}, which no machine of the cluster has; pass --cpus-per-job.")

    def begin(self, job: Job) -> None:
        self._submit(job, plan_job, Need(1, memory_bound(0)))

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
            return Outcome(job, "failed", said)
        except self._ray.exceptions.RayError as error:  # its worker was killed, or its machine is gone
            outcome = Outcome(job, "failed", f"its worker was lost ({one_clause(error)}); run again.", again=True)
        if outcome.status != "planned" or self._dry_run:
            return outcome
        need = self._conversion(job.settings, disk=outcome.result["disk_bytes"])
        if problem := need.missing(self._machines(), self._known):
            said = f"it takes {problem}, which no machine of the cluster has; add one, or pass fewer --cpus-per-job."
            return Outcome(job, "failed", said)
        self._submit(job, convert_job, need)
        return None

    def _conversion(self, settings: Mapping[str, Any], disk: int) -> Need:
        shards = settings.get("shards") or shards_for(self._cpus)
        return Need(self._cpus, memory_bound(shards), disk, int(settings.get("device") == "cuda"))

    def _submit(self, job: Job, attempt: Any, need: Need) -> None:
        work = {"workers": self._cpus, "shards": shards_for(self._cpus)} if attempt is convert_job else None
        task = self._ray.remote(_in_folder).options(max_retries=0, **need.options(self._known))
        self._under_way[task.remote(self._folder, attempt, job, self._token, work)] = job

    def _machines(self) -> list[Mapping[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]


def _in_folder(
    folder: str, attempt: Any, job: Job, token: str | bool | None, work: Mapping[str, Any] | None
) -> Outcome:
    """An attempt in a worker, from the folder that paths are relative to."""
    try:
        os.chdir(folder)
    except OSError as error:
        said = f"the worker has no folder {folder} ({error.strerror}); a cluster's machines share their files."
        return Outcome(job, "failed", said)
    found: Outcome = attempt(job, token) if work is None else attempt(job, token, work)
    return found


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
    if address is None:
        free = shutil.disk_usage(os.getcwd()).free // 10**6
        here = {"include_dashboard": False, "object_store_memory": _OBJECTS_BYTES, "resources": {_DISK: free}}
        ray.init(address="local", **here, **quiet)
        return
    try:
        ray.init(address=address, **quiet)
    except (ray.exceptions.RayError, ConnectionError, ValueError, RuntimeError, ImportError) as error:
        raise ConvertError(
            f"No Ray cluster answers at {address} ({one_clause(error)}); start one with `ray start --head`, set "
            "RAY_AUTH_MODE=token if it wants Ray's token, or pass --ray alone to start Ray on this machine."
        ) from error
