"""The exceptions this package raises for bad input; a message is a full sentence for the user."""

from .printable import printable


class Fp8Error(Exception):
    """What every error of fp8-convert is, while converting and while loading.

    Its message is one printable line, whatever the names of files and tensors hold that it repeats.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class ConvertError(Fp8Error):
    """Bad input or an environment that cannot do the work.

    The message names the file or tensor and the next step; the command line prints it and exits with 1.
    """


class SettingsError(ConvertError, ValueError):
    """A setting that means nothing, or that contradicts another one or the snapshot it is for."""


class ResumableError(ConvertError):
    """A conversion that stopped midway for a cause outside it (a full disk, a read error).

    What was finished is kept, and the same command resumes.
    """


class LoadError(Fp8Error, RuntimeError):
    """A snapshot that cannot be loaded as it claims; one sentence: what, where, what to do."""


def one_clause(error: BaseException) -> str:
    """What a library said, short enough to stand inside one sentence."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
