import json

import pytest

from rlrag.config import Experiment, to_dict
from rlrag.workdir import differences, holds_checkpoint, open_workdir, read, write


def run_of(directory, experiment):
    """A directory as a run leaves it behind its first checkpoint."""
    open_workdir(directory, experiment)
    write(directory / "config.json", to_dict(experiment))
    (directory / "checkpoints" / "50").mkdir(parents=True)


def test_the_same_configuration_may_go_on(tmp_path):
    run_of(tmp_path / "a" / "b", Experiment(seed=3))
    open_workdir(tmp_path / "a" / "b", Experiment(seed=3))
    assert holds_checkpoint(tmp_path / "a" / "b")


def test_another_configuration_may_not(tmp_path):
    run_of(tmp_path, Experiment(seed=3))
    with pytest.raises(
        ValueError, match=r"seed is 3 there and 4 now.*: give the same flags to go on with it, or another"
    ):
        open_workdir(tmp_path, Experiment(seed=4))


def test_another_mesh_may_go_on(tmp_path):
    run_of(tmp_path, Experiment(seed=3))
    other = Experiment(seed=3)
    other.mesh.data, other.mesh.model = 4, 2
    open_workdir(tmp_path, other)
    other.seed = 4
    with pytest.raises(ValueError, match=r"\(seed is 3 there and 4 now\)"):
        open_workdir(tmp_path, other)


def test_many_differences_are_counted(tmp_path):
    run_of(tmp_path, Experiment())
    other = Experiment("other", 1, 2, "r:b", 4)
    other.model.num_layers, other.data.train = 9, "x"
    with pytest.raises(ValueError, match="; and 2 more"):
        open_workdir(tmp_path, other)


def test_without_a_checkpoint_nothing_binds(tmp_path):
    run_of(tmp_path, Experiment(seed=3))
    (tmp_path / "checkpoints" / "50").rename(tmp_path / "checkpoints" / "50.orbax-checkpoint-tmp")  # cut short
    assert not holds_checkpoint(tmp_path)
    open_workdir(tmp_path, Experiment(seed=4))


def test_differences_name_the_path_and_fields_of_one_side():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(old, new) == [
        "a.c is 2 there and 4 now", "d is 3 there and None now", "e is None there and 5 now",
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_workdir_that_cannot_be_made(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"the workdir .*file.* cannot be written \(.*\): choose another --workdir"):
        open_workdir(tmp_path / place, Experiment())


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[1]", "holds a list, not an object")])
def test_a_broken_file_is_named(tmp_path, text, message):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match=f"result.json {message}"):
        read(tmp_path / "result.json")
    assert read(tmp_path / "absent.json") is None


def test_write_replaces_whole(tmp_path):
    write(tmp_path / "a.json", {"a": 1})
    write(tmp_path / "a.json", {"a": [2]})
    assert json.loads((tmp_path / "a.json").read_text()) == read(tmp_path / "a.json") == {"a": [2]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
