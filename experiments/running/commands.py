"""What every command shares: its configuration, help, and errors as one line."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.configuration.fields import ConfigError
from experiments.data.errors import DataError
from experiments.distributed import processes
from experiments.distributed.parallel import DeviceError
from experiments.distributed.preemption import PreemptedError, raise_on_sigterm
from experiments.distributed.processes import Address, ProcessesError
from experiments.running.compilation_cache import use_compilation_cache
from experiments.running.run_folder import LostProcessError
from experiments.running.workdir import WorkdirError

# Mistakes of the user or faults of the machine: no traceback helps with them.
EXPECTED_ERRORS = (
    *(ConfigError, DataError, DeviceError, WorkdirError),
    *(PreemptedError, ProcessesError),
)
# Exit codes, beside 0. A scheduler may start a command again that ended with the
# second, which is EX_TEMPFAIL of sysexits.h; the third is what shells give to a process
# that SIGINT ended.
FAILED, TRY_AGAIN, INTERRUPTED = 1, 75, 130


def launch(
    main: Callable[[dict[str, Any], Path, str | None], None],
    configuration: ModuleType,
    documentation: str | None,
    *,
    workdir: str,
) -> None:
    """Parses the command line and runs a command.

    Exits with 0 on success, 1 after an error that one line explains, 75 when the same
    command will go on, as after SIGTERM or when another process was lost, and 130 when
    interrupted from the keyboard.

    Args:
      main: the command, called with the configuration, the folder for the results and
        that of the data, or None, when flags are parsed.
      configuration: the module of the default configuration. It has `get_config` and
        `CONFIGURATION`.
      documentation: what --help says first.
      workdir: the default folder for the results, in which keys of the configuration
        may stand in braces.
    """
    shown = re.sub("{(.*?)}", lambda key: key[1].upper(), workdir)
    folder = flags.DEFINE_string(
        "workdir",
        None,
        f"Folder for the results; a stopped run goes on there. (default: {shown})",
    )
    data = flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of prepared tensorflow-datasets (default: the bundled images for "
        "mnist, else ~/tensorflow_datasets).",
    )
    flag = config_flags.DEFINE_config_file(
        "config",
        None,  # put in by `parse`: ml_collections looks at overrides of a default early
        "A variant's name; or a file with get_config(), after which a colon and a "
        "variant may follow.",
    )
    keys = configuration.CONFIGURATION.fields
    start_processes = _define_processes()

    def parse(arguments: Sequence[str]) -> list[str]:
        _answer_help(arguments, (documentation or "") + _describe(configuration))
        program, *given = arguments
        names = [argument.lstrip("-").split("=")[0] for argument in given]
        for name in names:
            key = name.removeprefix("config.")
            if key != name and key not in keys:
                _fail(
                    f"unknown configuration key {key}; the keys are "
                    f"{', '.join(sorted(keys))}."
                )
        if "config" not in names:
            given.insert(0, f"--config={configuration.__file__}")
        given = [
            _with_file(argument, str(configuration.__file__)) for argument in given
        ]
        try:
            remaining: list[str] = flags.FLAGS([program, *given])
            # A file that cannot be read shows only now.
            _ = flag.value.keys()
        except (flags.Error, OSError, TypeError, ValueError) as error:
            # A configuration file's own error comes with its traceback before it.
            *_, last = str(error).strip().splitlines()
            _fail(f"{last.removeprefix('ValueError: ')} (see --help)")
        # A configuration file may be broken in any way.
        except Exception as error:
            _fail(f"the configuration file does not work: {error!r} (see --help)")
        _quieten_libraries()
        return remaining

    def run(arguments: Sequence[str]) -> None:
        if len(arguments) > 1:
            _fail(f"unexpected argument {arguments[1]!r} (see --help)")
        raise_on_sigterm()
        use_compilation_cache()
        with _one_line_errors("; the same command goes on from the last checkpoint."):
            start_processes()
            config = flag.value.to_dict()
            main(config, Path(folder.value or workdir.format(**config)), data.value)

    app.run(run, flags_parser=parse)


def launch_with_arguments(
    main: Callable[[list[str]], None], documentation: str | None
) -> None:
    """Parses the command line and runs a command that takes no configuration.

    Exits as `launch` does.

    Args:
      main: the command, called with the positional arguments when flags are parsed.
      documentation: what --help says first.
    """

    def parse(arguments: Sequence[str]) -> list[str]:
        _answer_help(arguments, documentation or "")
        try:
            remaining: list[str] = flags.FLAGS(arguments)
        except flags.Error as error:
            _fail(f"{error} (see --help)")
        _quieten_libraries()
        return remaining

    def run(arguments: Sequence[str]) -> None:
        use_compilation_cache()
        with _one_line_errors("."):
            main(list(arguments[1:]))

    app.run(run, flags_parser=parse)


def _define_processes() -> Callable[[], None]:
    """Defines the flags of several processes; returns what connects them."""
    mode = flags.DEFINE_string(
        "distributed",
        "auto",
        "off: one process. on: several, by the three flags below, or as found on Cloud "
        "TPU slices, Slurm, Kubernetes and Open MPI. auto: on where there are any.",
    )
    coordinator = flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0."
    )
    count = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    number = flags.DEFINE_integer("process_id", None, "Number of this one, from 0.")
    start_seconds = flags.DEFINE_integer(
        "start_seconds",
        None,
        "How long to wait for all processes to come "
        "(default: {} on one machine, {} otherwise).".format(*processes.START_SECONDS),
        lower_bound=1,
    )
    silence_seconds = flags.DEFINE_integer(
        "silence_seconds",
        None,
        "After how long without a sign of life a process is lost "
        "(default: {} on one machine, {} otherwise).".format(
            *processes.SILENCE_SECONDS
        ),
        lower_bound=1,
    )
    return lambda: processes.start(
        mode.value,
        Address(coordinator.value, count.value, number.value),
        start_seconds.value,
        silence_seconds.value,
    )


def _answer_help(arguments: Sequence[str], documentation: str) -> None:
    if {"--help", "-help", "-h", "--helpshort"} & set(arguments):
        # absl prints the docstring of __main__ and the flags of its module, and would
        # exit with 1.
        sys.modules["__main__"].__doc__ = documentation
        for flag in flags.FLAGS.get_flags_for_module(__name__):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)


def _quieten_libraries() -> None:
    if flags.FLAGS["verbosity"].using_default_value:
        # absl would make it INFO, where Orbax tells every file it touches.
        logging.set_verbosity(logging.WARNING)


@contextlib.contextmanager
def _one_line_errors(advice: str) -> Iterator[None]:
    """Ends the process with one line on what no traceback helps with."""
    try:
        yield
    except (LostProcessError, PreemptedError) as error:
        _fail(str(error), TRY_AGAIN, alone=isinstance(error, LostProcessError))
    except EXPECTED_ERRORS as error:
        _fail(str(error), alone=not processes.is_known_to_all(error))
    except OSError as error:
        _fail(f"{error}{advice}", alone=not processes.is_known_to_all(error))
    except KeyboardInterrupt:
        print(f"\ninterrupted{advice}")
        _exit(INTERRUPTED, alone=True)
    except Exception:
        if not processes.are_several():
            raise
        traceback.print_exc()
        _exit(FAILED, alone=True)


def _fail(message: str, code: int = FAILED, alone: bool = False) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    _exit(code, alone)


def _exit(code: int, alone: bool) -> NoReturn:
    """Ends this process.

    Args:
      code: for the shell.
      alone: the other processes go on: JAX must not wait for them here, but leave, so
        that they notice.
    """
    if alone and processes.are_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _with_file(argument: str, file: str) -> str:
    """A variant alone is one of the experiment's own file."""
    name, separator, value = argument.partition("=")
    if name.lstrip("-") != "config" or not separator or ".py" in value:
        return argument
    return f"{name}={file}:{value}"


def _describe(configuration: ModuleType) -> str:
    title = (
        "Configuration keys and their defaults; other ones: --config=VARIANT, or "
        "--config=FILE[:VARIANT]"
    )
    return "\n".join(["", title, configuration.CONFIGURATION.describe()])
