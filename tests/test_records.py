import dataclasses
import json

import numpy as np
import pytest

from rlrag.records import from_record, to_record
from rlrag.trajectory import Group, Outcome, Passage, SearchRecord
from tests.episodes import make_groups


def same(a, b):
    if dataclasses.is_dataclass(a):
        assert type(a) is type(b)
        for f in dataclasses.fields(a):
            same(getattr(a, f.name), getattr(b, f.name))
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b):
            same(x, y)
    else:
        assert a == b or (a != a and b != b)


def test_episodes_come_back_bit_by_bit():
    groups = make_groups(3)
    first = groups[0].trajectories[0]
    first.searches = [SearchRecord(("who?",), [[Passage("p", "t", "x", 0.1), Passage("q", "", "y")]], 0.25, None)]
    first.outcome = Outcome("a", {"turns": 3, "limit": None, "blocks": [["think", "model"]], "inner": {"x": 1.5}})
    first.streams[0].spans[1].logp = np.array([-0.1, np.nan, -np.inf], np.float32)
    text = json.dumps(to_record(groups))
    same(from_record(json.loads(text), list[Group]), groups)


def test_what_cannot_be_saved_is_named():
    with pytest.raises(ValueError, match="a set cannot be saved with an episode"):
        to_record(Outcome("a", {"seen": {1}}))
    with pytest.raises(ValueError, match=r"a mapping with the keys \[1\] cannot be saved: use text keys"):
        to_record({1: 2})
