"""Medians of GPU time, kernels' and the host's time, and peak memory: what every benchmark here means by them."""

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # torchrun tells each process its own
_slowed = False  # by a profile


def median(run: Callable[[], Any], budget_ms: int = 300) -> float:
    """Milliseconds between two events around `run`, the median over some `budget_ms`; at least three runs.

    The first call, which compiles, is not counted. Short ones run with a cold L2 cache.
    """
    _not_slowed()
    from triton.testing import do_bench

    run()
    first = _between_events(run)
    if first > budget_ms / 5:
        return statistics.median([first, _between_events(run), _between_events(run)])
    return float(do_bench(run, warmup=50, rep=budget_ms, return_mode="median"))


def _between_events(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def host_microseconds(run: Callable[[], Any], calls: int = 300) -> float:
    """Microseconds that the host needs to issue one `run` whose kernels are shorter than that; the median of five."""
    _not_slowed()
    run()
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        found.append((time.perf_counter() - started) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(found)


def kernel_times(run: Callable[[], Any]) -> Counter[str]:
    """Milliseconds of GPU time in one `run`, by the kernel's name.

    From then on the host needs longer for all that this process launches: nothing may be timed after it.
    """
    from torch.profiler import ProfilerActivity, profile

    global _slowed
    _slowed = True
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in found.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.key] += event.self_device_time_total / 1e3
    return times


def _not_slowed() -> None:
    if _slowed:
        raise RuntimeError("a profile has been taken in this process, which slows every launch after it")


def peak_gigabytes(run: Callable[[], Any]) -> float:
    """The most GPU memory that is allocated during `run`, all that was there before included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer, as tuning compilers may; nothing is cut within a single C call."""
    import signal

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
