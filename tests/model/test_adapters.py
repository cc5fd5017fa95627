"""Adapters against the model they stand for: the plain one with every addition in its matrices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.model.adapters import Voices, add, addition, silent
from rlrag.model.architecture import TARGETS, Adapters, Architecture
from rlrag.model.parameters import furnished, initialize, learning, merged, part, plain
from rlrag.model.transformer import trunk

A = Architecture(
    vocab_size=48, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20, qkv_bias=True,
    adapters=Adapters(rank=3, alpha=5.0, names="one,two", rows=4),
)  # fmt: skip
DICE = np.random.default_rng(0)
TOKENS = DICE.integers(A.vocab_size, size=(2, 11)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(11), (2, 11))
SEGMENT = np.where(np.arange(11) < 6, 1, 2)[None].repeat(2, 0)
PARENT = np.zeros((2, 3), np.int32)


def spoken(a: Architecture = A, key: int = 0):
    """Adapters that say something."""
    params = initialize(a, jax.random.key(key))
    leaves, tree = jax.tree.flatten(params.adapters)
    keys = jax.random.split(jax.random.key(key + 1), len(leaves))
    leaves = [0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return params.replace(adapters=jax.tree.unflatten(tree, leaves))


def said(params, a, *segments, key=None, tokens=TOKENS):
    """Hidden states, with the coefficients of segments 1 and 2."""
    table = np.array([[0.0] * len(segments[0]), *segments], np.float32) if segments else None
    coefficients = None if table is None else np.broadcast_to(table, (2, *table.shape))
    return np.asarray(trunk(params, a, tokens, POSITIONS, SEGMENT, PARENT, coefficients, key))


def test_each_segment_hears_its_own_adapter():
    params = spoken()
    both = said(params, A, (1, 0), (0, 1))
    bare = replace(plain(A))
    for where, name in ((slice(0, 6), "one"), (slice(6, 11), "two")):
        alone = said(merged(params, A, name), bare)
        np.testing.assert_allclose(both[:, where], alone[:, where], atol=2e-5)
    assert np.abs(both - said(merged(params, A), bare)).max() > 0.1, "they do say something"


def test_coefficients_mix_adapters():
    """Half of each is the model with half of both additions."""
    params = spoken()
    whole = merged(params, A, "one")
    layers = {
        name: getattr(params.layers, name)
        + sum(addition(params.adapters.layers[name], number, A.adapters.scale / 2) for number in (0, 1))
        for name in TARGETS
    }
    mixed = whole.replace(layers=whole.layers.replace(**layers))
    np.testing.assert_allclose(said(params, A, (0.5, 0.5), (0.5, 0.5)), said(mixed, plain(A)), atol=2e-5)


def test_an_addition_is_the_scaled_product():
    low = spoken().adapters.layers["down"]
    down, up = np.asarray(low.down, np.float64), np.asarray(low.up, np.float64)
    np.testing.assert_allclose(addition(low, 1, 5 / 3), 5 / 3 * (down[:, :, 1] @ up[:, 1]), atol=1e-6)


def test_without_adapters_the_base_speaks_bit_by_bit():
    params = initialize(A, jax.random.key(0))
    base = said(initialize(plain(A), jax.random.key(0)), plain(A))
    for off in (params, params.replace(adapters=None), spoken().replace(adapters=silent(spoken().adapters))):
        np.testing.assert_array_equal(said(off, A, (1, 0), (0, 1)), base)
    np.testing.assert_array_equal(said(initialize(A, jax.random.key(0)), A), base)


def test_a_role_trains_its_own_adapter_alone():
    params = spoken()

    def loss(adapters):
        rows = np.array([[[0, 0], [1, 0], [0, 0]]] * 2, np.float32)
        hidden = trunk(params.replace(adapters=adapters), A, TOKENS, POSITIONS, SEGMENT, PARENT, rows)
        return jnp.sum(jnp.sin(hidden))

    gradient = jax.grad(loss)(params.adapters).layers
    for name in TARGETS:
        for leaf, axis in ((gradient[name].down, 2), (gradient[name].up, 1)):
            mine, other = np.split(np.asarray(leaf), 2, axis)
            assert np.abs(mine).max() > 0, name
            assert (other == 0).all(), name


def test_newest_rows_learn_and_no_others():
    params = spoken()
    changed = params.replace(embed=params.embed.at[:-4].set(0), adapters=params.adapters)
    np.testing.assert_array_equal(changed.table[:-4], np.zeros((44, 16)))
    np.testing.assert_allclose(params.table[-4:], params.embed[-4:] + params.adapters.rows, atol=1e-7)
    np.testing.assert_array_equal(params.table[:-4], params.embed[:-4])
    np.testing.assert_array_equal(params.output_head, params.table)
    untied = spoken(replace(A, tied=False))
    np.testing.assert_allclose(untied.output_head[-4:], untied.head[-4:] + untied.adapters.head_rows, atol=1e-7)


def test_dropout_drops_inputs_of_additions_and_keeps_their_mean():
    low = jax.tree.map(lambda leaf: leaf[0], spoken().adapters.layers)
    x, y = jax.random.normal(jax.random.key(1), (5, 16)), jnp.ones((5, 24))
    voices = Voices(jnp.array([[1.0, 0.0]] * 5), dropout=0.25)
    still = np.asarray(add(y, x, "query", low, voices))
    keys = jax.random.split(jax.random.key(2), 4000)
    drop = jax.jit(jax.vmap(lambda key: add(y, x, "query", low, voices._replace(key=key))))
    dropped = np.asarray(drop(keys))
    assert np.abs(dropped[0] - still).max() > 0.1
    np.testing.assert_allclose(drop(keys[:2])[0], dropped[0], atol=1e-6)
    error = dropped.std(0) / len(keys) ** 0.5
    assert (np.abs(dropped.mean(0) - still) < 5 * error + 1e-6).all()
    # What the base says of x is not touched, and another matrix has another mask.
    np.testing.assert_array_equal(add(y, x, "query", {}, voices._replace(key=keys[0])), y)


def test_int8_base_says_what_its_numbers_say():
    a = replace(A, base="int8")
    first = initialize(plain(A), jax.random.key(0))
    params = furnished(first, a, jax.random.key(1))
    assert params.layers.query.values.dtype == jnp.int8
    expected = said(merged(params, a), plain(A))
    np.testing.assert_allclose(said(params, a, (1, 0), (0, 1)), expected, atol=2e-5)
    error = np.abs(expected - said(first, plain(A)))
    assert 0 < error.max() < 0.1, "and that is near to what it was made of"


def test_targets_are_chosen_by_name():
    params = initialize(replace(A, adapters=replace(A.adapters, targets="query,down")), jax.random.key(0))
    assert set(params.adapters.layers) == {"query", "down"}


@pytest.mark.parametrize(
    ("trains", "learned"),
    [
        ("", {"adapters"}),
        ("embed,layers.query", {"embed", "layers.query"}),
        ("adapters.layers.up", {"adapters.layers.up.down", "adapters.layers.up.up"}),
    ],
)
def test_what_learns_is_chosen_by_path(trains, learned):
    learns = jax.tree_util.tree_leaves_with_path(learning(A, trains))
    places = {jax.tree_util.keystr(path, simple=True, separator=".") for path, keep in learns if keep}
    for each in learned:
        assert any(place == each or place.startswith(each + ".") for place in places)
    assert all(any(place == each or place.startswith(each + ".") for each in learned) for place in places)
    kept = jax.tree.leaves(part(initialize(A, jax.random.key(0)), learning(A, trains)))
    assert len(kept) == len(places)


@pytest.mark.parametrize(
    ("a", "trains", "told"),
    [
        (A, "layers.querry", r"update\.trains names 'layers\.querry', which is no parameter"),
        (replace(A, base="int8"), "layers", r"layers\.query\.values is held as bytes \(model\.base\)"),
        (plain(A), "adapters", "names 'adapters', which is no parameter"),
    ],
)
def test_what_cannot_learn_is_named(a, trains, told):
    with pytest.raises(ValueError, match=told):
        learning(a, trains)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rank": -1}, r"adapters\.rank is -1"),
        ({"alpha": 0.0}, r"adapters\.alpha is 0\.0"),
        ({"dropout": 1.0}, r"adapters\.dropout is 1\.0"),
        ({"targets": "query,keys"}, r"adapters\.targets has 'keys': choose of query,key"),
        ({"names": "one,one"}, r"adapters\.names is 'one,one': give distinct names"),
        ({"names": "none"}, r"adapters\.names has 'none', which stands for the base alone"),
        ({"path": "x,y,z"}, r"adapters\.path has 3 folders for one,two: give one for each at most"),
        ({"path": "x", "rank": 0}, r"adapters\.path is 'x', but adapters\.rank 0: give the rank"),
    ],
)
def test_wrong_adapters_are_named(change, told):
    with pytest.raises(ValueError, match=told):
        replace(A, adapters=replace(A.adapters, **change)).check()


def test_a_name_that_is_not_there_is_told():
    with pytest.raises(ValueError, match=r"asks for the adapter 'three', and there is one,two: give --config\.model"):
        A.adapters.number("three")
    with pytest.raises(ValueError, match=r"base is 'int8', which cannot learn"):
        replace(plain(A), base="int8").check()
