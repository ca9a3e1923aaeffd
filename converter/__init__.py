"""Convert diffusers snapshots to FP8: `convert(source, output)`, and the plan, inspection and verification beside it.

What is exported is imported when it is first used: the command line can say what it does before PyTorch is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import Result, convert, plan_conversion
    from .errors import ConvertError, ResumableError
    from .inspection import Inspection, inspect
    from .manifest import Manifest, load_manifest
    from .manifest_check import ManifestCheck, check_manifest
    from .plan import Plan
    from .verification import Verification, verify

_MODULES = {
    "ConvertError": "errors",
    "Inspection": "inspection",
    "Manifest": "manifest",
    "ManifestCheck": "manifest_check",
    "Plan": "plan",
    "Result": "conversion",
    "ResumableError": "errors",
    "Verification": "verification",
    "check_manifest": "manifest_check",
    "convert": "conversion",
    "inspect": "inspection",
    "load_manifest": "manifest",
    "plan_conversion": "conversion",
    "verify": "verification",
}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
