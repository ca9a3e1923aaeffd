"""The refusal to convert next to nothing, with the plan that says what would become of every tensor.

Importing it imports no PyTorch: the command line names it before there is work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..telling.errors import ConvertError

if TYPE_CHECKING:
    from .plan import Plan


class PlanRefusedError(ConvertError):
    """A plan that would convert nothing, or next to nothing of a DiT; `plan` is for a dry run to show."""

    def __init__(self, message: str, plan: Plan) -> None:
        super().__init__(message)
        self.plan = plan
