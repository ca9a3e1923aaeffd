"""Shards to plan and stream, built by hand or drawn by hypothesis, with what the reference makes of them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import reference
from hypothesis import strategies as st

from fp8_convert.converter.format.header import TensorInfo, read_header
from fp8_convert.converter.format.layout import STORAGE, W8A8, WeightFormat
from fp8_convert.converter.output.run import run
from fp8_convert.converter.output.work import Work
from fp8_convert.converter.plan.component import plan_shard
from fp8_convert.converter.plan.decide import Decision, PlannedTensor
from fp8_convert.converter.plan.manifest import load_manifest
from fp8_convert.converter.plan.plan import ComponentPlan, ShardPlan
from fp8_convert.converter.plan.planning import make_plan
from fp8_convert.converter.plan.recipe import Recipe
from fp8_convert.converter.plan.schedule import MEMORY, Memory
from fp8_convert.converter.snapshot.describing import describe
from fp8_convert.converter.snapshot.files import LocalFiles
from fp8_convert.converter.snapshot.snapshot import Component, Shard
from fp8_convert.converter.telling.progress import Silent

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}
KEPT = Decision("rule", "kept")
COMPONENT = Component("transformer", "diffusers", None, {}, "diffusion_pytorch_model", (), None)


def taken_apart(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:start]), whole[start:]


def put_together(header: bytes, data: bytes) -> bytes:
    """A safetensors file of a header, which may be anything, and the bytes behind it."""
    return len(header).to_bytes(8, "little") + header + data


@dataclass(frozen=True, repr=False)
class Weights:
    """The tensors of a component's shards, in file order, and the decisions for those that are not kept."""

    shards: Sequence[Mapping[str, reference.Tensor]]
    decisions: Mapping[str, Decision]
    input_scales: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Without the bytes, which no one can read in a failing test's report."""
        shards = [{n: (dtype, shape) for n, (dtype, shape, _) in shard.items()} for shard in self.shards]
        return f"Weights({shards}, {self.decisions}, {self.input_scales})"

    @property
    def spread(self) -> set[str]:
        """Groups with members in several shards."""
        groups = [{d.group for n, d in self.decisions.items() if n in shard and d.group} for shard in self.shards]
        return {g for i, found in enumerate(groups) for g in found if any(g in other for other in groups[i + 1 :])}

    def planned(self, shard: Mapping[str, reference.Tensor]) -> list[PlannedTensor]:
        """The shard's tensors as the plan has them, without a file."""
        tensors, position = [], 0
        for name, (dtype, shape, data) in shard.items():
            info = TensorInfo(name, dtype, shape, position, position + len(data))
            tensors.append(PlannedTensor(info, self.decision(name)))
            position += len(data)
        return tensors

    def decision(self, name: str) -> Decision:
        """What happens to a tensor, with its input scale if it has one."""
        decision = self.decisions.get(name, KEPT)
        return replace(decision, input_scale=self.input_scales.get(name.removesuffix(".weight")))

    def write(self, folder: Path, max_shard_size: int | None = None, memory: Memory = MEMORY) -> list[ShardPlan]:
        """Write the source files and plan them; source N gives out-N.safetensors, and if cut out-N-1.safetensors…"""
        plans = []
        for number, tensors in enumerate(self.shards):
            path = folder / f"source-{number}.safetensors"
            reference.write_safetensors(path, tensors)
            header = read_header(path, path.name)
            planned = tuple(PlannedTensor(t, self.decision(t.name)) for t in header.tensors)
            source = Shard(path.name, path.stat().st_size, header)
            plan = plan_shard(COMPONENT, source, planned, self.spread, max_shard_size, memory)
            names = [f"out-{number}{f'-{i}' if i else ''}.safetensors" for i in range(len(plan.files))]
            files = tuple(replace(file, path=name) for file, name in zip(plan.files, names, strict=True))
            plans.append(replace(plan, files=files))
        return plans

    def expected(self) -> list[dict[str, reference.Tensor]]:
        """Every shard's output tensors by the reference."""
        everything = {name: tensor for shard in self.shards for name, tensor in shard.items()}
        members: dict[str, list[str]] = {}
        for name, decision in self.decisions.items():
            members.setdefault(decision.group or name, []).append(name)
        return [self._expected_shard(shard, everything, members) for shard in self.shards]

    def _expected_shard(
        self,
        shard: Mapping[str, reference.Tensor],
        everything: Mapping[str, reference.Tensor],
        members: Mapping[str, list[str]],
    ) -> dict[str, reference.Tensor]:
        expected: dict[str, reference.Tensor] = {}
        for name, tensor in shard.items():
            if (decision := self.decisions.get(name)) is None:
                expected[name] = tensor
                continue
            amax = reference.amax(*(everything[m] for m in members[decision.group or name]))
            covered: reference.Block = "channel" if decision.scheme == "channel" else decision.block
            expected |= reference.fp8_weight(name, tensor, amax, covered)
            module = name.removesuffix(".weight")
            if module in self.input_scales:
                expected[f"{module}.input_scale"] = ("F32", (), np.float32(self.input_scales[module]).tobytes())
        return expected


