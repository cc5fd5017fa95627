"""The environment every test runs in, and processes with several devices."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Set before anything imports jax, and inherited by the processes that tests start. `JAX_PLATFORMS=cuda pytest ...`
# runs the tests on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("MPLBACKEND", "Agg")
# XLA has as many threads as there are cores, or this many: the interpreters of kernels run each warpgroup on one of
# them, and where there are fewer those wait for each other for ever.
os.environ.setdefault("NPROC", "8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download something fails at once

# The filterwarnings of pyproject.toml for a process of its own.
STRICT = (
    *("-W", "error"),
    *("-W", "ignore:Error reading persistent compilation cache entry:UserWarning"),
    *("-W", "ignore:Error writing persistent compilation cache entry:UserWarning"),
)


# Most of the suite's time would be LLVM's, at programs that run for milliseconds. It rounds twice where it would once
# (a product that is added): where roundings are measured, `run_on_devices(..., optimised=True)` is without it.
QUICK = "--xla_backend_optimization_level=0"
if os.environ["JAX_PLATFORMS"] == "cpu" and "optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

# What takes longest comes first: at the end workers deal out what is left among themselves, and that should be small.
FIRST = (
    "tests/test_processes.py",
    "tests/test_compilation.py",
    "tests/test_survey.py",
    "tests/test_train_adapters.py",
    "tests/launch/test_plan.py",
    "tests/launch/test_study.py",
    "tests/retrieval/test_service.py",
    "tests/configs/test_multihop.py",
    "tests/test_convert.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(name) if (name := item.nodeid.partition("::")[0]) in FIRST else len(FIRST))


@pytest.fixture
def run_on_devices() -> Callable[..., str]:
    """Run a module-level function, a script (Path) or source (str) in its own process with n virtual CPU devices.

    Returns what it printed; a failure shows that, and the end of its standard error. One process has one number of
    devices for life, so a test that wants another number needs another process. optimised: compiled as for users.
    """

    def run(
        what: Callable[[], object] | Path | str, n: int = 8, *, timeout_s: float = 300, optimised: bool = False
    ) -> str:
        if isinstance(what, Path):
            command = [str(what)]
        elif isinstance(what, str):
            command = ["-c", what]
        else:
            command = ["-c", f"from {what.__module__} import {what.__name__} as run\nrun()"]
        others = os.environ.get("XLA_FLAGS", "").replace(QUICK, "" if optimised else QUICK)
        flags = f"{others} --xla_force_host_platform_device_count={n}".strip()
        done = subprocess.run(
            [sys.executable, *STRICT, *command],
            cwd=REPOSITORY,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if done.returncode:
            shown = f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
            pytest.fail(f"{command[-1]} with {n} devices ended with status {done.returncode}:\n{shown}", pytrace=False)
        return done.stdout

    return run
