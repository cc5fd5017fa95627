"""Command lines: the experiment flag, and one clear line in place of a traceback."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import config_flags


def define_config(default: str | None = None) -> Any:
    """`--config=configs/NAME.py:VARIANT` and `--config.field=value` for every field of the Experiment."""
    return config_flags.DEFINE_config_file(
        "config", default, "configs/NAME.py or configs/NAME.py:VARIANT; --config.field=value overrides a field."
    )


class Mistake(Exception):
    """Something the user can mend: printed as one line."""


def run(main: Callable[[list[str]], None]) -> None:
    """absl's app.run, with what the user can mend as one line on stderr and exit status 1 or 2."""
    try:
        arguments = flags.FLAGS(sys.argv)
    except Exception as error:
        # Flag parsing imports the configuration, so any error may come out of it: each is the user's to mend.
        fail(explain_flag_error(error), 2)
    else:
        app.run(lambda _: guarded(main, arguments), argv=arguments[:1])


def guarded(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    if len(arguments) > 1:
        fail(f"{arguments[1]!r} is not a flag: every option is written --name=value", 2)
    try:
        main(arguments)
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, Mistake) as error:
        if flags.FLAGS.verbosity > 0:  # --verbosity=1: developers want to see where
            raise
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted: the same command goes on from the last checkpoint", 130)


def explain_flag_error(error: Exception) -> str:
    """What config_flags and absl raise, in one line with a remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        guess = f"; did you mean --{error.suggestions[0]}?" if error.suggestions else "; see --help"
        return f"there is no flag --{error.flagname}{guess}"
    if isinstance(error, FileNotFoundError):
        return f"--config: {error.filename or text} does not exist: name a file like configs/search_grpo.py:demo"
    if isinstance(error, (AttributeError, KeyError)):
        return f"--config: {text.strip(chr(34))}: see the fields in rlrag/config.py"
    return text


def fail(text: str, status: int) -> None:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(status)
