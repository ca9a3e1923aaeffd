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
    from .plan.manifest import Manifest, load_manifest
    from .plan.manifest_check import ManifestCheck, check_manifest
    from .plan.plan import Plan
    from .pushing import Push, push
    from .snapshot.access import HubAccess
    from .telling.errors import ConvertError, Fp8Error, ResumableError, SettingsError
    from .verification import Verification, verify

_MODULES = {
    "ConvertError": "telling.errors",
    "Dequantized": "dequantization",
    "Fp8Error": "telling.errors",
    "HubAccess": "snapshot.access",
    "Inspection": "inspection",
    "Manifest": "plan.manifest",
    "ManifestCheck": "plan.manifest_check",
    "Plan": "plan.plan",
    "Push": "pushing",
    "Result": "conversion",
    "ResumableError": "telling.errors",
    "SettingsError": "telling.errors",
    "Verification": "verification",
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
    "ConvertError",
    "Dequantized",
    "Fp8Error",
    "HubAccess",
    "Inspection",
    "Manifest",
    "ManifestCheck",
    "Plan",
    "Push",
    "Result",
    "ResumableError",
    "SettingsError",
    "Verification",
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
