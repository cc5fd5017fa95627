import json
import logging
import subprocess
import sys

import pytest
from absl import flags

from launch.flags import define_config, parse, run, with_main_field
from rlrag.config import Experiment
from tests.conftest import REPOSITORY

DEMO = "--config=configs/search_grpo.py:demo"
REQUIRED = {"config": "configs/search_grpo.py:demo", "workdir": "runs/demo"}


def define(values, argv):
    define_config(values, argv)
    flags.DEFINE_string("workdir", None, "Directory of the run.", flag_values=values)
    flags.DEFINE_integer("rounds", 3, "How often.", flag_values=values)


def reject(values):
    raise AssertionError("a wrong command line came through")


@pytest.mark.parametrize(
    ("argument", "expanded"),
    [
        ("--config.data=a=b.jsonl", "--config.data.train=a=b.jsonl"),
        ("--config.reward=m:f", "--config.reward.function=m:f"),
        ("--config.data.train=x", "--config.data.train=x"),
        ("--config.mesh=1", "--config.mesh=1"),
        ("--config=configs/x.py", "--config=configs/x.py"),
        ("--data=x", "--data=x"),
    ],
)
def test_a_part_may_have_a_field_that_stands_for_it(argument, expanded):
    assert with_main_field(argument) == expanded


@pytest.mark.parametrize(
    ("field", "value"),
    [("ratio", "sequence"), ("aggregate", "constant"), ("kl_estimator", "k1"), ("reference", "base")],
)
def test_a_choice_of_texts_is_a_flag(field, value, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    values = parse(["program", DEMO, f"--config.main.loss.{field}={value}", "--workdir=x"], define, REQUIRED)
    assert getattr(values.config.main.loss, field) == value


@pytest.fixture
def told(monkeypatch, capsys):
    """The one line on stderr and the exit status of a command line, in this process."""
    monkeypatch.chdir(REPOSITORY)

    def tell(*arguments, main=reject):
        with pytest.raises(SystemExit) as ended:
            run(main, define, required=REQUIRED, argv=["program", *arguments])
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("error: ")
        return ended.value.code, captured.err.removeprefix("error: ").strip()

    return tell


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--wrkdir=x"], "there is no flag --wrkdir: did you mean --workdir?"),
        (["--zzz=1"], "there is no flag --zzz: see --help"),
        ([DEMO, "--workdir=x", "stray"], "'stray' is not a flag: every option is written --name=value"),
        (
            [DEMO, "--workdir=x", "--rounds=two"],
            "flag --rounds=two: invalid literal for int() with base 10: 'two' (see --help)",
        ),
        ([], "--config and --workdir must be given, as in --config=configs/search_grpo.py:demo --workdir=runs/demo"),
        ([DEMO], "--workdir must be given, as in --workdir=runs/demo"),
        ([DEMO, "--workdir="], "--workdir must be given, as in --workdir=runs/demo"),
        ([DEMO, "--workdir"], "Missing value for flag --workdir (see --help)"),
        (["--config.seed=1"], "--config.seed needs --config before it, as in --config=configs/search_grpo.py:demo"),
        (
            ["--config.seed=1", DEMO],
            "--config.seed=1 stands before --config: put --config=configs/search_grpo.py:demo first",
        ),
        (
            ["--config=configs", "--workdir=x"],
            "--config=configs: is a directory: name one like configs/search_grpo.py:demo",
        ),
        (
            ["--config=configs/search_gropo.py", "--config.seed=1"],
            f"--config=configs/search_gropo.py: there is no such file, seen from {REPOSITORY}: did you mean "
            "configs/search_grpo.py?",
        ),
        (
            ["--config=configs/search_grpo.py:nope", "--workdir=x"],
            "--config=configs/search_grpo.py:nope: configs/search_grpo.py has no variant 'nope'; there are: "
            "demo, supervised",
        ),
        ([DEMO, "--config.sed=1"], "--config.sed: Experiment has no field 'sed'; did you mean 'seed'?"),
        (
            [DEMO, "--config.main.update.lerning_rate=1"],
            "--config.main.update.lerning_rate: Update has no field 'lerning_rate'; did you mean "
            "'main.update.learning_rate'?",
        ),
        (
            [DEMO, "--config.learning_rate=1"],
            "--config.learning_rate: Experiment has no field 'learning_rate'; did you mean "
            "'warm_up.update.learning_rate' or 'warm_up.critic.learning_rate' or 'main.update.learning_rate' or "
            "'main.critic.learning_rate'?",
        ),
        (
            [DEMO, "--config.mesh.zzz=1"],
            "--config.mesh.zzz: Mesh has no field 'zzz'; it has: data, model, replica",
        ),
        ([DEMO, "--config.seed.x=1"], "--config.seed.x: seed is a field without parts: write --config.seed=VALUE"),
        (
            [DEMO, "--config.mesh=1"],
            "--config.mesh: it is a part, not a field: set one of its fields, as in --config.mesh.data=VALUE",
        ),
        ([DEMO, "--config.seed=abc"], "--config.seed=abc: the field wants a whole number, like 0"),
        ([DEMO, "--config.seed=1.5"], "--config.seed=1.5: the field wants a whole number, like 0"),
        ([DEMO, "--config.seed="], "--config.seed=: the field wants a whole number, like 0"),
        ([DEMO, "--config.seed", "--workdir=x"], "--config.seed=--workdir=x: the field wants a whole number, like 0"),
        ([DEMO, "--config.model.tied=maybe"], "--config.model.tied=maybe: the field wants true or false, like True"),
        ([DEMO, "--config.main.loss.kl=x"], "--config.main.loss.kl=x: the field wants a number, like 0.0"),
    ],
)
def test_a_wrong_command_line_is_one_line(told, arguments, line):
    assert told(*arguments) == (2, line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def get_config():\n    return zero / 1\n", "bad.py, line 2: NameError: name 'zero' is not defined; it must"),
        ("x = 1\n", "bad.py: AttributeError: there is no get_config in it; it must define get_config(variant)"),
        ("def get_config(\n", "bad.py: SyntaxError: '(' was never closed (bad.py, line 1); it must define"),
        ("raise ValueError('two\\nlines')\n", "bad.py: two lines"),
        ("import nope\ndef get_config(): pass\n", "bad.py, line 1: ModuleNotFoundError: No module named 'nope'; it"),
    ],
)
def test_a_wrong_configuration_is_one_line(told, tmp_path, text, line):
    (tmp_path / "bad.py").write_text(text)
    status, shown = told(f"--config={tmp_path}/bad.py", "--workdir=x")
    assert status == 2
    assert shown.replace(f"{tmp_path}/", "").startswith(f"--config={line}")


