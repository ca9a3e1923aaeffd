"""The model card of a snapshot that is pushed to the Hub: `README.md`, made from the record and the source's own card.

It says what the snapshot was made from, what became FP8 and why, and who can read it; it claims no quality, since none
was measured. Names and reasons come from files that anybody may have made, so no markup of theirs gets through. The
card ends with a digest of itself, by which a later push knows a card that somebody has edited, and leaves it alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from ..format import layout
from ..format.reader import as_json
from ..format.record import Record, RecordedComponent, RecordedDecision
from ..telling.printable import printable
from ..telling.quantities import byte_count, change, parameter_count, plural

MAX_CARD_BYTES = 4 * 1024 * 1024
_HUB = "https://huggingface.co"
_SEAL = "<!-- fp8-convert card sha256:{} -->\n"
_SEALED = re.compile(r"<!-- fp8-convert card sha256:([0-9a-f]{64}) -->\n")
_FRONT_MATTER = re.compile(r"^\s*---\r?\n.*?\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
_LICENCE_FILE = re.compile(r"(?i)(licen[cs]e|notice|copying)[^/]*")
# What holds for the converted weights as for the source's; its `base_model` is its own, its tags may be anything.
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_SERVERS = {
    "vllm-omni": ("vLLM-Omni", "vllm serve {repo} --omni"),
    "sglang": ("SGLang", "sglang serve --model-path {repo}"),
}
_NATIVE = "native"
_PLAIN = (
    "After `import fp8_convert.loader`, plain `DiffusionPipeline.from_pretrained` loads it too; without that import "
    "diffusers refuses the format by name."
)
_QUALITY = """## Quality

Nothing was measured on this snapshot: neither how far its pictures are from the source's nor how fast it runs. Compare
it with the source on your own prompts before you rely on it."""


def model_card(record: Record, source_data: Mapping[str, Any], repo: str) -> bytes:
    """The card of the snapshot with this `record` in the Hub repository `repo`.

    source_data: the YAML at the head of the source's card, empty where there is none.
    """
    data = _metadata(record, source_data)
    parts = [
        f"# {_text(_name(record))} in FP8",
        _origin(record, data),
        _sizes(record),
        _readers(record, repo),
        _QUALITY,
        *_decisions(record),
        _recipe(record),
    ]
    text = f"---\n{_yaml(data)}---\n\n" + "\n\n".join(parts) + "\n\n"
    return (text + _SEAL.format(_digest(text))).encode()


def may_replace(card: str) -> bool:
    """Whether a repository's card is one that `model_card` wrote and nobody has edited, or has no text."""
    head, marker, rest = card.rpartition("<!-- fp8-convert card")
    if (sealed := _SEALED.fullmatch(marker + rest)) is not None:
        return sealed[1] == _digest(head)
    return not _FRONT_MATTER.sub("", card.removeprefix("\ufeff"), count=1).strip()


def front_matter(card: str) -> dict[str, Any]:
    """The YAML at a card's head; empty where there is none. Raises ValueError for what is no YAML, or no map."""
    head = _FRONT_MATTER.match(card.removeprefix("\ufeff"))
    if head is None:
        return {}
    import yaml  # type: ignore[import-untyped]  # late: comes with the Hub's client

    try:
        data = yaml.safe_load(head[0].strip().strip("-"))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(data, dict | None):
        raise ValueError("it is no map")
    return {str(key): value for key, value in (data or {}).items()}


def carried(source_data: Mapping[str, Any]) -> dict[str, Any]:
    """What is taken from the YAML of the source's card: texts and lists of texts, and nothing else."""
    return {key: source_data[key] for key in _CARRIED if _is_plain(source_data.get(key))}


def licence_files(record: Record) -> list[str]:
    """The licences and notices beside `model_index.json`."""
    return [path for path in record.files if _LICENCE_FILE.fullmatch(path)]


