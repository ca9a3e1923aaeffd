"""What a user asks of a conversion, coerced and checked here and nowhere else, whatever door it came through.

`convert`, the command line, `load_pipeline`, `Fp8Config` and the record of a snapshot all say the same things; the same
mistake is the same SettingsError at each of them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..format.layout import Block
from ..format.untrusted import check_text
from ..snapshot.snapshot import Snapshot
from ..targets.choosing import TARGETS
from ..telling.errors import SettingsError
from .lora_request import LORA_USE, LoraRequest, read_requests
from .manifest import Manifest, choose_manifest, load_manifest
from .recipe import ACTIVATION_SCHEMES, Recipe, check_scales, parse_size
from .scales import read_input_scales

if TYPE_CHECKING:
    from .lora import Lora

_LARGEST_BLOCK = 2**31  # no dimension of a weight is larger
_MEANINGLESS = (ValueError, TypeError, OverflowError)  # what reading a value raises
_ALIASES = {"method": "quantization"}  # vLLM's name in a quantization_config


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One conversion's settings, by the names of `convert`'s arguments. Raises SettingsError where they contradict.

    input_scales: the file of the static scheme's activation scales. merge_lora: the LoRAs to merge, in order.
    given: the names of those that were stated rather than left to their default.
    """

    quantization: str = "fp8"
    manifest: str | None = None
    ignored_layers: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    compact: bool = False
    weight_block_size: Block | None = None
    activation_scheme: str = "dynamic"
    input_scales: Path | None = None
    max_shard_size: int | None = None
    target: str = "native"
    merge_lora: tuple[LoraRequest, ...] = ()
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        check_scales(self.activation_scheme, self.weight_block_size, self.input_scales is not None)
        problem = TARGETS[self.target].settings_problem(compact=self.compact, block=self.weight_block_size)
        if problem is not None:
            raise SettingsError(problem)

    @classmethod
    def read(cls, stated: Mapping[str, Any], known: Collection[str] | None = None) -> Settings:
        """The settings that a mapping states. known: the names that it may state, None for all.

        Raises SettingsError for an unknown name and for a value that means nothing.
        """
        names = tuple(known or (f.name for f in fields(cls) if f.name != "given"))
        values = {}
        for key, value in stated.items():
            if key not in names:
                raise SettingsError(unknown_setting(key, names))
            try:
                values[_ALIASES.get(key, key)] = _SETTINGS[key].read(value)
            except _MEANINGLESS:
                raise SettingsError(f"{_wrong(key, value)}.") from None
        return cls(**values, given=frozenset(values))

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Settings:
        """The settings among the arguments of a function that has one for each: what `locals()` gives at its start."""
        return cls.read({f.name: arguments[f.name] for f in fields(cls) if f.name in arguments})

    def own_manifest(self) -> Manifest | None:
        """The manifest that was asked for, None where the source chooses it."""
        return None if self.manifest is None else load_manifest(self.manifest)

    def resolve(self, snapshot: Snapshot, manifest: Manifest | None = None) -> Recipe:
        """All that the output depends on: with the manifest (read already, or found now) and the input scales."""
        rules = manifest or self.own_manifest()
        rules = rules or choose_manifest(snapshot.repo, snapshot.pipeline, snapshot.classes)
        return Recipe(
            manifest=rules,
            ignored_layers=self.ignored_layers,
            components=self.components,
            compact=self.compact,
            block=self.weight_block_size,
            activation_scheme=self.activation_scheme,
            input_scales=None if self.input_scales is None else read_input_scales(self.input_scales),
            max_shard_size=self.max_shard_size,
            target=self.target,
            loras=self._loras(snapshot),
        )

    def _loras(self, snapshot: Snapshot) -> tuple[Lora, ...]:
        if not self.merge_lora:
            return ()
        from .lora import read_loras  # imports PyTorch

        return read_loras(self.merge_lora, snapshot, self.components)


def setting_problem(key: str, value: Any) -> str | None:
    """Why a value means nothing for a setting, as a clause; None if it means something."""
    try:
        _SETTINGS[key].read(value)
    except _MEANINGLESS:
        return _wrong(key, value)
    return None


def _wrong(key: str, value: Any) -> str:
    return f"{key} is {value!r:.80}; {_SETTINGS[key].use}"


def unknown_setting(key: Any, known: Collection[str]) -> str:
    """The sentence that a name is not a setting, and what may have been meant."""
    near = difflib.get_close_matches(str(key), known, n=1)
    advice = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}."
    return f"{key!r:.80} is not a setting; {advice}"


class _Setting(NamedTuple):
    read: Callable[[Any], Any]  # raises one of _MEANINGLESS
    use: str


def _one_of(*values: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise ValueError
        return value

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _names(what: str) -> Callable[[Any], tuple[str, ...]]:
    def read(value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise ValueError
        for name in value:
            check_text(name, what)
        return tuple(value)

    return read


def _block(value: Any) -> Block | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(type(n) is int and 0 < n <= _LARGEST_BLOCK for n in value):
        raise ValueError
    rows, columns = value
    return rows, columns


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = os.fspath(value)
    if not isinstance(text, str) or not text:
        raise ValueError
    return text


def _path(value: Any) -> Path | None:
    text = _text(value)
    if text is None:
        return None
    check_text(text, "The path of the input scales")
    return Path(text)


_SETTINGS: Mapping[str, _Setting] = {
    "quantization": _Setting(_one_of("fp8"), "the only one is 'fp8'"),
    "method": _Setting(_one_of("fp8"), "the only one is 'fp8'"),
    "manifest": _Setting(_text, "use the name of a shipped manifest, or the path of a TOML file"),
    "ignored_layers": _Setting(_names("The ignored layer"), "use a list of names, such as ['img_mlp']"),
    "components": _Setting(_names("The component"), "use a list of names, such as ['transformer']"),
    "compact": _Setting(_flag, "use true or false"),
    "weight_block_size": _Setting(_block, "use two positive numbers, such as [128, 128], or none"),
    "activation_scheme": _Setting(_one_of(*ACTIVATION_SCHEMES), "use 'dynamic' or 'static'"),
    "input_scales": _Setting(_path, "use the path of a safetensors file"),
    "max_shard_size": _Setting(parse_size, "use a size such as 5GB or 500MB"),
    "target": _Setting(_one_of(*TARGETS), f"use one of {', '.join(TARGETS)}"),
    "merge_lora": _Setting(read_requests, LORA_USE),
}
