"""`report(pipe)`: what was promised FP8, what is installed, the bytes, and which matrix product runs and why."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import nn

from ..converter.telling.notebook import Brief
from .checkpoint import Fp8Modules
from .cuda_graphs import recorded_blocks
from .few_tokens import STORAGE_TOKENS, W8A8_TOKENS, can_multiply
from .linear import W8A8LinearMixin
from .parts import shape_here
from .shared_input import groups_of
from .steps import HighPrecisionSteps, high_precision_steps_of
from .storage import StorageLinearMixin
from .weights import Fp8Weight


@dataclass(frozen=True, repr=False)
class ComponentReport(Brief):
    """One component. Counts are of FP8 modules by mode; bytes are of parameters and buffers.

    `missing` are promised modules that are not FP8, `extra` FP8 ones that nobody promised. `backends` counts
    "product: reason" of the W8A8 linears, on the device where they are now. `notes` are sentences about the rest.
    """

    name: str
    class_name: str
    device: str
    dtype: str
    expected: Mapping[str, int]
    installed: Mapping[str, int]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    bytes_at_rest: int
    bytes_in_bf16: int
    backends: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether exactly the promised modules are FP8."""
        return not self.missing and not self.extra

    def to_json(self) -> dict[str, Any]:
        """Everything, for scripts."""
        counts = {key: dict(getattr(self, key)) for key in ("expected", "installed", "backends")}
        return {
            "ok": self.ok,
            **vars(self),
            **counts,
            "missing": [*self.missing],
            "extra": [*self.extra],
            "notes": [*self.notes],
        }


@dataclass(frozen=True, repr=False)
class Report(Brief):
    """A pipeline's components. Printing it is what belongs into a bug report.

    high_precision_steps: (first, last), the steps of each run in which the W8A8 linears dequantise; None is no such.
    """

    pipeline: str
    components: tuple[ComponentReport, ...]
    versions: Mapping[str, str]
    high_precision_steps: tuple[int, int] | None = None

    @property
    def ok(self) -> bool:
        """Whether every component has the FP8 modules that it was promised."""
        return all(component.ok for component in self.components)

    @property
    def verdict(self) -> str:
        """`ok` in words."""
        return "every promised module is FP8" if self.ok else "SOME PROMISED MODULES ARE NOT FP8"

    def to_json(self) -> dict[str, Any]:
        """Everything, for scripts: what `json.dumps` takes."""
        components = [component.to_json() for component in self.components]
        steps = self.high_precision_steps
        return {
            "ok": self.ok,
            "pipeline": self.pipeline,
            "versions": dict(self.versions),
            "high_precision_steps": None if steps is None else [*steps],
            "components": components,
        }

    def __repr__(self) -> str:
        counts = ", ".join(f"{c.name} {_counts(c)}" for c in self.components if _modes(c))
        return f"<Report of {self.pipeline}: {self.verdict}{f' ({counts})' if counts else ''}>"

    def _repr_html_(self) -> str:
        head = ("component", "FP8 modules", "GB at rest", "GB in BF16", "device", "dtype", "remarks")
        rows = [
            (
                c.name,
                _counts(c),
                f"{c.bytes_at_rest / 1e9:.3f}",
                f"{c.bytes_in_bf16 / 1e9:.3f}",
                c.device,
                c.dtype.removeprefix("torch."),
                "; ".join(_remarks(c)),
            )
            for c in self.components
        ]
        cells = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        header = "".join(f"<th>{escape(title)}</th>" for title in head)
        caption = escape(f"{self.pipeline}: {self.verdict}")
        return f"<table><caption>{caption}</caption><tr>{header}</tr>{cells}</table>"

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        lines = [f"{self.pipeline} ({versions})"]
        lines.append(f"{'component':18} {'FP8 modules':>24} {'GB at rest':>11} {'GB in BF16':>11}  device, dtype")
        for c in self.components:
            lines.append(
                f"{c.name:18} {_counts(c):>24} {c.bytes_at_rest / 1e9:11.3f} {c.bytes_in_bf16 / 1e9:11.3f}  "
                f"{c.device}, {c.dtype.removeprefix('torch.')}"
            )
            lines += [f"{'':18} {remark}" for remark in _remarks(c)]
        total = sum(c.bytes_at_rest for c in self.components), sum(c.bytes_in_bf16 for c in self.components)
        lines.append(f"{'all':18} {'':>24} {total[0] / 1e9:11.3f} {total[1] / 1e9:11.3f}  {self.verdict}")
        return "\n".join(lines)


def report(pipe: Any) -> Report:
    """Report on a pipeline, or on a single component. Runs nothing and changes nothing."""
    parts = {"": pipe} if isinstance(pipe, nn.Module) else getattr(pipe, "components", {})
    modules = {name or type(part).__name__: part for name, part in parts.items() if isinstance(part, nn.Module)}
    versions = {name: version(name) for name in ("fp8-convert", "torch", "diffusers", "transformers")}
    policy = high_precision_steps_of(pipe)
    described = tuple(_component(name, part, policy) for name, part in modules.items())
    return Report(type(pipe).__name__, described, versions, (policy.first, policy.last) if policy else None)


def _modes(component: ComponentReport) -> list[str]:
    return sorted({*component.expected, *component.installed}, reverse=True)


def _counts(component: ComponentReport) -> str:
    """Installed of expected modules, by mode."""
    installed, expected = component.installed, component.expected
    return ", ".join(f"{installed.get(m, 0)}/{expected.get(m, 0)} {m}" for m in _modes(component)) or "none"


