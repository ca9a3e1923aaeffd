"""Every test that takes `device` runs on the CPU and, marked `gpu`, on CUDA where there is a device for it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """Libraries change PyTorch's default dtype and leave it so when plain `from_pretrained` fails."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def poisoned(device: torch.device) -> None:
    """Memory that the next results are likely to get is full of NaN: an element that nobody writes is seen."""
    if device.type == "cuda":
        sizes = [1 << power for power in range(9, 27)] * 3
        held = [torch.full((size,), float("nan"), device=device) for size in sizes]
        del held
