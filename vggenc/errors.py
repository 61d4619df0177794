"""What vggenc raises when something outside its own code is wrong."""

from collections.abc import Iterable


class VggencError(Exception):
    """Base of all errors of this package: the message names what was given and what is allowed."""


class UsageError(VggencError, ValueError):
    """An argument, or a combination of arguments, that can't be meant (the command line exits with 2)."""


class WeightsError(VggencError):
    """Weights that are missing, damaged or don't fit the encoder."""


class ImageError(VggencError):
    """A file that can't be turned into an image; in a folder run it becomes a row, not an exception."""


class StoreError(VggencError):
    """A features folder that is in use, incomplete or can't be written."""


class DataError(VggencError):
    """A data set whose files are damaged or contradict each other."""


class ExportError(VggencError):
    """A network file that can't be written, or whose values aren't the encoder's."""


def one_of(what: str, given: object, allowed: Iterable[str]) -> UsageError:
    """The error for a name that isn't in a list: it names both."""
    names = ", ".join(allowed)
    return UsageError(f"{what} must be one of {names}; got {given!r}")
