"""How a source is reached: what huggingface_hub is told, and which variant of the weights is taken."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..format.untrusted import check_text
from ..telling.errors import ConvertError


@dataclass(frozen=True)
class HubAccess:
    """How to reach a source on the Hub, as in huggingface_hub. Raises ConvertError for text that could not be sent.

    variant: takes `*.VARIANT.safetensors` where a component has them, of a folder too. quiet: shows no progress bars;
    without it they are shown where stderr is a terminal.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    variant: str | None = None
    quiet: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for value, what in ((self.revision, "revision"), (self.cache_dir, "cache folder"), (self.variant, "variant")):
            if value is not None:
                check_text(value, f"The {what}")
        if isinstance(self.token, str):
            object.__setattr__(self, "token", clean_token(self.token, "The Hub token"))


def clean_token(token: str, what: str) -> str:
    """The token without the white space and line ends of the file it was read from.

    Raises ConvertError, which never holds the token, for one that no header could carry.
    """
    token = token.strip()
    if not token:
        raise ConvertError(f"{what} is empty; pass one, or none at all.")
    if not re.fullmatch(r"[!-~]+", token):
        raise ConvertError(
            f"{what} contains a character that is not an ASCII letter, digit or sign; copy it again from the Hub's "
            "settings."
        )
    return token
