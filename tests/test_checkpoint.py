import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.checkpoint import Checkpoints, digest, load_config

POLICY = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(7)}
STATE = {"params": {"policy": POLICY, "critic": {"w": jnp.ones(2)}}, "optimizer": {"policy": {"step": jnp.int32(3)}}}
META = {"stage": 1, "step": 3, "cursor": {"next_index": 12}, "result": {"em": 0.1}, "ended": True}


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    yield checkpoints
    checkpoints.close()


def corrupt(directory, part):
    """Cut every data file of a checkpoint's part in half."""
    files = [path for path in (directory / part).rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_was_saved_comes_back_exactly(checkpoints):
    assert checkpoints.latest() is None
    checkpoints.save(10, STATE, META)
    again = Checkpoints(checkpoints.directory)
    assert again.latest() == 10
    assert again.meta(10) == META
    like = jax.tree.map(jnp.zeros_like, STATE)
    restored = again.restore(10, like)
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)
    assert jax.tree.map(lambda x: (x.dtype, x.sharding), restored) == jax.tree.map(
        lambda x: (x.dtype, x.sharding), STATE
    )
    for model in ("policy", "critic"):
        params = again.restore_params(10, like["params"][model], model)
        assert digest(params) == digest(STATE["params"][model])
    again.close()


def test_the_newest_two_stay(checkpoints):
    for step in (1, 2, 5):
        checkpoints.save(step, STATE, META)
    assert checkpoints.latest() == 5
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["2", "5"]


@pytest.mark.parametrize("part", ["state", "meta"])
def test_a_truncated_checkpoint_is_named_with_the_remedy(checkpoints, part):
    checkpoints.save(4, STATE, META)
    checkpoints.save(8, STATE, META)
    corrupt(checkpoints.directory / "8", part)
    message = r"checkpoint .*8 cannot be read \(.*\): remove it to go on from step 4"
    with pytest.raises(ValueError, match=message) as told:
        checkpoints.meta(8) if part == "meta" else checkpoints.restore(8, STATE)
    assert "\n" not in str(told.value)


def test_the_only_checkpoint_absent(checkpoints):
    checkpoints.save(4, STATE, META)
    (checkpoints.directory / "4" / "state").rename(checkpoints.directory / "away")
    with pytest.raises(ValueError, match=r"4 cannot be read \(.*\): remove it to begin anew"):
        checkpoints.restore(4, STATE)


def test_a_save_that_was_cut_short_is_no_checkpoint(checkpoints):
    checkpoints.save(4, STATE, META)
    (checkpoints.directory / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    again = Checkpoints(checkpoints.directory)
    assert again.latest() == 4
    again.save(8, STATE, META)
    assert again.latest() == 8
    again.close()


def test_digest_tells_names_types_shapes_and_bits():
    value = np.array([1.0, 2.0], np.float32)
    same = digest({"a": value})
    assert digest({"a": jnp.asarray(value)}) == same
    others = [
        {"b": value},
        {"a": value.astype(np.float64)},
        {"a": value[None]},
        {"a": np.nextafter(value, np.float32(9))},
    ]
    assert len({same, *map(digest, others)}) == 5


def test_load_config(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.json: name the --workdir of a finished or running training"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3}))
    assert load_config(tmp_path) == {"seed": 3}
