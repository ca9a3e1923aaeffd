"""Convert diffusers snapshots to FP8: `convert(source, output)`, and the plan, inspection and verification beside it.

What is exported is imported when it is first used: the command line can say what it does before PyTorch is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import Result, convert, plan_conversion
    from .dequantization import Dequantized, dequantize
    from .importing import import_checkpoint, plan_import_checkpoint
    from .inspection import Inspection, inspect
    from .jobs.batching import batch
    from .jobs.job import Job
    from .jobs.outcome import Batch, Outcome
    from .plan.manifest import Manifest, load_manifest
    from .plan.manifest_check import ManifestCheck, check_manifest
    from .plan.plan import Plan
    from .pushing import Push, push
    from .snapshot.access import HubAccess
    from .telling.errors import ConvertError, Fp8Error, ResumableError, SettingsError
    from .verification import Verification, verify

_MODULES = {
    "Batch": "jobs.outcome",
    "ConvertError": "telling.errors",
    "Dequantized": "dequantization",
    "Fp8Error": "telling.errors",
    "HubAccess": "snapshot.access",
    "Inspection": "inspection",
    "Job": "jobs.job",
    "Manifest": "plan.manifest",
    "ManifestCheck": "plan.manifest_check",
    "Outcome": "jobs.outcome",
    "Plan": "plan.plan",
    "Push": "pushing",
    "Result": "conversion",
    "ResumableError": "telling.errors",
    "SettingsError": "telling.errors",
    "Verification": "verification",
    "batch": "jobs.batching",
    "check_manifest": "plan.manifest_check",
    "convert": "conversion",
    "dequantize": "dequantization",
    "import_checkpoint": "importing",
    "inspect": "inspection",
    "load_manifest": "plan.manifest",
    "plan_conversion": "conversion",
    "plan_import_checkpoint": "importing",
    "push": "pushing",
    "verify": "verification",
}

__all__ = [
    "Batch",
    "ConvertError",
    "Dequantized",
    "Fp8Error",
    "HubAccess",
    "Inspection",
    "Job",
    "Manifest",
    "ManifestCheck",
    "Outcome",
    "Plan",
    "Push",
    "Result",
    "ResumableError",
    "SettingsError",
    "Verification",
    "batch",
    "check_manifest",
    "convert",
    "dequantize",
    "import_checkpoint",
    "inspect",
    "load_manifest",
    "plan_conversion",
    "plan_import_checkpoint",
    "push",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
