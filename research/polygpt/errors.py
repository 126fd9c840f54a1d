"""Errors whose message is meant for the person who typed the command, and how such a message is told."""


class UserError(Exception):
    """The input is at fault. The command line prints the message on one line and exits with 2.

    A message names the thing, the place and the remedy, and holds no newline.
    """


class SpecError(UserError, ValueError):
    """A specification holds a value that is not allowed, or names something that does not exist."""


class Diverged(UserError):
    """Training led nowhere: too many steps in a row were not finite, or the loss spiked too often."""


class BadRecord(UserError, ValueError):
    """One record of a data source cannot be used.

    Attributes:
        reason: a short name of the kind of fault ("corrupt image", "empty text"), by which skipped records are counted.
        place: the file and the record, as a person would look it up.
    """

    def __init__(self, reason: str, place: str, detail: str = ""):
        self.reason, self.place, self.detail = reason, place, detail
        super().__init__(f"{place}: {reason}" + (f": {detail}" if detail else ""))

    def __reduce__(self):
        return BadRecord, (self.reason, self.place, self.detail)


def one_line(message: str) -> str:
    """A warning or an error as a person reads it on stderr, whichever part of the program says it."""
    return f"polygpt: {' '.join(message.split())}"
