"""What every command shares: its configuration, help, and errors as one line."""

import contextlib
import difflib
import importlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.distributed.patience import SILENCE_SECONDS, START_SECONDS
from experiments.running import output, stopping
from experiments.running.stopping import FAILED, INTERRUPTED, TRY_AGAIN, Stopped

# What Python says of values that are none, and what was expected.
EXPECTED = {
    r"invalid literal for int\(\) with base 10: ": "expected a whole number, got ",
    r"could not convert string to float: ": "expected a number, got ",
}

_LONG_FORMS = dict.fromkeys(("--dry_run", "-dry_run"), "--config.dry_run=True")
_PREFIX = re.compile(r"--?config\.")

# What needs JAX is imported where it is needed: from its first moment on, a command is
# to know what to do with a signal.


def launch(
    main: Callable[..., None],
    configuration: str,
    documentation: str | None,
    *,
    workdir: str,
    positional: Sequence[str] = (),
) -> None:
    """Parses the command line and runs a command.

    Exits with 0 on success, 1 after an error that one line explains, 75 when the same
    command will go on, as after SIGTERM or when another process was lost, and 130 when
    interrupted from the keyboard.

    Args:
      main: the command, called with the configuration, the folder for the results and
        that of the data, or None, when flags are parsed; and with the positional
        arguments.
      configuration: name of the module of the default configuration. It has
        `get_config` and `CONFIGURATION`.
      documentation: what --help says first.
      workdir: the default folder for the results, in which keys of the configuration
        may stand in braces.
      positional: names of the arguments that are no flags.
    """
    output.protect()
    stopping.begin()
    module = importlib.import_module(configuration)
    _launch(main, module, documentation, workdir, positional)


def _launch(
    main: Callable[..., None],
    configuration: ModuleType,
    documentation: str | None,
    workdir: str,
    positional: Sequence[str],
) -> None:
    from experiments.configuration.fields import Role

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
    only_names = configuration.CONFIGURATION.keys(Role.NAME)
    start_processes = _define_processes()

    def parse(arguments: Sequence[str]) -> list[str]:
        fields = configuration.CONFIGURATION.describe()
        _answer_help(arguments, f"{documentation or ''}\n{fields}")
        program, *given = arguments
        names = [argument.lstrip("-").split("=")[0] for argument in given]
        for name in names:
            key = name.removeprefix("config.")
            if key != name and key not in keys:
                close = difflib.get_close_matches(key, keys, 1)
                meant = f" Did you mean {close[0]}?" if close else ""
                _fail(
                    f"unknown configuration key {key}; the keys are "
                    f"{', '.join(sorted(keys))}.{meant}"
                )
            if key != name and key in only_names:
                _fail(
                    f"--config.{key} only names a model, and changes nothing in it: "
                    "choose one of the variants with --config=VARIANT (see --help)."
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
            _fail(f"{_in_plain_words(last)} (see --help)")
        # A configuration file may be broken in any way.
        except Exception as error:
            _fail(f"the configuration file does not work: {error!r} (see --help)")
        _quieten_libraries()
        return remaining

    def run(arguments: Sequence[str]) -> None:
        from experiments.distributed import processes
        from experiments.running import provenance
        from experiments.running.compilation_cache import use_compilation_cache

        _, *others = arguments
        for missing in positional[len(others) :]:
            _fail(f"the argument {missing} is missing (see --help)")
        for unexpected in others[len(positional) :]:
            _fail(f"unexpected argument {unexpected!r} (see --help)")
        config = flag.value.to_dict()
        results = _local("workdir", folder.value)
        data_folder = _local("data_dir", data.value)
        use_compilation_cache()
        with _one_line_errors("; the same command goes on from the last checkpoint."):
            start_processes()
            processes.check_same(
                {**config, **provenance.settings(), **provenance.versions()}
            )
            place = Path(results or workdir.format(**config))
            main(config, place, data_folder, *others)

    # Where ml_collections, too, looks for overrides.
    sys.argv = [_LONG_FORMS.get(argument, argument) for argument in sys.argv]
    app.run(run, flags_parser=parse)


def _in_plain_words(message: str) -> str:
    """What a flag's parser says, as its users would say it."""
    plain = message.removeprefix("ValueError: ")
    for words, expected in EXPECTED.items():
        plain = re.sub(words, expected, plain)
    return plain


def _local(name: str, folder: str | None) -> str | None:
    """A folder that a flag names, on this machine; exits if it names none."""
    if folder is None:
        return None
    if not folder.strip():
        _fail(f"--{name}= is empty: expected a folder; is a variable not set?")
    if "://" in folder:
        _fail(
            f"--{name}={folder}: expected a folder of this machine's file system; "
            "mount the bucket, and give the folder where it is."
        )
    return str(Path(folder).expanduser())


def launch_with_arguments(
    main: Callable[[list[str]], None],
    documentation: str | None,
    *,
    hands_on: bool = False,
) -> None:
    """Parses the command line and runs a command that has no configuration of its own.

    Exits as `launch` does.

    Args:
      main: the command, called with the positional arguments when flags are parsed.
      documentation: what --help says first.
      hands_on: the command hands --config.KEY=VALUE on to others; they are all that
        `main` is called with, as KEY=VALUE.
    """
    output.protect()
    stopping.raise_on_sigterm()

    def parse(arguments: Sequence[str]) -> list[str]:
        _answer_help(arguments, documentation or "")
        changes = [each for each in arguments if hands_on and _PREFIX.match(each)]
        others = [each for each in arguments if each not in changes]
        try:
            remaining: list[str] = flags.FLAGS(others)
        except flags.Error as error:
            _fail(f"{error} (see --help)")
        if hands_on and len(remaining) > 1:
            _fail(f"unexpected argument {remaining[1]!r} (see --help)")
        _quieten_libraries()
        return [*remaining, *(_PREFIX.sub("", change) for change in changes)]

    def run(arguments: Sequence[str]) -> None:
        from experiments.running.compilation_cache import use_compilation_cache

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
        "(default: {} on one machine, {} otherwise).".format(*START_SECONDS),
        lower_bound=1,
    )
    silence_seconds = flags.DEFINE_integer(
        "silence_seconds",
        None,
        "After how long without a sign of life a process is lost "
        "(default: {} on one machine, {} otherwise).".format(*SILENCE_SECONDS),
        lower_bound=1,
    )

    def start() -> None:
        from experiments.distributed import processes

        processes.start(
            mode.value,
            processes.Address(coordinator.value, count.value, number.value),
            start_seconds.value,
            silence_seconds.value,
        )

    return start


