"""Command lines: flags, the experiment flag, and one clear line on stderr where something is wrong.

A launch module defines its flags in a function that is called where the module is the program and not on import, so
that several can be imported in one process: `run(main, define_flags, ...)`.
"""

import contextlib
import dataclasses
import difflib
import errno
import logging
import os
import re
import runpy
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_origin, get_type_hints

from absl import flags

Define = Callable[[flags.FlagValues, Sequence[str]], None]
EXAMPLE = "configs/search_grpo.py:demo"
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class Mistake(Exception):
    """A command line that the user can mend: told as one line, exit status 2."""


def run(
    main: Callable[[Any], None],
    define: Define | None = None,
    *,
    required: Mapping[str, str] = MappingProxyType({}),
    doc: str | None = None,
    interrupted: str = "interrupted",
    argv: Sequence[str] | None = None,
) -> None:
    """main(values) with its flags parsed; what the user can mend becomes one line on stderr and the process ends.

    define: defines the flags; None: they are in absl's flags.FLAGS already. required: an example of each flag that must
    be given. doc: what --help shows before the flags. interrupted: what Ctrl-C says. Exit status: 2 for the command
    line, 1 for what it names, 130 for Ctrl-C. Errors nobody foresaw keep their traceback; --traceback shows everyone's.
    """
    argv = list(sys.argv if argv is None else argv)
    be_quiet()
    try:
        argv = [with_main_field(argument) for argument in argv]
        values = parse(argv, define, required)
        if values.help:
            print(describe(values, doc))
            return
        main(values)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would interrupt the ending
        fail(interrupted, 130)
    except BrokenPipeError:  # the reader has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        if "--traceback" in argv:
            traceback.print_exc()
        fail(told, 2 if isinstance(error, Mistake) else 1)


def be_quiet() -> None:
    """The terminal is ours: libraries speak up from warnings on; absl and Orbax never, what they log they raise too."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read by XLA


def fail(text: str, status: int) -> NoReturn:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(status)


def explain(error: Exception) -> str | None:
    """The line for an error; None where it is a fault of the program."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or 'while writing'}): make room, then the same command goes on"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}: check that path"
    if isinstance(error, Mistake):
        return str(error)
    if isinstance(error, ValueError) and ours(error):
        return str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            f"out of memory ({str(error)[:200] or type(error).__name__}): make the model, rollout.num_slots, "
            "rollout.num_pages or update.micro_rows smaller"
        )
    if isinstance(error, ValueError | OSError):
        return f"{error} (--traceback shows where this was raised)"
    return None


def ours(error: Exception) -> bool:
    """Whether this repository raised it, and so wrote it for its users."""
    raised = traceback.extract_tb(error.__traceback__)
    if not raised:
        return False
    raised_at = raised[-1].filename
    return Path(raised_at).is_relative_to(Path(__file__).parents[1]) and "site-packages" not in raised_at