def test_what_is_right_comes_through():
    argv = ["program", DEMO, "--config.seed=7", "--config.main.update.learning_rate=0.5", "--noconfig.model.tied"]
    values = parse([*argv, "--config.rollout.train.top_k", "3", "--workdir=x"], define, REQUIRED)
    assert isinstance(values.config, Experiment)
    assert (values.config.seed, values.config.main.update.learning_rate) == (7, 0.5)
    assert (values.config.model.tied, values.config.rollout.train.top_k) == (False, 3)
    assert (values.workdir, values.rounds) == ("x", 3)
    assert values.config.warm_up.update.learning_rate != 0.5


def test_help_names_every_flag(capsys):
    run(reject, define, required=REQUIRED, doc="Do it.\n\nThus.", argv=["program", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("Do it.\n\nThus.\n\nFlags:\n")
    for name in ("config", "workdir", "rounds", "traceback"):
        assert f"\n  --{name}: " in shown


def raising(error):
    def main(values):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            FileNotFoundError(2, "No such file or directory", "x.json"),
            1,
            "x.json: No such file or directory: check that path",
        ),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied: check that path"),
        (MemoryError(), 1, "out of memory (MemoryError): make the model, rollout.num_slots, "),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
            1,
            "out of memory (RESOURCE_EXHAUSTED: Out of memory): make",
        ),
    ],
)
def test_what_happens_while_it_runs_is_one_line(told, error, status, line, monkeypatch):
    monkeypatch.setattr("launch.flags.signal.signal", lambda *_: None)  # this process still wants its Ctrl-C
    code, shown = told(DEMO, "--workdir=x", main=raising(error))
    assert code == status
    assert shown.startswith(line)


def test_a_value_error_of_ours_stands_alone_and_of_others_says_how_to_find_it(told):
    def ours(values):
        from rlrag.mesh import make_mesh

        make_mesh(data=9, model=9)

    assert told(DEMO, "--workdir=x", main=ours)[1].endswith("choose sizes whose product is 1")

    def others(values):
        json.loads("{")

    assert told(DEMO, "--workdir=x", main=others)[1].endswith("(--traceback shows where this was raised)")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(KeyError):
        run(raising(KeyError("x")), define, required=REQUIRED, argv=["program", DEMO, "--workdir=x"])


def test_traceback_on_request(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    argv = ["program", DEMO, "--workdir=x", "--traceback"]
    with pytest.raises(SystemExit):
        run(raising(ValueError("bad")), define, required=REQUIRED, argv=argv)
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("Traceback")
    assert shown[-1].startswith("error: bad")


def test_libraries_are_quiet():
    run(lambda values: None, define, required={}, argv=["program"])
    assert not logging.getLogger("absl").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("jax._src.xla_bridge").isEnabledFor(logging.INFO)


def test_two_programs_share_a_process_and_a_wrong_flag_loads_no_jax():
    program = (
        "import sys, launch.evaluate, launch.prepare_data, launch.train\n"
        "from launch.flags import run\n"
        "sys.argv = ['launch.train', '--config=configs/search_grpo.py', '--workdir=x', '--config.seed=-1']\n"
        "try:\n    run(launch.train.main, launch.train.define_flags)\n"
        "except SystemExit as ended:\n    print(ended.code, 'jax' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1 False\n", "error: seed is -1: give at least 0\n")


def test_a_reader_that_has_enough_is_no_error():
    program = (
        "from launch.flags import run\n"
        "run(lambda values: [print('line', flush=True) for _ in range(100_000)], argv=['program'])\n"
    )
    command = f"{sys.executable} -c '{program.replace(chr(39), chr(34))}' | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("line\n", "")
