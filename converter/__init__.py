"""Convert diffusers snapshots to FP8: `convert(source, output)`, and the plan and inspection beside it."""

from .convert import Result, convert, plan_conversion
from .errors import ConvertError, ResumableError
from .inspection import Inspection, inspect
from .plan import Plan
from .verify import Verification, verify

__all__ = [
    "ConvertError",
    "Inspection",
    "Plan",
    "Result",
    "ResumableError",
    "Verification",
    "convert",
    "inspect",
    "plan_conversion",
    "verify",
]
