"""The error that every reader of data raises."""

_MAX_SHOWN = 2000  # letters of a message, whatever it quotes


class DataError(ValueError):
    """Data that cannot be used as asked.

    The message is one complete line: what is wrong, what was expected, what to do.
    """

    def __init__(self, message: str) -> None:
        """Takes the message, which may quote what foreign files say."""
        super().__init__(printable(message))


def first_line(error: Exception) -> str:
    """What another library's exception says, as part of such a line."""
    return str(error).partition("\n")[0] or type(error).__name__


def printable(text: str) -> str:
    """Text that takes one line and that no terminal obeys."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]} ..."
