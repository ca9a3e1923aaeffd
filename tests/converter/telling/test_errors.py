"""An error's message is one printable line, whatever it repeats."""

from __future__ import annotations

import pickle

import pytest

from fp8_convert.converter.telling.errors import ConvertError, Fp8Error, LoadError, ResumableError, SettingsError


@pytest.mark.parametrize("kind", [Fp8Error, ConvertError, SettingsError, ResumableError, LoadError])
def test_what_names_hold_stays_out_of_the_message(kind: type[Fp8Error]) -> None:
    error = kind("a\x1b[2Jb\nc\ud800\u202e, näme; do this.")
    assert str(error) == "a [2Jb c  , näme; do this."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
