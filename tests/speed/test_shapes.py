"""Settings of the shapes, and how flags change them."""

import pytest

from rlrag.model.architecture import Architecture
from rlrag.model.parameters import num_parameters
from rlrag.speed import shapes


def test_the_demo_has_five_million_parameters():
    assert num_parameters(shapes.DEMO) == pytest.approx(5.0e6, rel=0.05)


def test_changes_reach_their_parts_and_0_changes_nothing():
    setting = shapes.demo()
    changes = {name: 0 for names in shapes.PARTS.values() for name in names}
    assert shapes.changed(setting, changes=changes) == setting
    changes |= {"num_slots": 8, "turns": 3, "turn_tokens": 10, "decode_tokens": 9, "micro_rows": 5, "episodes": 11}
    found = shapes.changed(setting, changes=changes)
    assert (found.sizes.num_slots, found.rows.rows, found.episodes) == (8, 5, 11)
    assert (found.talk.turns, found.talk.turn_tokens, found.decode.turn_tokens) == ((3, 3), (5, 15), (9, 9))
    assert found.learn == setting.learn


@pytest.mark.parametrize(("heads", "kv_heads"), [(14, 2), (16, 2), (28, 4), (4, 2)])
@pytest.mark.parametrize("scale", [1, 2, 3, 16, 1000])
def test_smaller_models_are_whole(heads, kv_heads, scale):
    a = Architecture(vocab_size=1000, num_layers=4, embed_dim=512, num_heads=heads, num_kv_heads=kv_heads, head_dim=64)
    small = shapes.smaller(a, 2, scale, "bfloat16")
    small.check()
    assert small.num_layers == 2
    assert small.dtype == small.param_dtype == "bfloat16"
    assert scale > 1 or (small.num_heads, small.embed_dim, small.vocab_size) == (heads, 512, 1000)


def test_every_workload_follows_the_vocabulary():
    found = shapes.changed(shapes.published(shapes.DEMO), scale=4, changes={})
    assert {found.decode.vocab_size, found.talk.vocab_size, found.learn.vocab_size} == {1024}


def test_updates_fill_their_rows():
    for setting in (shapes.demo(), shapes.published(shapes.DEMO)):
        shared = setting.learn.prompt_tokens - 1
        group = shared + setting.group_size * (setting.learn.capacity - shared)
        assert 0.9 < group / setting.rows.tokens <= 1
