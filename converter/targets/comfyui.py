"""What ComfyUI reads: one file a component, its folders, and how a file says which layers are FP8.

Its loader takes a header's `_quantization_metadata`, JSON of `{"layers": {layer: {"format": ...}}}` under the names in
the file, for what it otherwise finds in `LAYER.comfy_quant` tensors (comfy/utils.py, convert_old_quants); a layer's
scale is `LAYER.weight_scale`, a scalar, and only linear layers can have one (comfy/ops.py, mixed_precision_ops).
Weights that are to be multiplied in the compute dtype have `full_precision_matrix_mult`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..format.layout import STORAGE, WeightFormat

METADATA_KEY = "_quantization_metadata"
FORMAT_VERSION = "1.0"
FORMAT = "float8_e4m3fn"
FULL_PRECISION = "full_precision_matrix_mult"

DIFFUSION_MODELS, TEXT_ENCODERS, VAE = "diffusion_models", "text_encoders", "vae"
FOLDERS = (DIFFUSION_MODELS, TEXT_ENCODERS, VAE)

# Tensors that ComfyUI looks for and that no component of diffusers has.
SENTENCE_PIECE = "spiece_model"  # UMT5's tokenizer, whose file is inside the text encoder's
TIMESTEP_ZERO = "__index_timestep_zero__"  # empty; says that reference images are at time step 0


def folder_of(class_name: str) -> str:
    """The folder of ComfyUI's models that a component of this class goes to."""
    if class_name.startswith("Autoencoder"):
        return VAE
    return DIFFUSION_MODELS if "Transformer" in class_name else TEXT_ENCODERS


def file_path(manifest: str, component: str, class_name: str, fp8: bool) -> str:
    """Where a component's file lies in the output. A component on its own has the name ""."""
    folder = folder_of(class_name)
    parts = (manifest, component or folder.removesuffix("s"), "fp8" if fp8 else None)
    name = "-".join(re.sub(r"[^\w.-]", "_", part, flags=re.ASCII) for part in parts if part)
    return f"{folder}/{name}.safetensors"


def quantization_metadata(modules: Mapping[str, WeightFormat]) -> str:
    """The header's statement on FP8 layers, by their original names, sorted."""
    layers = {name: layer_entry(modules[name]) for name in sorted(modules)}
    return json.dumps({"format_version": FORMAT_VERSION, "layers": layers}, separators=(",", ":"))


def layer_entry(how: WeightFormat) -> dict[str, Any]:
    """What the statement says of one layer."""
    return {"format": FORMAT, FULL_PRECISION: True} if how.mode == STORAGE else {"format": FORMAT}
