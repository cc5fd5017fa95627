import subprocess
import sys

from tests.conftest import REPOSITORY
from tests.test_view import run_directory


def view(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "launch.view", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_a_page_is_written_and_its_path_told(tmp_path):
    status, out, error = view(f"--workdir={run_directory(tmp_path)}")
    assert (status, error) == (0, "")
    assert out.startswith(f"{tmp_path / 'view.html'}: 3 of 3 logged episodes, 0.0 MiB")
    assert view(f"--workdir={tmp_path}", f"--out={tmp_path / 'x.html'}", "--episodes=2")[1].startswith(
        f"{tmp_path / 'x.html'}: 2 of 3 logged episodes"
    )


def test_what_is_not_there_is_told(tmp_path):
    status, _, error = view("--workdir=/no/where")
    assert (status, "there is no such directory" in error, error.count("\n")) == (2, True, 1)
    status, _, error = view(f"--workdir={tmp_path}")
    assert (status, "holds no metrics yet" in error, error.count("\n")) == (1, True, 1)
