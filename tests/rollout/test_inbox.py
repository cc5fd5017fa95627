"""One round of the device program, its inbox written by hand, against the training trunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.mesh import make_mesh
from rlrag.model.decoding import pack
from rlrag.model.transformer import trunk
from rlrag.rollout.advance import ENDED, LIMITED, STOPPED, Decode, Inbox, Prefill, Spec, build_advance, empty_cache
from rlrag.rollout.sampling import Controls
from tests.rollout.rehearsal import ARCHITECTURE, parameters

SPEC = Spec(
    num_slots=4, num_pages=20, page_size=4, max_tokens=24, burst=5, prefill_rows=3, prefill_chunk=6, prefill_chunks=4,
    num_kept=4,
)  # fmt: skip
END = 63
UNWRITTEN = 1e9
PROMPTS = [list(range(5, 16)), [40, 3, 3, 21], [17, 50]]  # 11, 4 and 2 tokens
PAGES = [[13, 2, 8, 19, 0, 7], [5, 11, 3], [18, 6]]


@pytest.fixture(scope="module")
def program():
    params = parameters()
    mesh = make_mesh(devices=jax.devices()[:1])
    advance = build_advance(SPEC, ARCHITECTURE, END, mesh)
    weights = pack(params, ARCHITECTURE)

    def run(inbox: Inbox, stops=None, accepting=None):
        # A number that would be seen in every result stands wherever nothing was written.
        empty = empty_cache(ARCHITECTURE, SPEC, mesh)
        cache = jax.tree.map(lambda store: jnp.full_like(store, UNWRITTEN), empty)
        table = np.zeros((4, 64), np.int16) if stops is None else stops
        ends = np.zeros(4, bool) if accepting is None else accepting
        return advance(weights, cache, inbox, table, ends, jax.random.key(3))

    return run


def write_inbox(limits=(5, 3, 0), temperature=0.0, allowed=(), once=False) -> Inbox:
    """Cache every prompt but its newest token, then decode: prompt i in slot i + 1; slot 0 idles."""
    J, R, C, n = SPEC.prefill_chunks, SPEC.prefill_rows, SPEC.prefill_chunk, SPEC.pages_per_stream
    prefill = Prefill(
        np.zeros((J, R, C), np.int32), np.zeros((J, R), np.int32), np.zeros((J, R), np.int32),
        np.zeros((J, R, n), np.int32), None, np.array([2], np.int32),
    )  # fmt: skip
    controls = Controls(
        np.full(4, temperature, np.float32),
        np.zeros(4, np.int32),
        np.ones(4, np.float32),
        np.full((4, 4), -1, np.int32),
    )
    token, position, limit, stop_state = (np.zeros(4, np.int32) for _ in range(4))
    streams = np.arange(4, dtype=np.uint32)
    decode = Decode(
        token, position, limit, np.zeros((4, n), np.int32), stop_state, streams, np.full(4, once),
        np.array([1, 2, 3, 0]), np.array([3]), np.array([99]), None, controls,
    )  # fmt: skip
    for row, (prompt, pages) in enumerate(zip(PROMPTS, PAGES)):
        for j, start in enumerate(range(0, len(prompt) - 1, C)):
            piece = prompt[start : min(start + C, len(prompt) - 1)]
            prefill.tokens[j, row, : len(piece)], prefill.count[j, row] = piece, len(piece)
            prefill.start[j, row] = start
            prefill.table[j, row, : len(pages)] = pages
        slot = row + 1
        decode.token[slot], decode.position[slot], decode.limit[slot] = prompt[-1], len(prompt) - 1, limits[row]
        decode.table[slot, : len(pages)] = pages
        decode.controls.allowed[slot, : len(allowed)] = allowed
    return Inbox(prefill, decode)


@pytest.fixture(scope="module")
def greedy():
    """Greedy continuations and their log-probs, the whole stream through the trunk for every token."""
    params = parameters()

    @jax.jit
    def logits(tokens, length):
        at = jnp.arange(24)[None]
        hidden = trunk(params, ARCHITECTURE, tokens, at, (at < length).astype(jnp.int32), jnp.zeros((1, 2), jnp.int32))
        return hidden[0, length - 1] @ params.output_head.T

    def follow(prompt, count):
        tokens, logp = list(prompt), []
        for _ in range(count):
            row = np.zeros((1, 24), np.int32)
            row[0, : len(tokens)] = tokens
            z = np.asarray(logits(row, len(tokens)), np.float64)
            tokens.append(int(z.argmax()))
            logp.append(z.max() - np.log(np.exp(z - z.max()).sum()) - z.max())
        return tokens[len(prompt) :], logp

    return follow


def test_chunks_pages_and_decoding_equal_the_trunk(program, greedy):
    cache, out = program(write_inbox())
    assert out.count.tolist() == [0, 5, 3, 0]
    assert out.reason.tolist() == [LIMITED, LIMITED, LIMITED, LIMITED]
    assert out.steps.tolist() == [5]
    for slot, prompt in enumerate(PROMPTS[:2], start=1):
        tokens, logp = greedy(prompt, int(out.count[slot]))
        assert out.tokens[slot, : len(tokens)].tolist() == tokens
        np.testing.assert_allclose(out.logp[slot, : len(tokens)], logp, atol=1e-5)
    # Written: every prompt but its newest token, and what a slot emitted but its newest. Nothing else.
    written = np.zeros(SPEC.num_pages * SPEC.page_size, bool)
    for prompt, pages, emitted in zip(PROMPTS, PAGES, (5, 3, 0)):
        for position in range(len(prompt) - 1 + emitted):
            written[pages[position // 4] * 4 + position % 4] = True
    for leaf in [*cache.keys, *cache.values]:
        np.testing.assert_array_equal((leaf != UNWRITTEN).all((0, 2)), written)
        assert (np.asarray(leaf)[:, ~written] == UNWRITTEN).all()


def test_stops_ends_and_limits_are_told_apart(program, greedy):
    tokens, _ = greedy(PROMPTS[0], 5)
    stops = np.zeros((4, 64), np.int16)
    stops[0, tokens[2]] = 2
    stops[2] = 2
    _, out = program(write_inbox(), stops, np.array([False, False, True, False]))
    first = tokens.index(tokens[2]) + 1
    assert (int(out.reason[1]), int(out.count[1]), int(out.stop_state[1])) == (STOPPED, first, 2)

    allowed = write_inbox(allowed=(END,))
    _, out = program(allowed)
    assert (int(out.reason[1]), int(out.count[1])) == (ENDED, 1)


def test_struck_ids_are_emitted_once(program):
    for seed in range(3):
        inbox = write_inbox(limits=(4, 4, 4), temperature=5.0, allowed=(9, 20, 31, 2), once=True)
        inbox.decode.stream[:] = np.arange(4) + 10 * seed
        _, out = program(inbox)
        for slot in (1, 2, 3):
            assert sorted(out.tokens[slot, :4].tolist()) == [2, 9, 20, 31]
            sizes = (np.asarray(out.kept[slot, :4]) >= 0).sum(-1)
            assert sizes.tolist() == [4, 3, 2, 1]
            assert float(out.logp[slot, 3]) == pytest.approx(0, abs=1e-6)


def test_samples_depend_on_stream_and_position_alone(program):
    """Not on the slot, nor on what else is in the batch."""
    inbox = write_inbox(limits=(5, 5, 5), temperature=1.5)
    _, out = program(inbox)
    moved = jax.tree.map(np.copy, inbox)
    for field in jax.tree.leaves(moved.decode._replace(fresh=None, num_fresh=None, patience=None)):
        field[[0, 1]] = field[[1, 0]]
    moved.decode.fresh[:3] = 0, 2, 3
    moved.decode.limit[3] = 0
    _, other = program(moved)
    assert other.tokens[0].tolist() == out.tokens[1].tolist()
    assert other.tokens[2].tolist() == out.tokens[2].tolist()
    inbox.decode.stream[1] = 77
    _, renamed = program(inbox)
    assert renamed.tokens[1].tolist() != out.tokens[1].tolist()
