"""A plan as people and scripts see it: decisions summed up in rows, a table for a notebook, and JSON."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..telling.notebook import Brief, html_table
from ..telling.quantities import byte_count
from .decide import PlannedTensor

if TYPE_CHECKING:
    from .plan import ComponentPlan, Plan


@dataclass(frozen=True, repr=False)
class Row(Brief):
    """Tensors of one component that share a decision: what tables and records show."""

    mode: str | None
    scheme: str | None
    kind: str | None
    rule: str
    why: str
    count: int
    params: int
    bytes_before: int
    bytes_after: int

    @property
    def otherwise(self) -> str:
        """What becomes of tensors that are not FP8."""
        return "left out" if self.bytes_before and not self.bytes_after else "kept"


def rows(component: ComponentPlan) -> list[Row]:
    """The component's decisions, summed up by what was decided and why; FP8 first, then by size."""
    sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for tensor in component.tensors:
        d = tensor.decision
        total = sums[d.mode, d.scheme, d.kind, d.rule, d.why]
        for i, value in enumerate((1, tensor.info.numel, tensor.info.nbytes, tensor.bytes_after)):
            total[i] += value
    table = [Row(*key, *values) for key, values in sums.items()]
    return sorted(table, key=lambda r: (r.mode is None, r.mode or "", -r.bytes_before, r.rule))


def plan_html(plan: Plan, caption: str) -> str:
    """A plan's components as a table for a notebook."""
    table = []
    for component in plan.components:
        before, after = component.weight_bytes
        fp8, all_of_it = sum(t.decision.fp8 for t in component.tensors), sum(1 for _ in component.tensors)
        label, class_name = component.source.label, component.source.class_name
        table.append((label, class_name, fp8, all_of_it - fp8, byte_count(before), byte_count(after)))
    return html_table(caption, ("component", "class", "FP8", "kept", "before", "after"), table, plan.notes)


def plan_json(plan: Plan) -> dict[str, Any]:
    """Every tensor with its decision, and the sums."""
    return {
        "source": plan.snapshot.label,
        "commit": plan.snapshot.commit,
        "pipeline": plan.snapshot.pipeline,
        "recipe": plan.recipe.to_json(),
        "notes": list(plan.notes),
        "bytes_to_write": plan.bytes_to_write,
        "bytes_to_read": plan.bytes_to_read,
        "bytes_read_twice": plan.bytes_read_twice,
        "components": [_component_json(c) for c in plan.components],
    }


def _component_json(component: ComponentPlan) -> dict[str, Any]:
    before, after = component.weight_bytes
    return {
        "name": component.source.name,
        "class": component.source.class_name,
        "problem": component.problem,
        "bytes_before": before,
        "bytes_after": after,
        "shards": [
            {
                "source": s.source.path,
                "paths": [file.path for file in s.files or component.files],
                "bytes_before": s.source.size,
                "bytes_after": s.size or sum(t.bytes_after for t in s.tensors),
                "tensors": [_tensor_json(t) for t in s.tensors],
            }
            for s in component.shards
        ],
    }


def _tensor_json(tensor: PlannedTensor) -> dict[str, Any]:
    d = tensor.decision
    return {
        "name": tensor.info.name,
        "dtype": tensor.info.dtype,
        "shape": list(tensor.info.shape),
        "decision": "fp8" if d.fp8 else "keep",
        "mode": d.mode,
        "scheme": d.scheme,
        "group": d.group,
        "rule": d.rule,
        "why": d.why,
    }