def _remarks(component: ComponentReport) -> list[str]:
    """What runs how, the first modules that are not as promised, and what else there is to know."""
    return [
        *(f"{count} linears run {backend}" for backend, count in component.backends.items()),
        *(f"NOT FP8: {name}" for name in component.missing[:5]),
        *(f"unexpectedly FP8: {name}" for name in component.extra[:5]),
        *component.notes,
    ]


def _component(name: str, model: nn.Module, policy: HighPrecisionSteps | None) -> ComponentReport:
    quantizer = getattr(model, "hf_quantizer", None)
    promised: Fp8Modules = getattr(quantizer, "fp8", Fp8Modules({}, {}))
    own: Mapping[str, str] = getattr(quantizer, "names", {})
    installed = {n.replace(".base_layer", ""): m for n, m in model.named_modules() if isinstance(m, Fp8Weight)}
    expected = {own[n]: how.mode for n, how in promised.modules.items()} if own else {}
    wrong = [n for n, mode in expected.items() if n not in installed or installed[n].mode != mode]
    tensors = [*model.parameters(), *model.buffers()]
    at_rest = sum(shape_here(t).numel() * t.element_size() for t in tensors)
    scales = sum(b.numel() * b.element_size() for m in installed.values() for b in m._buffers.values() if b is not None)
    codes = sum(shape_here(m._parameters["weight"]).numel() for m in installed.values())
    products: Counter[str] = Counter()
    for module in installed.values():
        if isinstance(module, W8A8LinearMixin):
            chosen = module.product_on(_running_device(model, module))
            products[f"{chosen.product}: {chosen.reason}"] += 1
    first = next(iter(tensors), torch.empty(0))
    return ComponentReport(
        name,
        type(model).__name__,
        str(getattr(model, "device", first.device)),
        str(getattr(model, "dtype", first.dtype)),
        Counter(expected.values()),
        Counter(m.mode for m in installed.values()),
        tuple(wrong),
        tuple(n for n in installed if n not in expected),
        at_rest,
        at_rest - scales + codes,
        products,
        (
            *_steps(policy, products),
            *_few_tokens(model, installed),
            *_sharing(model),
            *_graphs(model),
            *_ranks(model),
            *_notes(model),
        ),
    )


def _steps(policy: HighPrecisionSteps | None, products: Counter[str]) -> Iterator[str]:
    """How many of a component's linears change their product from step to step."""
    if policy is None or not products:
        return
    switched = sum(count for product, count in products.items() if not product.startswith("dequantize: "))
    yield f"{switched or 'no'} linears {policy}{'' if switched else ': all of them always do'}"


def _few_tokens(model: nn.Module, installed: Mapping[str, Fp8Weight]) -> Iterator[str]:
    """Up to how many tokens which linears multiply their codes with activations that are not quantised."""
    for mode, cls, most in (("w8a8", W8A8LinearMixin, W8A8_TOKENS), ("storage", StorageLinearMixin, STORAGE_TOKENS)):
        count = 0
        for module in installed.values():
            if isinstance(module, cls) and getattr(module, "backend", "auto") == "auto":
                device = _running_device(model, module)
                count += can_multiply(device.type, device.index, module.compute_dtype, module.block)
        if count:
            yield f"{count} {mode} linears multiply up to {most} tokens with their codes, without quantising them"


def _sharing(model: nn.Module) -> Iterator[str]:
    """How many linears quantise their activations together."""
    groups = [
        group
        for group in groups_of(model)
        if not group.apart
        and group.members[0].product_on(_running_device(model, group.members[0])).product != "dequantize"
    ]
    if groups:
        count = sum(len(group.members) for group in groups)
        yield f"{count} linears share their quantised input with those beside them, in {len(groups)} groups"


def _graphs(model: nn.Module) -> Iterator[str]:
    """How many blocks are replayed, where that was asked for."""
    allowed, recorded, refused = recorded_blocks(model)
    if allowed or refused:
        yield (
            f"{recorded} of {allowed + refused} blocks are recorded as CUDA graphs"
            + (f", and {refused} cannot be" if refused else "")
        )


def _ranks(model: Any) -> Iterator[str]:
    """How the model lies on several ranks."""
    config = getattr(model, "_parallel_config", None)
    if config is not None and (context := config.context_parallel_config) is not None:
        degrees = [f"{name}={n}" for name in ("ulysses_degree", "ring_degree") if (n := getattr(context, name)) > 1]
        yield f"tokens are divided among ranks ({', '.join(degrees)})"
    if config is not None and (tensor := config.tensor_parallel_config) is not None:
        yield f"linears are cut among {tensor._tp_degree} ranks, and this is what one of them holds"
    spread = next((p for p in model.parameters() if hasattr(p, "device_mesh")), None)
    if spread is not None:
        yield f"parameters are spread over {spread.device_mesh.size()} ranks, and this is what one of them holds"


def _notes(model: nn.Module) -> tuple[str, ...]:
    """Whether transformers widened FP8 weights while it loaded them: of that the model keeps its converter alone."""
    converters = getattr(model, "_weight_conversions", None) or ()
    operations = {
        type(operation).__name__ for one in converters for operation in getattr(one, "operations", None) or ()
    }
    if "Fp8Dequantize" not in operations:
        return ()
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    return (f"transformers dequantised its FP8 weights to {dtype} while loading; load_pipeline keeps them FP8",)


def _running_device(model: nn.Module, module: Fp8Weight) -> torch.device:
    """Where the module computes: under offload that is not where its weight waits."""
    hook = getattr(module, "_hf_hook", None) or getattr(model, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    if execution is None:
        return cast(torch.Tensor, module._parameters["weight"]).device
    device = torch.device("cuda", execution) if isinstance(execution, int) else torch.device(execution)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device
