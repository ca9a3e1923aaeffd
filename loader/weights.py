"""A module whose `weight` is FP8 at rest.

`install` turns a plain module into a dynamic subclass of its own class, so that `isinstance` and the rest of
the original's behaviour hold. The E4M3 codes are held as an int8 Parameter called `weight` (the same bytes:
`codes` views them as float8_e4m3fn), the scale as a float32 buffer under its name on disk. int8 because
libraries know what to do with an int8 weight: `.to(dtype)` passes it by, `model.dtype` looks further, PEFT
and timestep embedders ask `compute_dtype`.

The one surprise: `state_dict()` holds the int8 view too, because accelerate copies from it into the
parameters; `save_pretrained` writes float8_e4m3fn. Loading takes either and refuses anything else.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..converter.format import layout
from . import kernels
from .checkpoint import check_scale

if TYPE_CHECKING:
    from .shared_input import SharedInput

Mode = Literal["w8a8", "storage"]
WEIGHT_SCALE, WEIGHT_SCALE_INV, INPUT_SCALE = (
    suffix.removeprefix(".") for suffix in (layout.WEIGHT_SCALE, layout.WEIGHT_SCALE_INV, layout.INPUT_SCALE)
)
SCALES = (WEIGHT_SCALE, WEIGHT_SCALE_INV, INPUT_SCALE)
_HELD = ("weight", *SCALES)


class Fp8Weight(nn.Module):
    """Mixin over an `nn.Linear` or convolution. Not to be constructed: see `install`."""

    mode: ClassVar[Mode]
    plain_class: ClassVar[type[nn.Module]]
    mixin: ClassVar[type["Fp8Weight"]]

    format: layout.WeightFormat
    compute_dtype: torch.dtype
    shared: "SharedInput | None" = None  # linears that are given the same activations

    @property
    def codes(self) -> Tensor:
        """The E4M3 codes, float8_e4m3fn, the plain weight's shape; the parameter's own bytes."""
        return cast(Tensor, self._parameters["weight"]).view(kernels.E4M3)

    @property
    def scale(self) -> Tensor:
        """The weight scale, float32: () per tensor, [N, 1] per row, [ceil(N / bn), ceil(K / bk)] for blocks."""
        return cast(Tensor, self._buffers[WEIGHT_SCALE_INV if self.block else WEIGHT_SCALE])

    @property
    def static_scale(self) -> Tensor | None:
        """The activations' one scale, float32 (); None where they are scaled as they come."""
        return self._buffers.get(INPUT_SCALE)

    @property
    def block(self) -> layout.Block | None:
        """Rows and columns of a scale's block, None where scales are not of blocks."""
        return self.format.block

    @property
    def scheme(self) -> str:
        """ "tensor", "channel" or "block{bn}x{bk}", as the shards' metadata spells it."""
        return self.format.scheme

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, a new tensor: float32(codes) * scale, rounded once."""
        return kernels.dequantize(self.codes, self.scale, dtype, self.block)

    def dtype_for(self, x: Tensor) -> torch.dtype:
        """The dtype to compute in: autocast's, else the input's, else (an integer input) the module's own."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype if x.is_floating_point() else self.compute_dtype

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias in `dtype`, itself where it is of it; None where there is none."""
        bias = self._parameters["bias"]
        return bias if bias is None or bias.dtype == dtype else bias.to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}, scheme={self.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move codes and scales between devices and never change their dtype; `compute_dtype` follows casts."""
        held = {id(t) for name in _HELD if (t := self._parameters.get(name, self._buffers.get(name))) is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in held and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        applied = super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.codes.device))
        if probe.is_floating_point():
            self.compute_dtype = probe.dtype
        if self.shared is not None:
            self.shared.settle()
        return cast(nn.Module, applied)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype == kernels.E4M3:
            state_dict[prefix + "weight"] = weight.view(torch.int8)
        elif weight is not None and weight.dtype != torch.int8:
            error_msgs.append(f"{prefix}weight is {weight.dtype}, but this layer holds FP8 codes: load FP8 codes")
            return
        for name in SCALES:
            scale = state_dict.get(prefix + name)
            if scale is not None and scale.dtype != torch.float32:
                error_msgs.append(f"{prefix}{name} is {scale.dtype}, but scales are float32")
                return
            if scale is not None and not scale.is_meta:
                check_scale(prefix + name, scale, type(self).__name__)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in no module under its name, so pickle is told how to make it again.
        return _rebuild, (self.mixin, self.plain_class), self.__dict__.copy()


_CLASSES: dict[tuple[type[Fp8Weight], type[nn.Module]], type[Fp8Weight]] = {}


def fp8_class(mixin: type[Fp8Weight], plain: type[nn.Module]) -> type[Fp8Weight]:
    """The subclass of `plain` that `mixin` turns it into; always the same one for the same pair."""
    made = _CLASSES.get((mixin, plain))
    if made is None:
        name = ("W8A8" if mixin.mode == "w8a8" else "Storage") + plain.__name__
        fields = {"plain_class": plain, "mixin": mixin, "__module__": mixin.__module__, "__qualname__": name}
        made = _CLASSES[mixin, plain] = cast(type[Fp8Weight], type(name, (mixin, plain), fields))
    return made


def _rebuild(mixin: type[Fp8Weight], plain: type[nn.Module]) -> Fp8Weight:
    made = fp8_class(mixin, plain)
    return made.__new__(made)


def become_fp8(
    module: nn.Module,
    mixin: type[Fp8Weight],
    how: layout.WeightFormat,
    dtype: torch.dtype,
    device: torch.device | str,
    static: bool = False,
) -> Fp8Weight:
    """Change `module` in place into its FP8 subclass, with uninitialised codes and scales on `device`.

    The plain weight is dropped; bias and everything else stay as they are. `dtype` becomes `compute_dtype`.
    """
    plain = cast(Tensor, module.weight)
    shape = plain.shape
    if not how.per_tensor and len(shape) != 2:
        raise ValueError(f"{how.scheme} scales are for linear weights, not for shape {tuple(shape)}")
    module.__class__ = fp8_class(mixin, type(module))
    made = cast(Fp8Weight, module)
    codes = torch.empty(shape, dtype=torch.int8, device=device)
    made._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
    made.register_buffer(
        how.scale_key("").removeprefix("."), torch.empty(how.scale_shape(shape), dtype=torch.float32, device=device)
    )
    if static:
        made.register_buffer(INPUT_SCALE, torch.empty((), dtype=torch.float32, device=device))
    if isinstance(made.bias, nn.Parameter):
        made.bias.requires_grad_(False)  # the layer is frozen as a whole
    made.format = how
    made.compute_dtype = dtype
    return made
