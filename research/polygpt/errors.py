"""Errors with a message for the user, and the format of such messages."""


class UserError(Exception):
    """The input is invalid. The command line prints the message on one line and exits with 2.

    A message names the thing, the place and the remedy, without a newline.
    """


class SpecError(UserError, ValueError):
    """A specification has an invalid value, or names something that does not exist."""


class OtherTokenizer(UserError):
    """Parameters with a row per token id come from a run with other token ids; `other` says which."""

    def __init__(self, other: str, message: str):
        super().__init__(message)
        self.other = other


class Diverged(UserError):
    """Training diverged: too many consecutive non-finite steps, or too many loss spikes."""


class Unreadable(UserError):
    """A run has complete checkpoints, but none can be read."""


class BadRecord(UserError, ValueError):
    """A record of a data source is unusable.

    Attributes:
        reason: short name of the kind of fault ("corrupt image", "empty text"), for counting skipped records.
        place: file and record.
    """

    def __init__(self, reason: str, place: str, detail: str = ""):
        self.reason, self.place, self.detail = reason, place, detail
        super().__init__(f"{place}: {reason}" + (f": {detail}" if detail else ""))

    def __reduce__(self):
        return BadRecord, (self.reason, self.place, self.detail)


def one_line(message: str) -> str:
    """The common format of warnings and errors on stderr."""
    return f"polygpt: {' '.join(message.split())}"
