"""Patterns over module names, as manifests and `--ignored-layers` write them.

Without a wildcard a pattern matches a run of whole dotted segments (`img_mlp` matches
`transformer_blocks.3.img_mlp.net.2`, never `my_img_mlp2`); with `*`, `?` or `[` it matches the whole name as
fnmatch does; `re:` starts a regular expression that must match the whole name.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from ..telling.errors import ConvertError


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError) as error:
            raise ConvertError(
                f"The pattern {pattern!r} is not a valid regular expression ({error}); correct it."
            ) from error
    if not pattern.strip("."):
        raise ConvertError("An empty pattern matches nothing; remove it or name a layer.")
    if any(wildcard in pattern for wildcard in "*?["):
        return re.compile(fnmatch.translate(pattern))
    return re.compile(rf"(?:.*\.)?{re.escape(pattern)}(?:\..*)?")


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the dotted module name `name`."""
    return _compiled(pattern).fullmatch(name) is not None


def closest(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names, or parts of names, that `pattern` most resembles: what a user may have meant.

    A word of the pattern that is in no name is the likeliest typo: then only what resembles that word.
    """
    segments: set[str] = set()
    pairs: set[str] = set()
    for name in names:
        parts = [s for s in name.split(".") if not s.isdigit()]
        segments.update(parts)
        pairs.update(".".join(pair) for pair in pairwise(parts))
    bare = pattern.removeprefix("re:").strip("*.")
    for word in _words(pattern):
        if any(word in segment for segment in segments):
            continue
        if near := difflib.get_close_matches(word, sorted(segments), n=count, cutoff=0.6):
            return near
    return difflib.get_close_matches(bare, sorted(segments | pairs), n=count, cutoff=0.3)


def _words(pattern: str) -> list[str]:
    """The literal words of a pattern with wildcards: no regular expression's escapes and character classes."""
    if pattern.startswith("re:") or any(wildcard in pattern for wildcard in "*?["):
        return re.findall(r"[A-Za-z_]\w{2,}", re.sub(r"\\.|\[[^\]]*\]", " ", pattern.removeprefix("re:")))
    return []