def _metadata(record: Record, source_data: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML at the card's head."""
    source, target = record.source, _target(record)
    data = carried(source_data)
    if (link := data.get("license_link")) and source.repo and _is_relative(link) and link not in record.files:
        data["license_link"] = f"{_HUB}/{source.repo}/blob/{source.commit or 'main'}/{link}"
    if source.repo is not None:
        data |= {"base_model": source.repo, "base_model_relation": "quantized"}
    if target != "comfyui":
        data["library_name"] = _library(record)
    data["tags"] = ["fp8", "fp8-convert", *([] if target == _NATIVE else [target])]
    return data


def _origin(record: Record, data: Mapping[str, Any]) -> str:
    imported = _imported(record)
    lines = [_how_imported(record, imported) if imported else _how_converted(record)]
    if loras := as_json(record.recipe).get("merged_loras"):
        lines.append(f"Before, {plural(len(loras), 'LoRA')} went into them, which the recipe below names by digest.")
    if layout.CARD in record.files:
        whose = "the card that came with its configs" if imported else "the source's card"
        lines.append(f"What the model is and who made it: [{whose}]({layout.SOURCE_CARD}).")
    lines.append(_licence(record, data))
    return "\n".join(lines)


def _how_converted(record: Record) -> str:
    source = record.source
    made_from = f"a folder with {_text(_name(record))}" if source.repo is None else _link(source.repo, source.commit)
    before, after = _totals(record)
    calibrated = record.recipe.input_scales_sha256 is not None
    scales = "with calibrated activation scales" if calibrated else "without training or calibration"
    return (
        f"Weights of {made_from}, as `float8_e4m3fn` where the manifest `{_code(record.recipe.manifest)}` says so: "
        f"{change(before, after)}. Converted by fp8-convert {_text(record.tool_version)}, {scales}."
    )


def _how_imported(record: Record, imported: Mapping[str, str]) -> str:
    """Of codes that were there before: how they were made, and with what care, nobody but their maker knows."""
    parts = [
        f"`{_code(_label(name, record.components[name]))}` from the layout {_text(found)}"
        for name, found in imported.items()
    ]
    lines = [
        f"FP8 weights that were quantised before: {', '.join(parts)}. Imported by fp8-convert "
        f"{_text(record.tool_version)}, codes and scales as they were; how they were made the record does not tell.",
        f"The manifest `{_code(record.recipe.manifest)}` says which of them run in FP8.",
    ]
    if record.recipe.activation_scheme == "static":
        lines.append("Activation scales are static, and came with the weights.")
    if (base := record.source.base_repo) is not None:
        lines.append(f"Configs and all other components are those of {_link(base, record.source.base_commit)}.")
    return "\n".join(lines)


def _imported(record: Record) -> dict[str, str]:
    """The layouts of components that were imported; of a snapshot that was imported, all that have FP8 weights."""
    return {name: component.imported for name, component in record.components.items() if component.imported}


def _link(repo: str, commit: str | None) -> str:
    link = f"[{_text(repo)}]({_HUB}/{repo})"
    return link if commit is None else f"{link} at commit [`{_code(commit[:12])}`]({_HUB}/{repo}/tree/{commit})"


def _licence(record: Record, data: Mapping[str, Any]) -> str:
    files = ", ".join(f"[{_text(path)}]({quote(path)})" for path in licence_files(record))
    name = data.get("license_name") or data.get("license")
    if name is None and not files:
        return "No licence is known here; ask those who made the source before you use this."
    stated = files if name is None else f"`{_code(str(name))}`{f' ({files})' if files else ''}"
    if _imported(record):
        return f"The licence that came with its configs: {stated}. The FP8 weights may have one of their own."
    return f"The licence is the source's: {stated}."


def _sizes(record: Record) -> str:
    table = [["component", "class", "before", "after", "FP8 layers"]]
    for name, component in record.components.items():
        counts = [f"{count} {mode}" for mode, count in component.fp8_modules.items() if count]
        sizes = [byte_count(component.bytes_before), byte_count(component.bytes_after)]
        table.append(
            [_text(_label(name, component)), _text(component.class_ or ""), *sizes, ", ".join(counts) or "none"]
        )
    return f"## Sizes\n\n{_table(table)}\n\n`w8a8`: activations are FP8 too. `storage`: FP8 at rest, computed in BF16."


def _readers(record: Record, repo: str) -> str:
    """How to load it, in those readers alone that it was made for."""
    target = _target(record)
    parts = ["## How to load"]
    if target == "comfyui":
        parts.append(f"Put each file into the folder of the same name below ComfyUI's `models/`:\n\n{_files(record)}")
        return "\n\n".join(parts)
    if target in _SERVERS:
        server, command = _SERVERS[target]
        parts.append(f"It was made for {server}:\n\n```\n{command.format(repo=repo)}\n```")
    elif target != _NATIVE:
        parts.append(f"It was made for {_text(target)}.")
    parts.append(f"In Python, with fp8-convert installed:\n\n```python\n{_snippet(record, repo)}```")
    if target == _NATIVE:
        if record.source.pipeline is not None:
            parts.append(_PLAIN)
        if encoders := [name for name, component in record.components.items() if _transformers_reads(name, component)]:
            folders = ", ".join(f"`{_code(name)}`" for name in encoders)
            parts.append(f"Stock transformers reads {folders} (`subfolder=`) by itself; on a CPU it becomes BF16.")
        again = "UNQUANTISED" if _imported(record) else record.source.repo or "SOURCE"
        weights = ", from the model's own weights or from what `fp8-convert dequantize` gives" * bool(_imported(record))
        parts.append(
            "Not for vLLM-Omni, SGLang or ComfyUI: each of them needs a snapshot of its own, which "
            f"`fp8-convert {again} --target NAME -o OUT` makes{weights}."
        )
    return "\n\n".join(parts)


def _snippet(record: Record, repo: str) -> str:
    load, name = ("load_pipeline", "pipe") if record.source.pipeline is not None else ("load_component", "model")
    return f'from fp8_convert.loader import {load}\n\n{name} = {load}("{repo}")\n'


def _files(record: Record) -> str:
    return "\n".join(f"- `{_code(path)}`" for path in record.shards)


def _decisions(record: Record) -> Iterator[str]:
    but = ", but for what was FP8 and became BF16" if _imported(record) else ""
    yield f"## What is FP8, and why\n\nWhat was kept has the source's dtype{but}."
    for name, component in record.components.items():
        table = [["", "kind", "tensors", "parameters", "bytes", "rule", "why"]]
        table += [_row(decision) for decision in component.decisions]
        yield f"### {_text(_label(name, component))}\n\n{_table(table)}"


def _row(decision: RecordedDecision) -> list[str]:
    what = f"FP8 {decision.mode} {decision.scheme}" if decision.mode else "kept"
    sizes = byte_count(decision.bytes_before)
    if decision.bytes_after != decision.bytes_before:
        sizes += f" -> {byte_count(decision.bytes_after)}"
    numbers = [str(decision.tensors), parameter_count(decision.params), sizes]
    return [_text(what), _text(decision.kind or ""), *numbers, f"`{_code(decision.rule)}`", _text(decision.why)]


def _recipe(record: Record) -> str:
    table = [["setting", "value"]]
    table += [[f"`{key}`", f"`{_code(_value(value))}`"] for key, value in as_json(record.recipe).items()]
    source = (
        "there is no comparison of an import with its source"
        if _imported(record)
        else "`--source` compares every code and scale with the source"
    )
    return (
        f"## How it was made\n\n{_table(table)}\n\n"
        f"`{layout.RECORD_FILE}` has the digest of every file of the source and of this snapshot; `fp8-convert verify` "
        f"checks a download against it, and {source}. The record's own digest is `{record.record_sha256}`."
    )


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return "none" if value is None else str(value)


def _transformers_reads(name: str, component: RecordedComponent) -> bool:
    """Whether a component is a text encoder whose config is written for transformers' own reader of block scales."""
    formats = {(d.mode, d.scheme, d.kind) for d in component.decisions if d.mode is not None}
    mode, scheme, kind = next(iter(formats)) if len(formats) == 1 else (None, None, None)
    return name.startswith("text_encoder") and mode == layout.STORAGE and kind == "Linear" and scheme == "block128x128"


def _target(record: Record) -> str:
    """The reader that the snapshot was made for; records before targets were native."""
    return str(as_json(record.recipe).get("target") or _NATIVE)


def _name(record: Record) -> str:
    """What the model is called: its repository, else its class."""
    if record.source.repo is not None:
        return PurePosixPath(record.source.repo).name
    return record.source.pipeline or next((c.class_ for c in record.components.values() if c.class_), "snapshot")


def _library(record: Record) -> str:
    """Whose classes load it: of a component on its own the name of its files tells."""
    files = [PurePosixPath(path).name for path in record.shards]
    alone = record.source.pipeline is None
    return "transformers" if alone and all(name.startswith("model") for name in files) else "diffusers"


def _label(name: str, component: RecordedComponent) -> str:
    return name or component.class_ or "component"


def _totals(record: Record) -> tuple[int, int]:
    components = record.components.values()
    return sum(c.bytes_before for c in components), sum(c.bytes_after for c in components)


def _yaml(data: Mapping[str, Any]) -> str:
    from huggingface_hub.utils import yaml_dump  # late: nothing else here needs the Hub's client

    return str(yaml_dump(dict(data)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_plain(value: Any) -> bool:
    """Whether a value of the source's front matter is a short text, or a list of such."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and len(texts) < 100 and all(isinstance(text, str) and 0 < len(text) < 500 for text in texts)


def _is_relative(link: Any) -> bool:
    return isinstance(link, str) and "://" not in link


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _text(text: str) -> str:
    """Text that has no meaning in Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>|~&])", r"\\\1", printable(text))


def _code(text: str) -> str:
    """Text between backticks in a table's cell."""
    return printable(text).replace("`", "'").replace("|", "\\|")