def _answer_help(arguments: Sequence[str], documentation: str) -> None:
    if {"--help", "-help", "-h", "--helpshort"} & set(arguments):
        # absl prints the docstring of __main__ and the flags of its module, and would
        # exit with 1.
        sys.modules["__main__"].__doc__ = _narrow(documentation)
        for flag in flags.FLAGS.get_flags_for_module(__name__):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)


def _narrow(documentation: str) -> str:
    """Text in lines of 80 columns; what is indented stays as it is."""
    paragraphs = documentation.strip().split("\n\n")
    return "\n\n".join(
        each
        if re.search("^ ", each, re.MULTILINE)
        else textwrap.fill(each, 80, break_on_hyphens=False)
        for each in paragraphs
    )


def _quieten_libraries() -> None:
    if flags.FLAGS["verbosity"].using_default_value:
        # absl would make it INFO, where Orbax tells every file it touches.
        logging.set_verbosity(logging.WARNING)


@contextlib.contextmanager
def _one_line_errors(advice: str) -> Iterator[None]:
    """Ends the process with one line on what no traceback helps with."""
    try:
        yield
    except Stopped as stopped:
        _fail(str(stopped), stopped.code)
    except KeyboardInterrupt:
        _fail(f"stopped by SIGINT{advice}", INTERRUPTED)
    except Exception as error:
        # Known only by now, and imported only now.
        from experiments.configuration.fields import ConfigError
        from experiments.data.errors import DataError
        from experiments.distributed import processes
        from experiments.distributed.parallel import DeviceError
        from experiments.running.run_folder import LostProcessError
        from experiments.running.workdir import WorkdirError

        if isinstance(error, LostProcessError):
            _fail(str(error), TRY_AGAIN, alone=True)
        alone = not processes.is_known_to_all(error)
        # Mistakes of the user or faults of the machine: no traceback helps with them.
        expected = (ConfigError, DataError, DeviceError, WorkdirError)
        if isinstance(error, (*expected, processes.ProcessesError)):
            _fail(str(error), alone=alone)
        if isinstance(error, OSError):
            _fail(f"{error}{advice}", alone=alone)
        traceback.print_exc()
        _exit(FAILED, alone=True)


def _fail(message: str, code: int = FAILED, alone: bool = False) -> NoReturn:
    _exit(code, alone, message)


def _exit(code: int, alone: bool, message: str = "") -> NoReturn:
    """Ends this process.

    Args:
      code: for the shell.
      alone: the other processes go on, so that they notice; else all end together.
      message: for the user, on one line.
    """
    if not alone and "jax" in sys.modules:
        from experiments.distributed import processes

        processes.part(lambda: stopping.say(message))
        message = ""
    stopping.leave(code, message)


def _with_file(argument: str, file: str) -> str:
    """A variant alone is one of the experiment's own file."""
    name, separator, value = argument.partition("=")
    if name.lstrip("-") != "config" or not separator or ".py" in value:
        return argument
    return f"{name}={file}:{value}"
