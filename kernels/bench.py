"""Time and memory of every implementation on this device: ``python -m kernels.bench [--quick | --full]``.

On CPU the default is the demo's shapes and those of real models scaled down; on an accelerator it is the real shapes.
Implementations of one row are timed in turn within one loop, so that a slow minute of a shared machine hits all alike.
"""

import argparse
import datetime
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import arg_specs, dispatch
from kernels.advantage import api as advantage_api
from kernels.arg_specs import HeadSpec, RecurrenceSpec
from kernels.log_prob import api as log_prob_api
from kernels.uncertainty import api as uncertainty_api
from kernels.uncertainty.filters import Filters


class Case(NamedTuple):
    """One operation at one shape: how to call it with an implementation, and its least possible work."""

    operation: str
    shape: str
    functions: dict[str, Callable]  # implementation -> function of the arguments
    arguments: tuple
    flops: float  # 0: the operation is bound by memory
    moved_bytes: float  # inputs read once and outputs written once; 0: bound by arithmetic


class Row(NamedTuple):
    """What was measured of one implementation."""

    operation: str
    implementation: str
    shape: str
    median_s: float
    min_s: float
    rate: str
    temporary_bytes: int


def measure(case: Case, repeats: int) -> list[Row]:
    """Time every implementation of a case, interleaved; compilation and one warm-up call excluded."""
    compiled = {name: jax.jit(call).lower(*case.arguments).compile() for name, call in case.functions.items()}
    for call in compiled.values():
        jax.block_until_ready(call(*case.arguments))
    seconds = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, call in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(*case.arguments))
            seconds[name].append(time.perf_counter() - begin)
    rows = []
    for name, call in compiled.items():
        median, least = statistics.median(seconds[name]), min(seconds[name])
        memory = call.memory_analysis()
        temporary = memory.temp_size_in_bytes if memory is not None else 0
        rows.append(Row(case.operation, name, case.shape, median, least, _rate(case, median), temporary))
    return rows


def _rate(case: Case, seconds: float) -> str:
    if case.flops:
        return f"{case.flops / seconds / 1e9:,.0f} GFLOP/s"
    return f"{case.moved_bytes / seconds / 1e9:,.1f} GB/s"


def _runs_here(table: dict[str, dispatch.Implementation], platform: str) -> Iterator[str]:
    return (name for name, entry in table.items() if platform in entry.platforms)


