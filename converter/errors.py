"""The exceptions this package raises for bad input; a message is a full sentence for the user."""


class ConvertError(Exception):
    """Bad input or an environment that cannot do the work.

    The message names the file or tensor and the next step; the command line prints it and exits with 1.
    """


class ResumableError(ConvertError):
    """A conversion that stopped midway for a cause outside it (a full disk, a read error).

    What was finished is kept, and the same command resumes.
    """