# -- parsing ----------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str], define: Define | None, required: Mapping[str, str]) -> flags.FlagValues:
    """The values of a command line. Raises Mistake, naming the flag and the remedy."""
    values = flags.FlagValues() if define else flags.FLAGS
    flags.DEFINE_bool("help", False, "Show this.", flag_values=values)
    flags.DEFINE_bool("traceback", False, "Show where an error was raised.", flag_values=values)
    if define:
        define(values, argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # config_flags loads files by an outdated call
            rest = values(argv)[1:]
    except Exception as error:
        # Parsing runs the configuration's code: whatever comes out of it is the user's to mend.
        raise Mistake(explain_config(error, argv) or explain_flag(error, values)) from error
    if values.help:
        return values
    if rest:
        raise Mistake(f"{rest[0]!r} is not a flag: every option is written --name=value")
    missing = [name for name in required if not values[name].value]
    if missing:
        given = " ".join(f"--{name}={required[name]}" for name in missing)
        raise Mistake(f"--{' and --'.join(missing)} must be given, as in {given}")
    if "config" in values and type(values["config"].value).__name__ == "_ErrorConfig":
        # config_flags keeps a file that cannot be read for later.
        raise Mistake(explain_config(None, argv) or f"{config_of(argv)} cannot be read")
    return values


def describe(values: flags.FlagValues, doc: str | None) -> str:
    """What --help shows."""
    lines = [(doc or "").strip(), "", "Flags:"]
    for name in values:
        if name != "help" and "." not in name and values[name].help:
            lines.append(f"  --{name}: {values[name].help}")
    return "\n".join(lines)


def explain_flag(error: Exception, values: flags.FlagValues) -> str:
    """What absl raises, with a remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, list(values), 1)
        return f"there is no flag --{error.flagname}: " + (f"did you mean --{near[0]}?" if near else "see --help")
    return f"{text} (see --help)"


# -- the experiment ---------------------------------------------------------------------------------------------------


def define_config(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """`--config=configs/NAME.py:VARIANT` and `--config.field=value` for every field of the Experiment."""
    from ml_collections import config_flags  # late: other programs need it not

    from rlrag.config import Experiment

    for kind in literals(Experiment()):  # ml_collections has no parser for them; check names the choices
        config_flags.register_flag_parser_for_type(kind, flags.ArgumentParser())
    config_flags.DEFINE_config_file(
        "config", None, f"Experiment, as in {EXAMPLE}; --config.FIELD=VALUE changes a field (rlrag/config.py).",
        flag_values=values, sys_argv=list(argv),
    )  # fmt: skip


def literals(part: Any) -> Iterator[Any]:
    """The type of every field that is a choice of texts."""
    kinds = get_type_hints(type(part))
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if dataclasses.is_dataclass(value):
            yield from literals(value)
        elif get_origin(kinds[f.name]) is Literal:
            yield kinds[f.name]


def with_main_field(argument: str) -> str:
    """--config.data=FILE with the field that stands for the whole part: --config.data.train=FILE."""
    found = re.match(r"(--?config\.)([\w.]+)(=.*)", argument, re.DOTALL)
    if found is None:
        return argument
    from rlrag.config import Experiment  # late: other programs need it not

    part: Any = Experiment()
    for name in found[2].split("."):
        part = getattr(part, name, None)
    main = getattr(part, "MAIN", None)
    return f"{found[1]}{found[2]}.{main}{found[3]}" if main else argument


def config_of(argv: Sequence[str]) -> str | None:
    """The value of --config."""
    for place, argument in enumerate(argv):
        found = re.fullmatch(r"--?config(?:=(.*))?", argument)
        if found:
            return found[1] if found[1] is not None else "".join(argv[place + 1 : place + 2])
    return None


def explain_config(error: Exception | None, argv: Sequence[str]) -> str | None:
    """What is wrong with --config and its fields; None where nothing is found, so the error lies elsewhere."""
    changed = [re.match(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", argument) for argument in argv]
    changes = [(found[1], found[2]) for found in changed if found]
    value = config_of(argv)
    if value is None:
        return f"--config.{changes[0][0]} needs --config before it, as in --config={EXAMPLE}" if changes else None
    name, _, variant = value.partition(":")
    try:
        experiment = load_config(name, variant)
    except Mistake as mistake:
        return str(mistake)
    for path, _ in changes:
        fault = explain_path(experiment, path)
        if fault:
            return f"--config.{path}: {fault}"
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
    if found:
        present = read(experiment, found[1])
        return f"--config.{found[1]}={found[2]}: the field wants {KINDS[type(present)]}, like {present!r}"
    before = re.match(r"Found (--\S+) in argv before a value for --config", str(error))
    if before:
        return f"{before[1]} stands before --config: put --config={value} first"
    return None


def load_config(name: str, variant: str) -> Any:
    """What get_config returns. Raises Mistake where the file, the variant or the code in it is wrong."""
    path = Path(name)
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [other.stem for other in path.parent.glob("*.py")], 1)
        remedy = f"did you mean {path.with_name(near[0] + '.py')}?" if near else f"name one like {EXAMPLE}"
        what = "is a directory" if path.is_dir() else f"there is no such file, seen from {Path.cwd()}"
        raise Mistake(f"--config={name}: {what}: {remedy}")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            module = runpy.run_path(name)
            if "get_config" not in module:
                raise AttributeError("there is no get_config in it")
            return module["get_config"](*([variant] if variant else []))
    except ValueError as error:  # raised for us to read
        raise Mistake(f"--config={name}{variant and ':'}{variant}: {error}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        line = f", line {lines[-1]}" if lines else ""
        raise Mistake(
            f"--config={name}{line}: {type(error).__name__}: {error}; it must define get_config(variant) that returns "
            "an rlrag.config.Experiment"
        ) from None


def explain_path(experiment: Any, path: str) -> str | None:
    """What is wrong with the path of a field."""
    part = experiment
    for depth, name in enumerate(path.split(".")):
        if not dataclasses.is_dataclass(part):
            field = ".".join(path.split(".")[:depth])
            return f"{field} is a field without parts: write --config.{field}=VALUE"
        names = [f.name for f in dataclasses.fields(part)]
        if name not in names:
            return f"{type(part).__name__} has no field {name!r}; {suggest(experiment, part, path, name, names)}"
        part = getattr(part, name)
    if dataclasses.is_dataclass(part):
        first = dataclasses.fields(part)[0].name
        return f"it is a part, not a field: set one of its fields, as in --config.{path}.{first}=VALUE"
    return None


def suggest(experiment: Any, part: Any, path: str, name: str, names: Sequence[str]) -> str:
    """The fields that may have been meant."""
    prefix = path.rpartition(".")[0] if part is not experiment else ""
    near = difflib.get_close_matches(name, names, 3)
    meant = [f"{prefix}.{other}" if prefix else other for other in near]
    meant = meant or [other for other in paths(experiment) if other.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"did you mean {' or '.join(map(repr, meant))}?" if meant else f"it has: {', '.join(names)}"


def paths(part: Any, prefix: str = "") -> Iterator[str]:
    """The path of every field, parts of parts included."""
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if dataclasses.is_dataclass(value):
            yield from paths(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def read(experiment: Any, path: str) -> Any:
    for name in path.split("."):
        experiment = getattr(experiment, name)
    return experiment
