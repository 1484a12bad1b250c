"""What every command shares: flags, help, and errors as one line."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from experiments.checkpoints import CheckpointError
from experiments.configuration import ConfigError
from experiments.data.errors import DataError
from experiments.parallel import DeviceError
from experiments.workdir import WorkdirError

# Mistakes of the user or faults of the machine: no traceback helps with them.
EXPECTED_ERRORS = (CheckpointError, ConfigError, DataError, DeviceError, WorkdirError)
INTERRUPTED = 130  # the exit code that shells give to a process that SIGINT ended


def launch(
    main: Callable[[], None], keys: Mapping[str, tuple[Any, str]], documentation: str
) -> None:
    """Parses the command line and runs a command.

    Exits with 0 on success, 1 on an error that the message explains, and 130 when
    interrupted from the keyboard.

    Args:
      main: the command, called when flags are parsed.
      keys: each configuration key's default and meaning, for --help and for the error
        that follows an unknown key.
      documentation: what --help says first.
    """
    # absl prints the docstring of __main__ above the flags.
    sys.modules["__main__"].__doc__ = documentation + _describe(keys)

    def parse(arguments: Sequence[str]) -> Sequence[str]:
        try:
            return app.parse_flags_with_usage(list(arguments))
        except AttributeError as error:
            # ml_collections' way to say that --config.KEY is unknown.
            hint = " ".join(str(error.args[0]).replace("\\'", "'").split())
            _fail(f"unknown configuration key: {hint.strip(chr(34))} ({_names(keys)})")

    def run(arguments: Sequence[str]) -> None:
        if flags.FLAGS["verbosity"].using_default_value:
            # Orbax tells every file it touches.
            logging.set_verbosity(logging.WARNING)
        if len(arguments) > 1:
            _fail(f"unexpected argument {arguments[1]!r}; see --help.")
        try:
            main()
        except EXPECTED_ERRORS as error:
            _fail(str(error))
        except OSError as error:
            _fail(
                f"{error}; the run goes on from its last checkpoint if started again."
            )
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on from the last checkpoint.")
            sys.exit(INTERRUPTED)

    app.run(run, flags_parser=parse)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


def _names(keys: Iterable[str]) -> str:
    return f"the keys are: {', '.join(sorted(keys))}"


def _describe(keys: Mapping[str, tuple[Any, str]]) -> str:
    lines = [
        f"  --config.{key}={default}\n      {meaning}"
        for key, (default, meaning) in keys.items()
    ]
    return "\nConfiguration keys and their defaults:\n" + "\n".join(lines)
