import pytest

from rlrag.loading import load_function


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_functions.py").write_text("def f():\n    return 7\n\nnumber = 3\n")
    return tmp_path


def test_by_module_by_file_and_itself(here):
    assert load_function("reward", "own_functions:f")() == 7
    assert load_function("reward", f"{here / 'own_functions.py'}:f")() == 7
    assert load_function("reward", len) is len


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("own_functions", "reward is 'own_functions': name module:function, or file.py:function"),
        ("nowhere:f", r"cannot be loaded \(ModuleNotFoundError"),
        ("nowhere.py:f", r"cannot be loaded \(FileNotFoundError"),
        ("own_functions.py:g", r"cannot be loaded \(AttributeError"),
        ("own_functions.py:number", "a int: name a function"),
    ],
)
def test_what_cannot_be_loaded_is_told(here, spec, told):
    with pytest.raises(ValueError, match=told):
        load_function("reward", spec)


def test_what_a_users_file_raises_is_told(here):
    (here / "broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=r"reward is 'broken.py:f', which cannot be loaded \(ZeroDivisionError"):
        load_function("reward", "broken.py:f")
