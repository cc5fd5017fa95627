"""The shapes keep their proportions when scaled and name each model once."""

from kernels import arg_specs


def test_names_are_distinct_and_sizes_positive():
    specs = [arg_specs.DEMO, *arg_specs.HEADS]
    assert len({spec.name for spec in specs}) == len(specs)
    assert all(min(spec.hidden, spec.vocabulary, spec.tokens, spec.slots) > 0 for spec in specs)


def test_scaled_divides_and_stays_usable():
    spec = arg_specs.HEADS[0].scaled(8)
    assert (spec.hidden, spec.vocabulary, spec.tied) == (112, 18_992, True)
    smallest = spec.scaled(10**6)
    assert (smallest.hidden, smallest.vocabulary, smallest.tokens, smallest.slots) == (8, 64, 16, 2)


def test_decode_shapes_keep_their_heads():
    assert len({spec.name for spec in arg_specs.DECODES}) == len(arg_specs.DECODES)
    for spec in arg_specs.DECODES:
        small = spec.scaled(64)
        assert spec.heads % spec.kv_heads == 0 and spec.shortest <= spec.longest
        assert (small.heads, small.kv_heads, small.head_dim) == (spec.heads, spec.kv_heads, spec.head_dim)
        assert (small.slots, small.shortest, small.longest) == (2, 16, 64)
    # Two kv heads of 64 numbers, two bytes, key and value: 512 bytes a token.
    assert arg_specs.DECODES[0].read_bytes == 512 * 128 * 2560
