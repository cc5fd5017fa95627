"""What README and guides tell users to write: Python runs, commands parse."""

import json
import re
import shlex
from pathlib import Path

import pytest

from launch import (
    bench,
    bench_gpu,
    build_index,
    convert,
    evaluate,
    evaluate_retrieval,
    plan,
    prepare_data,
    processes,
    serve_retrieval,
    study,
    train,
    view,
)
from launch.flags import parse, with_main_field
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs" / "guides").glob("*.md"))]
PROGRAMS = (
    bench,
    bench_gpu,
    build_index,
    convert,
    evaluate,
    evaluate_retrieval,
    plan,
    prepare_data,
    processes,
    serve_retrieval,
    study,
    train,
    view,
)
DEFINE = {module.__name__: getattr(module, "define_runner", module.define_flags) for module in PROGRAMS}


def blocks(language: str) -> list:
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    ]


def commands() -> list:
    """Every `python -m launch.X ...`, in blocks and in tables."""
    found = {}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for match in re.findall(r"python -m (launch\.\w+ ?[^\n`|#]*)", text):
            found[" ".join(match.split())] = page.name
    return [pytest.param(command, id=f"{page}: {command[:50]}") for command, page in found.items()]


@pytest.mark.parametrize("source", blocks("python"))
def test_the_python_runs(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"what is {n} plus 1?", "answers": [str(n + 1)], "solution": str(n + 1)} for n in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exec(compile(source, "guide", "exec"), {"__name__": "guide"})


@pytest.mark.parametrize("command", commands())
def test_the_commands_parse(command, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    program, *arguments = shlex.split(command)
    if "--" in arguments:  # a command that runs another
        cut = arguments.index("--")
        parse([program, *arguments[:cut]], DEFINE[program], {})
        program, *arguments = arguments[cut + 1 :]
    arguments = [with_main_field(argument) for argument in arguments]
    parse([program, *arguments], DEFINE[program], {})
