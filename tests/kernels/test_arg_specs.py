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