def log_prob_cases(spec: HeadSpec, dtype: Any, num_wanted: int, platform: str) -> Iterator[Case]:
    """Forward, and forward with backward, of token_stats; 2 N D V flops a product, one forward and three backward."""
    tokens, hidden, vocabulary = spec.tokens, spec.hidden, spec.vocabulary
    rows = min(16, tokens)
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.random.normal(keys[0], (rows, tokens // rows, hidden), dtype)
    head = (jax.random.normal(keys[1], (vocabulary, hidden)) * hidden**-0.5).astype(dtype)
    ids = jax.random.randint(keys[2], (rows, tokens // rows, num_wanted), 0, vocabulary)
    shape = f"{spec.name}: N={tokens} D={hidden} V={vocabulary} K={num_wanted} {jnp.dtype(dtype).name}"

    def forward(name: str) -> Callable:
        return lambda states, head, ids: log_prob_api.token_stats(states, head, ids, implementation=name)

    def total(name: str) -> Callable:
        def scalar(states: jax.Array, head: jax.Array, ids: jax.Array) -> jax.Array:
            stats = forward(name)(states, head, ids)
            return (stats.logits.sum(-1) - stats.lse + stats.entropy + stats.certainty).sum()

        return jax.grad(scalar, (0, 1))

    names = list(_runs_here(log_prob_api.IMPLEMENTATIONS, platform))
    product = 2.0 * states[..., 0].size * hidden * vocabulary
    arguments = (states, head, ids)
    yield Case("log_prob fwd", shape, {name: forward(name) for name in names}, arguments, product, 0)
    yield Case("log_prob fwd+bwd", shape, {name: total(name) for name in names}, arguments, 4 * product, 0)


def uncertainty_case(spec: HeadSpec, filtered: bool, platform: str) -> Case:
    """One decode step's draw and report, top-k 20 and top-p 0.95 where filtered; its least work is one read."""
    slots, vocabulary = spec.slots, spec.vocabulary
    logits = jax.random.normal(jax.random.key(0), (slots, vocabulary)) * 3
    uniform, temperature = jax.random.uniform(jax.random.key(1), (slots,)), jnp.full(slots, 0.7)
    allowed = jnp.full((slots, 32 if filtered else 0), -1)
    filters = Filters(jnp.full(slots, 20 * filtered), jnp.full(slots, 0.95 if filtered else 1.0), allowed)

    def draw(name: str) -> Callable:
        return lambda *arguments: uncertainty_api.sample(*arguments, masked=False, implementation=name)

    functions = {name: draw(name) for name in _runs_here(uncertainty_api.IMPLEMENTATIONS, platform)}
    shape = f"{spec.name}: B={slots} V={vocabulary}{' top-k 20, top-p 0.95' if filtered else ''}"
    return Case("uncertainty", shape, functions, (logits, uniform, temperature, filters), 0, 4.0 * logits.size)


def advantage_case(spec: RecurrenceSpec, platform: str) -> Case:
    """GAE; its least work is reading rewards, values, actions and segments and writing advantages and targets."""
    rewards, values = jax.random.normal(jax.random.key(0), (2, spec.rows, spec.tokens))
    act = jnp.ones(rewards.shape, jnp.int32)
    segment = jnp.broadcast_to(1 + jnp.arange(spec.tokens) // 512, rewards.shape)

    def gae(name: str) -> Callable:
        return functools.partial(advantage_api.gae, gamma=0.99, lam=0.95, implementation=name)

    functions = {name: gae(name) for name in _runs_here(advantage_api.IMPLEMENTATIONS, platform)}
    arguments = (rewards, values, act, segment)
    return Case("advantage", f"{spec.name}: B={spec.rows} T={spec.tokens}", functions, arguments, 0, 24.0 * act.size)


def cases(size: str, platform: str) -> Iterator[Case]:
    """The cases of a size: "quick" (seconds, for tests), "scaled" (CPU) or "full" (real shapes)."""
    if size == "quick":
        heads, recurrences = [arg_specs.DEMO.scaled(8)], [arg_specs.RECURRENCES[0]]
    elif size == "scaled":
        heads = [arg_specs.DEMO, arg_specs.HEADS[0].scaled(16), arg_specs.HEADS[4].scaled(16)]
        recurrences = arg_specs.RECURRENCES[:2]
    else:
        heads, recurrences = [arg_specs.DEMO, *arg_specs.HEADS], arg_specs.RECURRENCES
    for index, spec in enumerate(heads):
        yield from log_prob_cases(spec, jnp.float32 if platform == "cpu" else jnp.bfloat16, 1, platform)
        if index == 0 and size != "quick":
            yield from log_prob_cases(spec, jnp.float32, 32, platform)
            yield from log_prob_cases(spec, jnp.bfloat16, 1, platform)
        for filtered in (False, True):
            yield uncertainty_case(spec, filtered, platform)
    for spec in recurrences:
        yield advantage_case(spec, platform)


def header(arguments: list[str], size: str, repeats: int) -> str:
    """Device, JAX version, date and command: no number is printed without them."""
    device = jax.devices()[0]
    return (
        f"device   {device.device_kind} ({device.platform}), {jax.device_count()} device(s), {os.cpu_count()} cores\n"
        f"versions jax {jax.__version__}, python {sys.version.split()[0]}\n"
        f"date     {datetime.datetime.now().astimezone().isoformat(timespec='minutes')}\n"
        f"command  python -m kernels.bench {' '.join(arguments)}".rstrip()
        + "\n"
        f"shapes   {size}, median and min of {repeats} calls, rates from the median and the least possible work"
    )


def table_line(row: Row) -> str:
    """One line of the table."""
    times = f"{row.median_s * 1e3:>10.3f} {row.min_s * 1e3:>10.3f}"
    temporary = f"{row.temporary_bytes / 2**20:>10.2f}"
    return f"{row.operation:<17} {row.implementation:<22} {times} {row.rate:>16} {temporary}  {row.shape}"


def main(arguments: list[str]) -> None:
    """Parse the command line and print the table, a line as soon as it is measured."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Times every kernel implementation.")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds")
    parser.add_argument("--full", action="store_true", help="real shapes, the default on an accelerator")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each implementation")
    options = parser.parse_args(arguments)
    platform = dispatch.current_platform()
    default = "scaled" if platform == "cpu" else "full"
    size = "quick" if options.quick else "full" if options.full else default
    print(header(arguments, size, options.repeats))
    titles = f"{'median ms':>10} {'min ms':>10} {'rate':>16} {'temp MiB':>10}"
    print(f"\n{'operation':<17} {'implementation':<22} {titles}  shape")
    for case in cases(size, platform):
        for row in measure(case, options.repeats):
            print(table_line(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
