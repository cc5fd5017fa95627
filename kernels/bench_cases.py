"""The operations at the shapes at which they are timed, with every implementation that runs here.

A new entry of a dispatch table is in the cases by being in the table. Sizes of cases: "quick" (seconds, for tests),
"scaled" (real models' shapes made smaller, for CPU), "full" (real shapes), and "issue" (4,096 tokens of a vocabulary of
32k and of 152k entries: what the chunked implementation promises against full logits is measured there).
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels import arg_specs, dispatch
from kernels.advantage import api as advantage_api
from kernels.arg_specs import DecodeSpec, HeadSpec, RecurrenceSpec
from kernels.decode_attention import api as decode_attention_api
from kernels.log_prob import api as log_prob_api
from kernels.measurement import Case
from kernels.uncertainty import api as uncertainty_api
from kernels.uncertainty.filters import Filters

OPERATIONS = ("log_prob", "uncertainty", "advantage", "decode_attention")
SIZES = ("quick", "scaled", "full", "issue")
# Where the reference's full logits, several of them in the backward pass, would take more than this, it is left out and
# "chunked", which is the reference a chunk at a time, is what the others are checked against.
FULL_LOGITS_BYTES = 6e9
ISSUE_HEADS = tuple(
    HeadSpec("width of the demo", hidden=256, vocabulary=vocabulary, tied=True, tokens=4096, slots=64)
    for vocabulary in (32_768, 151_936)
)
ISSUE_RECURRENCE = RecurrenceSpec("4k window", rows=64, tokens=4096)


class Sized(NamedTuple):
    """What a size of cases is made of."""

    heads: Sequence[HeadSpec]
    recurrences: Sequence[RecurrenceSpec]
    attention: Sequence[DecodeSpec]


def sized(size: str) -> Sized:
    heads, decodes, recurrences = arg_specs.HEADS, arg_specs.DECODES, arg_specs.RECURRENCES
    if size == "quick":
        return Sized([arg_specs.DEMO.scaled(8)], recurrences[:1], [decodes[0].scaled(32)])
    if size == "issue":
        return Sized(ISSUE_HEADS, [ISSUE_RECURRENCE], [])
    if size == "scaled":
        return Sized(
            [arg_specs.DEMO, heads[0].scaled(16), heads[4].scaled(16)], recurrences[:2], [decodes[1].scaled(4)]
        )
    # Where time is short the first are measured: those that most is trained with.
    first = [heads[number] for number in (1, 2, 0)]
    each = [*first, *(head._replace(tokens=4096) for head in first), *heads[3:]]
    return Sized(each, recurrences, [decodes[number] for number in (1, 2, 0, 3, 4)])


def cases(size: str, platform: str, only: Sequence[str] = OPERATIONS) -> Iterator[Case]:
    """The cases of a size, of these operations, one at a time: their arrays are made when they are asked for."""
    of, dtype = sized(size), "float32" if platform == "cpu" else "bfloat16"
    if "advantage" in only:
        for spec in of.recurrences:
            for num_groups in (0, 64):
                yield advantage_case(spec, platform, num_groups)
    if "uncertainty" in only:
        for spec in dict.fromkeys(head._replace(tokens=0) for head in of.heads):
            yield from uncertainty_cases(spec, platform)
    if "decode_attention" in only:
        for spec in of.attention:
            yield decode_attention_case(spec, dtype, platform)
    if "log_prob" in only:
        for backward in (True, False):
            for number, spec in enumerate(of.heads):
                yield log_prob_case(spec, dtype, 1, platform, backward, alone=size == "issue")
                if number == 0 and size == "scaled":
                    yield log_prob_case(spec, "float32", 32, platform, backward)
                    yield log_prob_case(spec, "bfloat16", 1, platform, backward)


def runs_here(table: dict[str, dispatch.Implementation], platform: str) -> Iterator[str]:
    return (name for name, entry in table.items() if platform in entry.platforms)


def optional(module: str) -> Any:
    """A module of this package, or None where there is none of that name."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return None
        raise


# -- operations -------------------------------------------------------------------------------------------------------


