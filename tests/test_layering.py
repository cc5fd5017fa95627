"""The house rules that a parser can hold: who may import whom, names, sizes, and a test file for every module.

Imports are read from the source, wherever they stand (relative ones, and those inside functions, too).
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "rlrag", "configs", "launch")


class Rule(NamedTuple):
    ours: str = ""  # modules of this repository, each with everything under it
    others: str = ""  # packages of others, likewise; the standard library is always allowed


# Who may import whom. The most specific line counts; a module no line speaks about fails.
RULES = {
    "kernels": Rule("kernels", "jax"),
    "kernels.bench": Rule("kernels", "jax numpy"),
    "rlrag.__init__": Rule(),
    # The contracts between the rooms.
    "rlrag.trajectory": Rule("", "numpy"),
    "rlrag.config": Rule("rlrag.model.architecture", "numpy"),  # plain data, imports no JAX
    "rlrag.batch": Rule("", "jax numpy flax.struct"),
    "rlrag.mesh": Rule("", "jax numpy flax.struct"),
    "rlrag.metrics": Rule("", "jax numpy flax.struct rich tensorboardX wandb"),
    "rlrag.packing": Rule("rlrag.batch rlrag.trajectory rlrag.rewards.paid", "jax numpy"),
    # Arrays: no text.
    "rlrag.model": Rule("rlrag.model kernels rlrag.batch rlrag.mesh", "jax numpy flax"),
    "rlrag.model.families": Rule("rlrag.model.architecture", ""),
    "rlrag.model.folder": Rule("rlrag.model.families", "huggingface_hub"),
    "rlrag.model.hf": Rule("rlrag.model rlrag.mesh", "jax numpy safetensors"),
    "rlrag.model.hf_export": Rule("rlrag.model", "jax numpy safetensors"),
    "rlrag.model.peft": Rule("rlrag.model", "jax numpy safetensors"),
    "rlrag.rollout": Rule(
        "rlrag.rollout rlrag.model kernels rlrag.mesh rlrag.trajectory rlrag.agents.workflow", "jax numpy flax"
    ),
    "rlrag.objectives": Rule(
        "rlrag.objectives rlrag.batch kernels rlrag.mesh rlrag.model rlrag.metrics", "jax numpy flax optax"
    ),
    # Text: no arrays of a device.
    "rlrag.agents": Rule("rlrag.agents rlrag.trajectory", "numpy"),
    "rlrag.agents.tokenizer": Rule("rlrag.agents rlrag.trajectory", "numpy tokenizers"),
    "rlrag.rewards": Rule("rlrag.rewards rlrag.trajectory", "numpy"),
    "rlrag.retrieval": Rule("rlrag.retrieval rlrag.trajectory", "numpy faiss bm25s"),
    "rlrag.retrieval.wire": Rule("rlrag.retrieval rlrag.trajectory", "orjson"),
    "rlrag.retrieval.server": Rule("rlrag.retrieval", "starlette prometheus_client"),
    "rlrag.retrieval.remote": Rule("rlrag.retrieval rlrag.trajectory", "urllib3 tenacity"),
    "rlrag.retrieval.quality": Rule("rlrag.retrieval", ""),
    "rlrag.retrieval.service": Rule("rlrag.retrieval rlrag.config", ""),
    "rlrag.retrieval.directory": Rule("rlrag.retrieval rlrag.trajectory rlrag.loading", "numpy"),
    "rlrag.retrieval.milvus_collection": Rule("rlrag.retrieval rlrag.trajectory", "numpy pymilvus milvus_lite grpc"),
    "rlrag.retrieval.dense": Rule("rlrag.retrieval rlrag.mesh", "jax numpy"),
    "rlrag.retrieval.embed": Rule("rlrag.retrieval rlrag.trajectory rlrag.model rlrag.mesh", "jax numpy tokenizers"),
    "rlrag.data": Rule(
        "rlrag.data rlrag.trajectory rlrag.agents", "numpy grain tensorflow_datasets array_record pyarrow"
    ),
    "rlrag.data.task": Rule(
        "rlrag.data rlrag.trajectory rlrag.agents rlrag.config rlrag.retrieval rlrag.loading", "numpy"
    ),
    "rlrag.data.own": Rule("rlrag.data rlrag.trajectory rlrag.agents rlrag.config", "numpy"),
    "rlrag.data.text": Rule(
        "rlrag.data rlrag.trajectory rlrag.agents rlrag.config rlrag.retrieval rlrag.model.folder", "numpy transformers"
    ),
    "rlrag.data.worlds": Rule("rlrag.data rlrag.trajectory rlrag.agents", "numpy"),
    # What brings them together.
    "rlrag.recipes": Rule(
        "rlrag.recipes rlrag.agents rlrag.rewards rlrag.objectives rlrag.trajectory rlrag.config rlrag.data.task "
        "rlrag.loading",
        "numpy",
    ),
    "rlrag.console": Rule("", "rich"),
    "rlrag.report": Rule("", "numpy matplotlib"),
    "rlrag.checkpoint": Rule("rlrag.batch rlrag.mesh rlrag.config", "jax numpy flax orbax"),
    "rlrag.evaluate": Rule("kernels rlrag", "jax numpy scipy flax optax grain rich"),
    "rlrag.setup": Rule("kernels rlrag", "jax numpy"),
    "rlrag.convert": Rule("kernels rlrag", "jax"),
    "rlrag.workdir": Rule("rlrag.config", ""),  # read before JAX is loaded
    "rlrag.statistics": Rule("", "numpy scipy"),
    "rlrag.study": Rule("rlrag.config rlrag.workdir rlrag.console", ""),  # its cells are processes of their own
    "rlrag.results": Rule("rlrag.study rlrag.statistics", "numpy matplotlib"),
    "rlrag.episodes": Rule("rlrag.trajectory rlrag.rewards.paid", "numpy"),
    "rlrag.loading": Rule("", ""),
    "rlrag.view": Rule("rlrag.workdir rlrag.agents.tags", "numpy"),
    "rlrag.records": Rule("", "numpy"),
    "rlrag.watch": Rule("rlrag.config", ""),
    "rlrag.signals": Rule("", ""),
    "rlrag.processes": Rule("", "jax orbax"),
    "rlrag.collection": Rule("kernels rlrag", "jax numpy"),
    "rlrag.learner": Rule("kernels rlrag", "jax numpy"),
    "rlrag.dry_run": Rule("kernels rlrag", "jax numpy"),
    "rlrag.devices": Rule("", ""),
    "rlrag.hlo": Rule("", "numpy"),  # reads text: needs no JAX
    "rlrag.survey": Rule("kernels.log_prob kernels.decode_attention rlrag", "jax"),
    "rlrag.plan": Rule("rlrag", "jax numpy"),
    "rlrag.plan_report": Rule("rlrag.plan rlrag.survey rlrag.hlo rlrag.devices", "jax"),
    "rlrag.train": Rule("kernels rlrag", "jax numpy flax optax grain rich matplotlib"),
    "rlrag.speed": Rule(
        "rlrag.speed rlrag.rollout rlrag.model rlrag.objectives rlrag.batch rlrag.mesh rlrag.metrics rlrag.packing "
        "rlrag.rewards.paid rlrag.agents.workflow rlrag.trajectory kernels",
        "jax numpy",
    ),
    "rlrag.speed.searching": Rule("rlrag.retrieval rlrag.trajectory", ""),
    "rlrag.speed.findings": Rule("", ""),  # collects what processes with a device wrote, and takes none itself
    "configs": Rule(
        "configs rlrag.recipes rlrag.config rlrag.model.architecture rlrag.data rlrag.study", "ml_collections"
    ),
    "launch": Rule(
        "launch configs rlrag.train rlrag.dry_run rlrag.evaluate rlrag.config rlrag.console rlrag.processes",
        "absl ml_collections jax numpy rich",
    ),
    "launch.plan": Rule(
        "launch configs.scale rlrag.config rlrag.devices rlrag.survey rlrag.plan rlrag.plan_report", "absl"
    ),
    "launch.study": Rule("launch rlrag.study rlrag.results", "absl"),
    "launch.convert": Rule("launch rlrag.convert rlrag.console", "absl"),
    "launch.view": Rule("launch rlrag.view", "absl"),
    "launch.prepare_data": Rule("launch rlrag.data rlrag.trajectory", "absl numpy tensorflow_datasets"),
    "launch.evaluate_retrieval": Rule("launch rlrag.retrieval", "absl"),
    "launch.build_index": Rule("launch rlrag.retrieval rlrag.console", "absl"),
    "launch.serve_retrieval": Rule("launch rlrag.retrieval rlrag.data.task", "absl uvicorn prometheus_client"),
    "launch.bench": Rule("launch kernels rlrag.speed rlrag.model configs.scale", "absl jax"),
    "launch.bench_gpu": Rule("launch rlrag.speed.findings", "absl"),
    "launch.bench_peers": Rule("launch rlrag.agents.tokenizer", "absl"),
    # Contenders run in environments that lack each other's packages.
    "launch.peers": Rule("launch.peers", ""),
    "launch.peers.ours": Rule("launch.peers kernels rlrag", "jax numpy"),
    "launch.peers.pairs": Rule("kernels rlrag", "jax numpy"),
    "launch.peers.traps": Rule("launch.peers", "jax numpy"),
    "launch.peers.tunix": Rule("launch.peers", "tunix jax numpy flax optax transformers"),
    "launch.peers.hugging_face": Rule("launch.peers", "torch transformers trl datasets"),
}

# Modules that run wherever jax, flax, optax, numpy and absl do, counting all that importing them imports of ours.
CORE = (
    "kernels", "rlrag.model", "rlrag.rollout", "rlrag.objectives", "rlrag.speed", "launch.bench", "launch.bench_gpu",
)  # fmt: skip
NOT_CORE = ("rlrag.model.hf", "rlrag.model.hf_export", "rlrag.model.peft")
CORE_OTHERS = "jax flax optax numpy absl"

# Modules that a process may import without paying for JAX or taking memory on an accelerator.
WITHOUT_JAX = ("rlrag.trajectory", "rlrag.config", "rlrag.agents", "rlrag.rewards", "rlrag.retrieval")
WITH_JAX = ("rlrag.retrieval.dense", "rlrag.retrieval.embed")

VAGUE = {"util", "utils", "common", "helper", "helpers", "misc", "manager", "managers", "base"}
MOST_LINES = 450

# Kernels whose implementations are tested side by side: kernels/NAME/*.py by tests/kernels/test_NAME.py.
TESTED_TOGETHER = tuple(
    f"kernels/{name}" for name in ("advantage", "decode_attention", "log_prob", "packed_attention", "uncertainty")
)
PEERS = ("workloads", "protocol", "report", "ours", "tunix", "hugging_face", "pairs", "traps")
# Modules whose cases stand in the test file of the room they serve, which imports them or is their only way in.
TESTED_WITH = {
    **{f"launch/peers/{name}.py": "tests/launch/test_bench_peers.py" for name in PEERS},
    "rlrag/agents/observation.py": "tests/agents/test_search.py",
    "rlrag/data/files.py": "tests/data/test_sources.py",
    "rlrag/data/formats.py": "tests/data/test_sources.py",
    "rlrag/data/worlds/facts.py": "tests/data/worlds/test_multihop.py",
    "rlrag/data/worlds/policies.py": "tests/data/worlds/test_multihop.py",
}


class Import(NamedTuple):
    line: int
    target: str  # dotted, with the imported name: numpy.array, rlrag.model.transformer.trunk
    at_import: bool  # executed when the module is imported, not later inside a function


def within(name: str, prefixes: str | tuple[str, ...]) -> bool:
    each = prefixes.split() if isinstance(prefixes, str) else prefixes
    return any(name == prefix or name.startswith(prefix + ".") for prefix in each)


def imports(module: str, source: str) -> list[Import]:
    """Every import of a module's source; `module` is dotted, a package's own file ends in `.__init__`."""
    found = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(node.lineno, alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            found.extend(Import(node.lineno, f"{origin}.{alias.name}", at_import) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not inside)

    visit(ast.parse(source), True)
    return found


def broken_rules(module: str, source: str, path: str) -> list[str]:
    """One line for each import that the table does not allow: file, line, import, rule."""
    parts = module.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    name = next((name for name in names if name in RULES), None)
    if name is None:
        return [f"{path}:1: no line of RULES in tests/test_layering.py speaks about {module}: add one"]
    rule, broken = RULES[name], []
    for line, target, _ in imports(module, source):
        ours = within(target, (*ROOMS, "tests"))
        known = ours or target.split(".")[0] not in sys.stdlib_module_names
        if known and not within(target, rule.ours if ours else rule.others):
            allowed = f"{rule.ours or 'nothing of ours'}; {rule.others or 'nothing of others'}"
            broken.append(f"{path}:{line}: imports {target}, but {name} may import only: {allowed}")
    return broken


def modules(*rooms: str) -> Iterator[tuple[str, Path]]:
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def reach(start: str, sources: dict[str, str]) -> Iterator[tuple[str, Import]]:
    """Every import executed by importing a module of ours, with the module of ours that does it."""
    todo, done = [start], set()
    while todo:
        module = todo.pop()
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            for file in (name, f"{name}.__init__"):
                if file in sources and file not in done:
                    done.add(file)
                    executed = [found for found in imports(file, sources[file]) if found.at_import]
                    todo.extend(found.target for found in executed)
                    yield from ((file, found) for found in executed)


def beyond_core(module: str, sources: dict[str, str]) -> list[str]:
    return [
        f"{module} is a core path ({CORE_OTHERS}), but importing it imports {found.target} in {file}:{found.line}"
        for file, found in reach(module, sources)
        if found.target.split(".")[0] not in sys.stdlib_module_names
        and not within(found.target, ROOMS)
        and not within(found.target, CORE_OTHERS)
    ]


def report(lines: list[str]) -> None:
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


def test_imports_follow_the_table():
    report([line for name, path in modules(*ROOMS) for line in broken_rules(name, path.read_text(), _shown(path))])


def test_core_paths_need_jax_flax_optax_numpy_absl_only():
    sources = {name: path.read_text() for name, path in modules(*ROOMS)}
    core = [name for name in sources if within(name, CORE) and not within(name, NOT_CORE)]
    report([line for name in core for line in beyond_core(name, sources)])


def test_text_and_retrieval_do_not_load_jax():
    names = [name for name, _ in modules("rlrag") if within(name, WITHOUT_JAX) and not within(name, WITH_JAX)]
    program = [
        "import importlib, sys",
        f"for name in {[name.removesuffix('.__init__') for name in names]}:",
        "    importlib.import_module(name)",
        "    assert not {'jax', 'jaxlib'} & set(sys.modules), f'importing {name} loads jax'",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_vague_file_names():
    names = {path: path.relative_to(ROOT).with_suffix("").parts for _, path in modules(*ROOMS, "tests")}
    vague = [path for path, parts in names.items() if VAGUE & {word for part in parts for word in part.split("_")}]
    report([f"{_shown(path)}: name it by the noun it defines" for path in vague])


def test_no_long_files():
    lengths = {path: len(path.read_text().splitlines()) for _, path in modules(*ROOMS, "tests")}
    report([f"{_shown(path)}: {n} lines, at most {MOST_LINES}" for path, n in lengths.items() if n > MOST_LINES])


def test_every_module_has_its_test_file():
    missing = []
    for _, path in modules("kernels", "rlrag", "launch"):
        shown, folder = _shown(path), path.parent.relative_to(ROOT)
        mirror = ROOT / "tests" / (folder.relative_to("rlrag") if folder.is_relative_to("rlrag") else folder)
        test = mirror / f"test_{path.stem}.py"
        if folder.as_posix() in TESTED_TOGETHER:
            test = mirror.parent / f"test_{folder.name}.py"
        test = ROOT / TESTED_WITH.get(shown, _shown(test))
        if path.stem != "__init__" and not test.exists():
            missing.append(f"{shown}: no {_shown(test)}")
    gone = [path for path in TESTED_WITH if not (ROOT / path).exists()]
    report(missing + [f"TESTED_WITH names {path}, which is not there" for path in gone])


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# The checks themselves, on sources made up for them.


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("kernels.bench", "import rlrag.batch", "rlrag.batch"),
        ("kernels.token_stats", "import numpy as np", "numpy"),
        ("kernels.log_prob.__init__", "from ...rlrag import batch", "rlrag.batch"),
        ("rlrag.__init__", "from rlrag import batch", "rlrag.batch"),
        ("rlrag.agents.search", "def f():\n    import jax.numpy as jnp", "jax.numpy"),
        ("rlrag.agents.search", "from ..model.transformer import trunk", "rlrag.model.transformer.trunk"),
        ("rlrag.agents.__init__", "from . import search\nfrom .. import train", "rlrag.train"),
        ("rlrag.rollout.engine", "from rlrag.agents import search", "rlrag.agents.search"),
        ("rlrag.rollout.engine", "import rlrag", "rlrag"),
        ("rlrag.batch", "import flax", "flax"),
        ("rlrag.batch", "from flax import nnx", "flax.nnx"),
        ("rlrag.train", "from absl import logging", "absl.logging"),
        ("rlrag.retrieval.client", "class C:\n    async def f(self):\n        from jax import numpy", "jax.numpy"),
        ("rlrag.data.worlds.multihop", "import tests.conftest", "tests.conftest"),
        ("configs.search_grpo", "if True:\n    from launch import train", "launch.train"),
        ("rlrag.objectives.losses", "import rlrag.model_zoo", "rlrag.model_zoo"),
    ],
)
def test_a_forbidden_import_is_named(module, source, target):
    (line,) = broken_rules(module, source, "x.py")
    assert line.startswith(f"x.py:{len(source.splitlines())}: imports {target}, but ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "kernels.log_prob.api",
            "import math\nfrom . import chunked\nfrom .. import dispatch\nfrom jax import lax",
        ),
        ("rlrag.batch", "import flax.struct\nfrom flax import struct\nfrom flax.struct import dataclass"),
        ("rlrag.rollout.engine", "from rlrag.agents import workflow\nfrom rlrag.agents.workflow import Search"),
        ("rlrag.model.hf", "import safetensors"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert broken_rules(module, source, "x.py") == []


def test_a_module_without_a_rule_is_named():
    (line,) = broken_rules("rlrag.novelty.thing", "", "rlrag/novelty/thing.py")
    assert line.startswith("rlrag/novelty/thing.py:1: ")
    assert "rlrag.novelty.thing" in line


def test_core_paths_are_followed_through_packages_and_not_into_functions():
    sources = {
        "rlrag.model.attention": "from rlrag.mesh import constrain\ndef f():\n    import rich",
        "rlrag.mesh": "import jax, os",
        "rlrag.model.__init__": "from . import hf",
        "rlrag.model.hf": "\nimport transformers",
    }
    (line,) = beyond_core("rlrag.model.attention", sources)
    assert line.endswith("imports transformers in rlrag.model.hf:2")
