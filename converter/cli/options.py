"""What several commands take: what a conversion is to be, and how to reach the Hub by the Hugging Face CLI's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Names(click.ParamType):  # type: ignore[type-arg]
    """Names separated by commas."""

    name = "a,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        names = [name.strip() for name in value.split(",") if name.strip()]
        if not names:
            self.fail(f"{value!r} names nothing; drop the option or name a layer.", param, ctx)
        return names


def together(groups: Iterable[Iterable[str]]) -> list[str]:
    """The names of a repeatable option of `Names`."""
    return [name for names in groups for name in names]


manifest_option = click.option(
    "--manifest", metavar="NAME|PATH", help="Rules to use; by default chosen by repo id and class names."
)
ignored_layers_option = click.option(
    "--ignored-layers",
    type=Names(),
    multiple=True,
    help="DiT layers to keep, beside the manifest's. Repeatable.",
)
compact_option = click.option("--compact", is_flag=True, help="FP8 storage for the DiT layers that W8A8 must skip.")
weight_block_size_option = click.option(
    "--weight-block-size", type=int, nargs=2, metavar="N M", help="Block scales for the DiT, such as 128 128."
)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")(function)


def quiet_option(function: F) -> F:
    return click.option("-q", "--quiet", is_flag=True, help="Tell no progress and no notes; errors stay.")(function)


def hub_options(function: F) -> F:
    """The options of HubAccess."""
    for option in (
        click.option("--variant", help="Take *.VARIANT.safetensors where a component has them, such as fp16."),
        click.option("--local-files-only", is_flag=True, help="Use the Hub cache and make no connection."),
        click.option("--cache-dir", type=click.Path(path_type=Path), help="Hub cache to use."),
        click.option("--token", help="Hub token; by default the one you logged in with."),
        click.option("--revision", help="Branch, tag or commit of the Hub repository."),
    ):
        function = option(function)
    return function