def whole(shards: Sequence[ShardPlan]) -> ComponentPlan:
    """The plan of a component that has these shards."""
    return ComponentPlan(COMPONENT, None, tuple(shards), None, None)


def convert_in(
    memory: Memory, source: Path, output: Path, manifest: Path, workers: int = 2, shards: int | None = None
) -> None:
    """Convert as `convert` does, in other memory than it takes."""
    files = LocalFiles(source)
    plan = make_plan(describe(files), Recipe(load_manifest(str(manifest))), memory)
    run(plan, files, output, Work(device="cpu", workers=workers, shards=shards), Silent())


def fp8(block: reference.Block = None, group: str | None = None) -> Decision:
    if block == "channel":
        return Decision("rule", "why", "Linear", WeightFormat(W8A8, channel=True))
    return Decision("rule", "why", "Linear", WeightFormat(W8A8 if block is None else STORAGE, block), group)


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> reference.Tensor:
    """Finite random values of magnitudes from 1e-6 to 1e2, a few zeros of both signs among them."""
    rng = np.random.default_rng(seed)
    count = math.prod(shape)
    if dtype not in ("BF16", "F16", "F32"):
        return dtype, shape, rng.integers(0, 2, count * ITEM_BYTES[dtype], np.uint8).tobytes()
    values = (rng.standard_normal(count) * 10.0 ** rng.uniform(-6, 2)).astype(np.float32)
    values[rng.random(count) < 0.05] *= np.float32(0)
    if dtype == "BF16":
        return dtype, shape, (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return dtype, shape, values.astype("<f2" if dtype == "F16" else "<f4").tobytes()


@st.composite
def weights(draw: st.DrawFn, most_shards: int = 3) -> Weights:
    """Any mixture: dtypes, shapes (empty and odd-sized ones too), all scales, groups over shards, kept ones."""
    shards: list[dict[str, reference.Tensor]] = [{} for _ in range(draw(st.integers(1, most_shards)))]
    decisions: dict[str, Decision] = {}
    for number in range(draw(st.integers(0, 12))):
        name = f"t{number}.weight"
        kind = draw(st.sampled_from(["kept", "kept", "tensor", "conv", "channel", "block", "group"]))
        size = st.integers(1, 16)
        if kind == "kept":
            dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
            shape = tuple(draw(st.lists(st.integers(0, 12), max_size=3)))
        else:
            dtype = draw(st.sampled_from(["BF16", "F16", "F32"]))
            rows, columns = draw(st.tuples(size, st.integers(1, 4)))
            shape = draw(st.permutations([rows, 4 * columns]))  # other element counts are kept
            shape = (*shape, 3, 1, 1) if kind == "conv" else tuple(shape)
            block: reference.Block = "channel" if kind == "channel" else None
            if kind == "block":
                block = draw(st.tuples(st.integers(1, 12), st.integers(1, 20)))
            decisions[name] = fp8(block, draw(st.sampled_from(["g1", "g2"])) if kind == "group" else None)
        draw(st.sampled_from(shards))[name] = random_tensor(dtype, shape, draw(st.integers(0, 2**32 - 1)))
    scaled = draw(st.lists(st.sampled_from(sorted(decisions)), unique=True)) if decisions else []
    input_scales = {n.removesuffix(".weight"): draw(st.sampled_from([0.001, 0.5, 3.0])) for n in scaled}
    return Weights(shards, decisions, input_scales)
