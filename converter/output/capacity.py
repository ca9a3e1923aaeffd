"""How much is done at the same time: shards under way and threads for the arithmetic, from what the machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .work import Work

_MOST_WORKERS = 16  # by then reading, hashing and writing are the limit
_MOST_SHARDS = 8
_CORES_PER_SHARD = 2  # it hashes what it reads and what it writes, a thread each, and converts in others
_BYTES_PER_SHARD = 150 * 1024 * 1024
_BYTES_OF_IMPORTS = 1024 * 1024 * 1024  # PyTorch with CUDA, diffusers and transformers
_BYTES_OVER_IMPORTS = 300 * 1024 * 1024  # with one shard under way
_SHARE_OF_MEMORY = 4  # one part in so many is for the shards under way
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


@dataclass(frozen=True)
class Capacity:
    """shards: how many are under way at most. workers: threads for the arithmetic on the CPU, for all of them."""

    shards: int
    workers: int


def capacity(work: Work, *, ahead: bool, cores: int | None = None, memory: int | None = None) -> Capacity:
    """What was asked for, else what fits the machine; `cores` and bytes of `memory` are its own by default.

    ahead: whether shards may be opened before the one before them is done; without that it is one at a time.
    """
    cores = cores or available_cores()
    memory = memory or total_memory()
    fitting = max(1, min(shards_for(cores), memory // _SHARE_OF_MEMORY // _BYTES_PER_SHARD))
    shards = (work.shards or fitting) if ahead else 1
    return Capacity(shards, work.workers or min(cores, _MOST_WORKERS))


def shards_for(cores: int) -> int:
    """Shards under way that so many cores are enough for."""
    return max(1, min(cores // _CORES_PER_SHARD, _MOST_SHARDS))


def memory_bound(shards: int) -> int:
    """Bytes of memory that a process which converts takes at most, whatever the model's size; 0 shards: which plans."""
    return _BYTES_OF_IMPORTS + (_BYTES_OVER_IMPORTS + (shards - 1) * _BYTES_PER_SHARD if shards else 0)


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 2


def total_memory() -> int:
    """Bytes of memory of the machine, or of the container that this process is in; many where neither tells."""
    found = [1 << 60]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        limit = ""
    return min([*found, int(limit)] if limit.isdecimal() else found)
