"""Load FP8 snapshots into diffusers pipelines, and tell what FP8 does to them.

`load_pipeline`, `load_component`, `report`; `compare` with the original, `calibrate` activations, and rank layers by
`sensitivity`. Importing this package also registers the quantizers that let plain `from_pretrained` load converted DiTs
and VAEs.
"""

from ..converter.telling.errors import LoadError
from .fp8_config import Fp8Config
from .pipeline import load_component, load_pipeline
from .quality.calibration import Calibration, calibrate
from .quality.compared import Comparison
from .quality.comparison import compare
from .quality.sensitivity import Sensitivity, sensitivity
from .registration import register
from .report import Report, report
from .steps import set_high_precision_steps

register()

__all__ = [
    "Calibration",
    "Comparison",
    "Fp8Config",
    "LoadError",
    "Report",
    "Sensitivity",
    "calibrate",
    "compare",
    "load_component",
    "load_pipeline",
    "report",
    "sensitivity",
    "set_high_precision_steps",
]
