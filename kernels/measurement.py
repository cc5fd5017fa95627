"""Time, memory and correctness of the implementations of one operation at one shape, timed in turn in one loop.

A slow minute of a shared machine then hits all alike, and the ceilings, which are sampled in the same loop, too. One
that does not build, or whose numbers are wrong, is told as failed and does not stop the others.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.ceilings import Ceilings

SHORT_S = 2e-3  # on an accelerator shorter calls are timed many at once: the host takes some 20 us to start one
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of the largest entry; the shapes are large, so rounding adds up


class Case(NamedTuple):
    """One operation at one shape: how to call it with each implementation, and its least possible work."""

    operation: str
    shape: str
    functions: dict[str, Callable]  # implementation -> function of the arguments
    arguments: tuple
    flops: float  # of its matrix products; 0: it has none worth counting
    moved_bytes: float  # inputs read once and outputs written once; 0: not what bounds it
    against: str = "reference"  # the implementation that the others are checked against
    baseline: str = "reference"  # the implementation whose time and memory the others' are divided by
    dtype: str = "float32"  # of the inputs, which the tolerance depends on
    compared: Callable[[Any], Any] = lambda out: out  # what of the outputs must agree


class Row(NamedTuple):
    """What was measured of one implementation; nan: not known."""

    operation: str
    implementation: str
    shape: str
    error: str = ""  # why the rest is not to be relied on
    median_s: float = float("nan")
    min_s: float = float("nan")
    rate: float = float("nan")  # least possible work a second: FLOP/s where it is bound by "matrix", else bytes/s
    bound: str = "matrix"
    ceiling: float = float("nan")  # of this device in the same loop, in the same unit
    temporary_bytes: float = float("nan")  # beyond inputs and outputs, as the compiler says
    peak_bytes: int = 0  # that the device has held at most since the process began; 0: the platform does not say
    check: float = float("nan")  # largest difference to `against`, as a share of the largest entry there
    time_ratio: float = float("nan")  # to the baseline, median over rounds
    memory_ratio: float = float("nan")  # of temporary bytes to the baseline's
    compile_s: float = float("nan")

    @property
    def share(self) -> float:
        return self.rate / self.ceiling


class Built(NamedTuple):
    call: Callable  # of the arguments, once
    repeated: Callable  # of the arguments, `inner` times
    inner: int


class Tried(NamedTuple):
    """What became of an implementation before any timing."""

    built: Built | None
    temporary_bytes: float  # known where it compiled, even if it did not run
    compile_s: float
    error: str


def measure(
    case: Case, repeats: int, ceilings: Ceilings, deadline: float = float("inf"), note: Callable[[str], Any] = str
) -> list[Row]:
    """A row for every implementation of a case. deadline: of time.monotonic, after which no further round is timed;
    there is at least one. note: is told the name of each before it runs for the first time, and of none after that."""
    tried = {}
    for name, function in case.functions.items():
        note(name)
        tried[name] = attempt(function, case.arguments)
    note("")
    built = {name: each.built for name, each in tried.items() if each.built is not None}
    checks = check(case, built)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for number in range(repeats):
        if number and time.monotonic() > deadline:
            break
        ceilings.sample()
        for name, (_, repeated, inner) in built.items():
            begin = time.perf_counter()
            jax.block_until_ready(repeated(*case.arguments))
            seconds[name].append((time.perf_counter() - begin) / inner)
    return [row(case, name, each, seconds, checks, tried, ceilings) for name, each in tried.items()]


def row(case: Case, name: str, own: Tried, seconds: dict, checks: dict, tried: dict, ceilings: Ceilings) -> Row:
    base = tried.get(case.baseline)
    memory = own.temporary_bytes / base.temporary_bytes if base and base.temporary_bytes else float("nan")
    found = Row(
        case.operation, name, case.shape, own.error, temporary_bytes=own.temporary_bytes, peak_bytes=peak_bytes(),
        memory_ratio=memory, compile_s=own.compile_s,
    )  # fmt: skip
    if name not in seconds:
        return found
    by_matrix = case.flops / ceilings.flops >= case.moved_bytes / ceilings.bandwidth
    median, apart = statistics.median(seconds[name]), checks.get(name, float("nan"))
    wrong = name in checks and not apart <= TOLERANCE.get(case.dtype, 1e-3)
    ratios = [mine / its for mine, its in zip(seconds[name], seconds.get(case.baseline, []))]
    return found._replace(
        error="wrong numbers" if wrong else "",
        median_s=median,
        min_s=min(seconds[name]),
        rate=(case.flops if by_matrix else case.moved_bytes) / median,
        bound="matrix" if by_matrix else "bandwidth",
        ceiling=ceilings.flops if by_matrix else ceilings.bandwidth,
        check=apart,
        time_ratio=statistics.median(ratios) if ratios else float("nan"),
    )


def attempt(function: Callable, arguments: tuple) -> Tried:
    """Compile and run once; whatever goes wrong is told in one line, be it a compiler's error, a kernel's or memory."""
    temporary, compile_s, begin = float("nan"), float("nan"), time.perf_counter()
    try:
        compiled = jax.jit(function).lower(*arguments).compile()
        compile_s = time.perf_counter() - begin
        memory = compiled.memory_analysis()
        temporary = float(memory.temp_size_in_bytes) if memory is not None else temporary
        return Tried(build(function, compiled, arguments), temporary, compile_s, "")
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        return Tried(None, temporary, compile_s, f"{type(error).__name__}: {told}")


def build(function: Callable, compiled: Callable, arguments: tuple) -> Built:
    """Warm up, and where one call is too short to be timed, put many into one program."""
    jax.block_until_ready(compiled(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    once = time.perf_counter() - begin
    if once > SHORT_S or jax.default_backend() == "cpu":
        return Built(compiled, compiled, 1)
    inner = max(2, min(256, int(5 * SHORT_S / max(once, 1e-6))))
    repeated = jax.jit(functools.partial(again, function, inner)).lower(*arguments).compile()
    jax.block_until_ready(repeated(*arguments))
    return Built(compiled, repeated, inner)


def again(function: Callable, times: int, *arguments: Any) -> jax.Array:
    """`function` run `times` one after another. A barrier ties each turn's inputs to the turn before, and a number of
    each output, read behind another barrier, goes into the result: nothing is moved out of the loop or dropped."""

    def turn(_: int, token: jax.Array) -> jax.Array:
        tied, token = jax.lax.optimization_barrier((arguments, token))
        out = jax.lax.optimization_barrier(function(*tied))
        return token + sum(jnp.ravel(leaf)[0].astype(jnp.float32) for leaf in jax.tree.leaves(out))

    return jax.lax.fori_loop(0, times, turn, jnp.float32(0))


def check(case: Case, built: dict[str, Built]) -> dict[str, float]:
    """Of every other implementation: the largest difference of any output, as a share of the largest entry there."""
    if case.against not in built or len(built) < 2:
        return {}
    right = case.compared(built[case.against].call(*case.arguments))
    others = [name for name in built if name != case.against]
    return {name: float(difference(right, case.compared(built[name].call(*case.arguments)))) for name in others}


@jax.jit
def difference(right: Any, other: Any) -> jax.Array:
    """max over outputs of max |other - right| / max |right|; entries that are not finite must be the same ones."""

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        finite = jnp.isfinite(x)
        same = jnp.all(jnp.where(finite, jnp.isfinite(y), (x == y) | (jnp.isnan(x) & jnp.isnan(y))))
        largest = jnp.max(jnp.where(finite, jnp.abs(x), 0))
        apart = jnp.max(jnp.where(finite, jnp.abs(x - y), 0))
        return jnp.where(same, apart / jnp.maximum(largest, 1e-30), jnp.inf)

    return jnp.max(jnp.stack([one(x, y) for x, y in zip(jax.tree.leaves(right), jax.tree.leaves(other), strict=True)]))


def peak_bytes() -> int:
    """That this process's first device has held at most; 0 where the platform does not say."""
    return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))
