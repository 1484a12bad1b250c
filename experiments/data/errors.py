"""The error that every reader of data raises."""


class DataError(ValueError):
    """Data that cannot be used as asked.

    The message is one complete line: what is wrong, what was expected, what to do.
    """


def first_line(error: Exception) -> str:
    """What another library's exception says, as part of such a line."""
    return str(error).partition("\n")[0] or type(error).__name__
