"""The page in a real browser: python -m tests.page_check [--workdir=DIR] [--shots=FOLDER]

Not a part of the test suite, which needs no browser. It wants Chromium on PATH (or its path in BROWSER), opens the page
of a hostile run and of DIR, and fails with what is wrong; screenshots in FOLDER are for a person to look at.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rlrag.view import write_page
from tests.test_view import HOSTILE, run_directory

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHOTS = {
    "curves": ("", "1400,1000"),
    "role": ("#episode={last}", "1400,1000"),
    **{
        name: (f"#episode={{last}}&colour={name}", "1400,1000")
        for name in ("logp", "entropy", "certainty", "advantage")
    },
    "narrow": ("#episode={last}&colour=entropy", "500,900"),
}


def browser() -> str:
    found = os.environ.get("BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit(f"error: none of {', '.join(BROWSERS)} is on PATH: install one, or give its path in BROWSER")
    return found


def look(page: Path, place: str, *options: str) -> tuple[str, str]:
    """The document after the page's script has run, and what the browser complained about."""
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [*command, f"--user-data-dir={profile}", "--virtual-time-budget=2000", f"file://{page.resolve()}{place}"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def texts(document: str, kind: str) -> list[str]:
    return re.findall(rf'<[a-z0-9]+ class="{kind}"[^>]*>(.*?)</', document, re.DOTALL)


def check_hostile(folder: Path) -> None:
    """Text of a run stays text: nothing runs, nothing is asked of the network, all of it is read."""
    page = folder / "hostile.html"
    write_page(run_directory(folder, text=HOSTILE), page, 10)
    document, complaints = look(page, "#episode=1&colour=logp", "--dump-dom")
    assert not complaints, complaints
    assert document.count("<script") == 2 and "<img" not in document, "text became markup"
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in document, "the text is not shown"
    assert len(texts(document, "row")) == 3
    assert 'class="passage gold"' in document
    assert 'value="logp"' in document


def check_links(folder: Path) -> None:
    page = folder / "view.html"
    write_page(run_directory(folder), page, 2)  # of 3: the first and the newest
    document, complaints = look(page, "#episode=1", "--dump-dom")
    assert not complaints, complaints
    assert "Episode 1 is not on this page: write it with a higher --episodes." in document
    assert "2 of 2 episodes, 3 logged" in document


def check_run(workdir: Path, folder: Path, shots: Path | None) -> None:
    """Every row within sight is drawn and no other; every number of the last episode's tokens has a colour."""
    page = folder / "run.html"
    shown, logged = write_page(workdir, page, 2000)
    last = logged - 1
    document, complaints = look(page, f"#episode={last}", "--dump-dom", "--window-size=1400,1000")
    assert not complaints, complaints
    assert f"{shown} of {shown} episodes" in document
    assert 0 < len(texts(document, "row")) < 60, "the list draws what is in sight"
    row = json.loads((workdir / "episodes.jsonl").read_text().splitlines()[last])
    tokens = sum(len(span["tokens"]) for stream in row["streams"] for span in stream["spans"])
    assert document.count("data-k=") == tokens, "every token is there"
    print(f"{page.stat().st_size / 2**20:.1f} MiB, {shown} of {logged} episodes")
    if shots is None:
        return
    for name, (place, size) in SHOTS.items():
        for theme in ("light", "dark"):
            options = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
            shot = shots / f"{name}_{theme}.png"
            look(page, place.format(last=last), f"--screenshot={shot.resolve()}", f"--window-size={size}", *options)
            print(shot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, help="a run whose page is checked too")
    parser.add_argument("--shots", type=Path, help="folder for screenshots of that run")
    values = parser.parse_args()
    if values.shots:
        values.shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        check_hostile(Path(folder))
        check_links(Path(folder))
        if values.workdir:
            check_run(values.workdir, Path(folder), values.shots)
    print("the page holds")


if __name__ == "__main__":
    sys.exit(main())
