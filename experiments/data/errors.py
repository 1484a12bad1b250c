"""The error that every reader of data raises."""


class DataError(ValueError):
    """Data that cannot be used as asked.

    The message is one complete line: what is wrong, what was expected, what to do.
    """
