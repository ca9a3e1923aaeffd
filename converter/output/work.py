"""How a conversion is to be done: nothing of this changes a byte of what is written."""

from __future__ import annotations

from dataclasses import dataclass

from ..telling.errors import SettingsError

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Work:
    """By the names of `convert`'s arguments. Raises SettingsError for what means nothing."""

    device: str = "auto"
    workers: int | None = None
    shards: int | None = None
    read_back: bool = False
    stream: bool = False
    force: bool = False
    check: bool = False

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise SettingsError(f"The device {self.device!r:.80} is unknown; use auto, cpu or cuda.")
        for name, value in (("workers", self.workers), ("shards", self.shards)):
            if value is not None and (type(value) is not int or value < 1):
                raise SettingsError(f"{name} is {value!r:.80}; use a positive number, or none.")
