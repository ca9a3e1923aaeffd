"""`calibrate`: runs the original pipeline and chooses the static activation scale of every W8A8 layer."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...converter.format.header import TensorInfo, encode_header
from ...converter.format.layout import INPUT_SCALE
from ...converter.output.writing import write_small
from ...converter.plan.recipe import tool_version
from ...converter.plan.settings import Settings
from ...converter.plan.static import qualified
from ...converter.snapshot.access import HubAccess
from ...converter.telling.notebook import html_table, one_line
from ...converter.telling.progress import Progress, Silent
from ...converter.telling.quantities import plural
from ..arguments import choose_device
from .asked import Prompts, asked_prompts, asked_seeds, described
from .input_ranges import LayerRange, chosen_ranges, measure_ranges
from .original import open_original
from .ranges import Method, check_method
from .result_file import new_file
from .running import Sampling, cases

_NAMED = 5  # of the layers that saturate


@dataclass(frozen=True, repr=False)
class Calibration:
    """Activation scales and what they were chosen from. how: of the run, as the file's metadata states it."""

    layers: tuple[LayerRange, ...]
    how: Mapping[str, Any]

    @property
    def input_scales(self) -> dict[str, float]:
        """Scales by the keys of the file; a layer's names its component where two have one of that name."""
        count = Counter(layer.name for layer in self.layers)
        names = [r.name if count[r.name] == 1 else qualified(r.component, r.name) for r in self.layers]
        return {name + INPUT_SCALE: layer.scale for name, layer in zip(names, self.layers, strict=True)}

    def to_bytes(self) -> bytes:
        """The file that `--input-scales` takes: safetensors, a float32 scalar for each layer."""
        scales = self.input_scales
        tensors = [TensorInfo(name, "F32", (), 4 * i, 4 * i + 4) for i, name in enumerate(scales)]
        header = encode_header(tensors, {"calibration": json.dumps(dict(self.how), sort_keys=True)})
        return header + np.array([*scales.values()], "<f4").tobytes()

    def to_json(self) -> dict[str, Any]:
        """The same for scripts."""
        layers = [{**asdict(layer), "clip": layer.clip} for layer in self.layers]
        return {"how": dict(self.how), "layers": layers}

    def __repr__(self) -> str:
        return one_line(self, f"{plural(len(self.layers), 'layer')}, method {self.how['method']}")

    def _repr_html_(self) -> str:
        rows = [(f"{r.component}.{r.name}", f"{r.largest:.4g}", f"{r.clip:.4g}") for r in self.layers]
        return html_table(repr(self).strip("<>"), ("layer", "largest |x|", "clip"), rows)

    def __str__(self) -> str:
        """A line of the whole, and the layers whose scale lets the most of their range saturate."""
        lines = [f"{plural(len(self.layers), 'layer')} calibrated ({_words(self.how)})"]
        cut = sorted((r for r in self.layers if r.clip < r.largest * (1 - 1e-6)), key=lambda r: r.clip / r.largest)
        for r in cut[:_NAMED]:
            lines.append(f"  {r.component}.{r.name} saturates beyond {r.clip:.4g}, its largest was {r.largest:.4g}")
        if len(cut) > _NAMED:
            lines.append(f"  and {plural(len(cut) - _NAMED, 'more layer')} whose range is cut (--json has all)")
        return "\n".join(lines)


def _words(how: Mapping[str, Any]) -> str:
    method = f"percentile {how['percentile']:g}" if how["method"] == "percentile" else how["method"]
    return f"{method}, {plural(how['prompts'], 'prompt')}, {plural(how['seeds'], 'seed')}"


def calibrate(
    original: str | os.PathLike[str],
    *,
    prompts: Prompts,
    output: str | os.PathLike[str] | None = None,
    seeds: int | Sequence[int] = 1,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    guidance: float | None = None,
    extra: Mapping[str, Any] | None = None,
    method: Method = "max",
    percentile: float = 99.9,
    manifest: str | None = None,
    ignored_layers: Sequence[str] = (),
    components: Sequence[str] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    force: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    progress: Progress | None = None,
    quiet: bool = False,
    **pipeline_arguments: Any,
) -> Calibration:
    """Choose the static activation scale of every W8A8 layer, from what the layers meet while the original runs.

    original: a pipeline's folder or Hub id, not converted. prompts: a file, or a list of texts. output: writes the file
    there that `convert(..., activation_scheme="static", input_scales=...)` takes. seeds: how many, from 0 on, or which.
    steps, height, width, frames, guidance, extra: of the pipeline's call, None for its own defaults. method: "max",
    "percentile" (with `percentile`) or "mse" (`ranges.py`). manifest, ignored_layers, components: of the conversion, as
    `convert` takes them. device: None is CUDA where there is one. dtype: of the pipeline; None is bfloat16. force:
    replaces the file `output`. revision, token, cache_dir, local_files_only, variant: how the Hub is read. quiet: no
    progress bars of libraries. pipeline_arguments: components to use instead of the source's.

    Raises ConvertError and LoadError for sources that cannot be read or run so, and for a layer that never ran;
    SettingsError (a ValueError) for settings that mean nothing.
    """
    settings = Settings.among(locals())
    check_method(method, percentile)
    path = None if output is None else new_file(output, ".safetensors", force=force)
    sampling = Sampling(steps, asked_seeds(seeds), height, width, frames, guidance, extra or {})
    runs = cases(asked_prompts(prompts), sampling)
    progress = progress or Silent()
    source = open_original(
        original,
        settings,
        HubAccess(revision, token, cache_dir, local_files_only, variant, quiet=quiet),
        device=choose_device(device, None),
        dtype=dtype or torch.bfloat16,
        given=pipeline_arguments,
    )
    progress.start(len(runs), "runs")
    histograms = measure_ranges(source, runs, sampling, progress)
    how = {
        "source": source.plan.snapshot.repo or "a local folder",
        "commit": source.plan.snapshot.commit,
        "manifest": source.plan.recipe.manifest.name,
        "method": method,
        **({"percentile": percentile} if method == "percentile" else {}),
        **described(sampling, runs),
        "version": tool_version(),
    }
    found = Calibration(chosen_ranges(histograms, method, percentile), how)
    if path is not None:
        write_small(path, found.to_bytes(), str(path))
    progress.close()
    return found
