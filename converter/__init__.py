"""Convert diffusers snapshots to FP8: `convert(source, output)`, and the plan and inspection beside it."""

from .convert import Result, convert, plan_conversion
from .errors import ConvertError, ResumableError
from .inspection import Inspection, inspect
from .manifest import Manifest, load_manifest
from .manifest_check import ManifestCheck, check_manifest
from .plan import Plan
from .verify import Verification, verify

__all__ = [
    "ConvertError",
    "Inspection",
    "Manifest",
    "ManifestCheck",
    "Plan",
    "Result",
    "ResumableError",
    "Verification",
    "check_manifest",
    "convert",
    "inspect",
    "load_manifest",
    "plan_conversion",
    "verify",
]
