"""Load FP8 snapshots into diffusers pipelines: `load_pipeline`, `load_component`, `report`; and `compare` them.

Importing this package also registers the quantizers that let plain `from_pretrained` load converted DiTs and
VAEs.
"""

from ..converter.telling.errors import LoadError
from .fp8_config import Fp8Config
from .pipeline import load_component, load_pipeline
from .quality.compared import Comparison
from .quality.comparison import compare
from .registration import register
from .report import Report, report

register()

__all__ = [
    "Comparison",
    "Fp8Config",
    "LoadError",
    "Report",
    "compare",
    "load_component",
    "load_pipeline",
    "report",
]
