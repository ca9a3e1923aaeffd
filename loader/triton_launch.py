"""Starting Triton kernels at little cost to the host."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

# Launching through the JIT costs the host three times as much as the launch itself: it binds and specialises
# the arguments anew each time. A compiled kernel is kept for each set of facts that it was specialised on.
_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    facts: Hashable,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    *rest: int,
    warps: int = 4,
) -> None:
    """Runs `kernel` over `tensors` (all on one device) and `rest`.

    `facts` are what else the compiled kernel depends on: dtypes, and the integers it is specialised on. `rest` ends
    with the compile-time arguments. The tensors are plain ones: a subclass's memory is not its own to pass on.
    """
    device = tensors[0].get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, facts, grid, tensors, *rest, warps=warps)
    aligned = True
    for tensor in tensors:
        aligned = aligned and not tensor.data_ptr() % 16
    key = (kernel.fn, device, facts, aligned)
    made = _compiled.get(key)
    if made is None:
        _compiled[key] = kernel[grid](*tensors, *rest, num_warps=warps)
    else:
        made[grid](*tensors, *rest, stream=current_stream(device))


def current_stream(device: int) -> int:
    """The address of the CUDA stream that this thread launches on."""
    return int(torch._C._cuda_getCurrentRawStream(device))