def log_prob_case(
    spec: HeadSpec, dtype: str, num_wanted: int, platform: str, backward: bool, alone: bool = False
) -> Case:
    """token_stats, or the log-prob alone, without or with its gradient; 2 N D V flops a product, one forward and three
    backward, of which one computes the logits again."""
    tokens, hidden, vocabulary = spec.tokens, spec.hidden, spec.vocabulary
    rows = min(16, tokens)
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.random.normal(keys[0], (rows, tokens // rows, hidden), dtype)
    head = (jax.random.normal(keys[1], (vocabulary, hidden)) * hidden**-0.5).astype(dtype)
    ids = jax.random.randint(keys[2], (rows, tokens // rows, num_wanted), 0, vocabulary)
    shape = f"{spec.name}: N={tokens} D={hidden} V={vocabulary} K={num_wanted} {dtype}"

    def forward(name: str) -> Callable:
        if alone:
            return lambda states, head, ids: log_prob_api.log_prob(states, head, ids[..., 0], implementation=name)
        return lambda states, head, ids: log_prob_api.token_stats(states, head, ids, implementation=name)

    def gradient(function: Callable) -> Callable:
        def scalar(states: jax.Array, head: jax.Array, ids: jax.Array) -> jax.Array:
            found = function(states, head, ids)
            if alone:
                return found.mean()
            return (found.logits.sum(-1) - found.lse + found.entropy + found.certainty).mean()

        return jax.value_and_grad(scalar, (0, 1))

    names = list(runs_here(log_prob_api.IMPLEMENTATIONS, platform))
    against = "reference"
    if 4.0 * tokens * vocabulary > FULL_LOGITS_BYTES:
        against = "chunked"
        names.remove("reference")
    functions = {name: forward(name) for name in names}
    if (naive := optional("kernels.log_prob.naive")) is not None:
        log_prob = naive.log_prob
        functions["naive"] = (lambda x, head, ids: log_prob(x, head, ids[..., 0])) if alone else naive.token_stats
    baseline = "naive" if "naive" in functions else "reference"
    product = 2.0 * states[..., 0].size * hidden * vocabulary
    shared: dict[str, Any] = {"against": against, "baseline": baseline, "dtype": dtype}
    arguments = (states, head, ids)
    if not backward:
        return Case("log_prob fwd", shape, functions, arguments, product, 0, **shared)
    both = {name: gradient(function) for name, function in functions.items()}
    return Case("log_prob fwd+bwd", shape, both, arguments, 4 * product, 0, **shared)


def uncertainty_cases(spec: HeadSpec, platform: str) -> Iterator[Case]:
    """One decode step's draw and report, without filters and with top-k 20 and top-p 0.95; its least work is one read
    of the logits. Tokens are not compared: two right ones differ where a sum rounds past the number that was drawn."""
    slots, vocabulary = spec.slots, spec.vocabulary
    logits = jax.random.normal(jax.random.key(0), (slots, vocabulary)) * 3
    uniform, temperature = jax.random.uniform(jax.random.key(1), (slots,)), jnp.full(slots, 0.7)

    def draw(name: str) -> Callable:
        return lambda *arguments: uncertainty_api.sample(*arguments, masked=False, implementation=name)

    functions = {name: draw(name) for name in runs_here(uncertainty_api.IMPLEMENTATIONS, platform)}
    for filtered in (False, True):
        allowed = jnp.full((slots, 32 if filtered else 0), -1)
        filters = Filters(jnp.full(slots, 20 * filtered), jnp.full(slots, 0.95 if filtered else 1.0), allowed)
        shape = f"{spec.name}: B={slots} V={vocabulary}{' top-k 20, top-p 0.95' if filtered else ''}"
        yield Case(
            "uncertainty", shape, functions, (logits, uniform, temperature, filters), 0, 4.0 * logits.size,
            compared=lambda drawn: (drawn.entropy, drawn.certainty, drawn.margin),
        )  # fmt: skip


def advantage_case(spec: RecurrenceSpec, platform: str, num_groups: int = 0) -> Case:
    """GAE, without and with statistics of groups, of which a row has one or two; its least work is reading rewards,
    values, actions, segments (and groups) and writing advantages and targets."""
    rewards, values = jax.random.normal(jax.random.key(0), (2, spec.rows, spec.tokens))
    act = jnp.ones(rewards.shape, jnp.int32)
    segment = jnp.broadcast_to(1 + jnp.arange(spec.tokens) // 512, rewards.shape)

    place = jnp.arange(act.size).reshape(act.shape)
    group = place * num_groups // act.size if num_groups else None

    def gae(name: str) -> Callable:
        return lambda rewards, values, act, segment, group: advantage_api.gae(
            rewards, values, act, segment, 0.99, 0.95, group=group, num_groups=num_groups, implementation=name
        )

    functions = {name: gae(name) for name in runs_here(advantage_api.IMPLEMENTATIONS, platform)}
    shape = f"{spec.name}: B={spec.rows} T={spec.tokens}{f' in {num_groups} groups' if num_groups else ''}"
    moved = (28.0 if num_groups else 24.0) * act.size
    return Case("advantage", shape, functions, (rewards, values, act, segment, group), 0, moved)


def decode_attention_case(spec: DecodeSpec, dtype: str, platform: str) -> Case:
    """One layer of one decode step; its least work is one read of the keys and values that slots see."""
    page = 16
    pages = -(-spec.longest // page)
    keys = jax.random.split(jax.random.key(0), 5)
    query = jax.random.normal(keys[0], (spec.slots, spec.heads, spec.head_dim), dtype)
    store = spec.kv_heads, spec.slots * pages * page, spec.head_dim
    cached = [jax.random.normal(key, store, dtype) for key in keys[1:3]]
    # Pages lie as they came free: anywhere.
    table = jax.random.permutation(keys[3], spec.slots * pages).reshape(spec.slots, pages).astype(jnp.int32)
    length = jax.random.randint(keys[4], (spec.slots,), spec.shortest, spec.longest + 1)
    seen = float(length.sum())

    def attention(name: str) -> Callable:
        return functools.partial(decode_attention_api.decode_attention, page_size=page, implementation=name)

    names = runs_here(decode_attention_api.IMPLEMENTATIONS, platform)
    shape = f"{spec.name}: B={spec.slots} N={spec.heads} K={spec.kv_heads} H={spec.head_dim} S={seen / spec.slots:.0f}"
    return Case(
        "decode_attention", f"{shape} {dtype}", {name: attention(name) for name in names},
        (query, *cached, table, length), 4.0 * spec.heads * spec.head_dim * seen,
        2.0 * spec.kv_heads * spec.head_dim * seen * jnp.dtype(dtype).itemsize, dtype=dtype,
    )  # fmt: skip
