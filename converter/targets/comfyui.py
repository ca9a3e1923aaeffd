"""What ComfyUI reads: one file a component, its folders, and how a file says which layers are FP8.

Its loader takes a header's `_quantization_metadata`, JSON of `{"layers": {layer: {"format": ...}}}` under the names in
the file, for what it otherwise finds in `LAYER.comfy_quant` tensors (comfy/utils.py, convert_old_quants); a layer's
scale is `LAYER.weight_scale`, a scalar, and only linear layers can have one (comfy/ops.py, mixed_precision_ops).
Weights that are to be multiplied in the compute dtype have `full_precision_matrix_mult`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..format.header import DTYPE_BITS
from ..format.layout import STORAGE, Block, WeightFormat
from ..snapshot.foreign_config import COMFY_FORMAT, COMFY_FULL_PRECISION
from ..snapshot.snapshot import Component
from .key_maps import key_map, mapped_classes
from .target import Layer, Target

FORMAT_VERSION = "1.0"

DIFFUSION_MODELS, TEXT_ENCODERS, VAE = "diffusion_models", "text_encoders", "vae"

# Tensors that ComfyUI looks for and that no component of diffusers has.
SENTENCE_PIECE = "spiece_model"  # UMT5's tokenizer, whose file is inside the text encoder's
TIMESTEP_ZERO = "__index_timestep_zero__"  # empty; says that reference images are at time step 0


@dataclass(frozen=True)
class Extra:
    """A tensor that no component has. file: the file of the source whose bytes it is, None for an empty one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class Comfyui(Target):
    name = "comfyui"
    readers = "ComfyUI"
    single_files = True

    def settings_problem(self, *, compact: bool, block: Block | None) -> str | None:
        if block is not None:
            return "ComfyUI reads one scale per tensor; drop --weight-block-size."
        return None

    def why_kept(self, component: Component, components: Sequence[Component]) -> str | None:
        if folder_of(component.class_name or "") == VAE:
            return "ComfyUI has FP8 for linear layers alone"
        return None

    def block(self, component: Component, block: Block | None) -> Block | None:
        return None

    def problems(self, component: Component, layers: Sequence[Layer], ignored: Collection[str]) -> Iterator[str]:
        if key_map(component.class_name, component.config) is None:
            known = ", ".join(mapped_classes())
            yield f"the names in ComfyUI of {component.class_name} are not known to this version, which knows {known}"
        for layer in layers:
            if layer.format is not None and layer.kind != "Linear":
                yield f"{layer.name} is a {layer.kind}, and ComfyUI has FP8 for linear layers alone"


def extras_of(component: Component, sidecars: Mapping[str, int]) -> tuple[Extra, ...]:
    """The tensors that ComfyUI looks for beside a component's own. sidecars: the files of the source, with sizes.

    Raises LookupError with a clause where one cannot be had.
    """
    if component.class_name == "UMT5EncoderModel":
        path = f"{component.name.replace('text_encoder', 'tokenizer')}/spiece.model"
        if path not in sidecars:
            raise LookupError(f"ComfyUI reads the tokenizer {path} from its file, and the source has none")
        return (Extra(SENTENCE_PIECE, "U8", (sidecars[path],), path),)
    if component.class_name == "QwenImageTransformer2DModel" and component.config.get("zero_cond_t"):
        return (Extra(TIMESTEP_ZERO, "F32", (0,)),)
    return ()


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
    entry = {"format": COMFY_FORMAT}
    return {**entry, COMFY_FULL_PRECISION: True} if how.mode == STORAGE else entry
