"""A training on a disk that is full, told and continued: python -m tests.disk_full

In a mount namespace of its own (Linux; no privileges are needed) a small tmpfs holds the run. The training ends in one
line, the checkpoint before stays good, and with more room the same command ends as a run that was left alone.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import conftest  # sets the environment, which children inherit
from tests.kill_points import child, finger_print, start

INSIDE = "RLRAG_TEST_INSIDE"
SMALL, LARGE = "300k", "64m"


def inside(directory: Path) -> None:
    """In the namespace: too small a disk, then a larger one."""
    run = directory / "small" / "run"
    run.parent.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", run.parent], check=True)
    source = (
        "from launch.flags import run\nfrom tests.kill_points import child\n"
        f"run(lambda _: child('on_policy', {str(run)!r}), argv=['x'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=conftest.REPOSITORY, capture_output=True, text=True, timeout=300
    )
    lines = done.stderr.strip().splitlines()
    print(f"full: exit status {done.returncode}, {len(lines)} line(s): {lines[-1] if lines else ''}")
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    kept = sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    print(f"checkpoints that are left: {kept or 'none'}")
    subprocess.run(["mount", "-o", f"remount,size={LARGE}", run.parent], check=True)
    child("on_policy", str(run))
    found = finger_print(run)
    (directory / "found.json").write_text(json.dumps(found))


def main() -> None:
    if INSIDE in os.environ:
        inside(Path(os.environ[INSIDE]))
        return
    folder = Path(tempfile.mkdtemp(prefix="disk_full_"))
    if start("on_policy", folder / "alone").wait():
        raise SystemExit(f"the run that is left alone failed: see {folder / 'alone'}.log")
    used = sum(path.stat().st_size for path in (folder / "alone").rglob("*") if path.is_file())
    print(f"a run takes {used / 1024:,.0f} KiB, the disk has {SMALL}")
    command = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", "tests.disk_full"]
    status = subprocess.run(command, cwd=conftest.REPOSITORY, env=os.environ | {INSIDE: str(folder)}).returncode
    if status:
        raise SystemExit(f"the run on the small disk went wrong: {folder}")
    wanted, found = finger_print(folder / "alone"), json.loads((folder / "found.json").read_text())
    different = [name for name in wanted if json.loads(json.dumps(wanted[name])) != found[name]]
    print(f"against the run that was left alone: {different or 'equal'}")
    shutil.rmtree(folder)
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
