"""Write a run as a page to look at: python -m launch.view --workdir=runs/demo

One HTML file with the curves and the episodes, token by token; it opens in any browser and needs no network.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch.flags import Mistake, run


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_string("workdir", None, "Directory of a run.", flag_values=values)
    flags.DEFINE_string("out", "", "File to write; empty: view.html in the workdir.", flag_values=values)
    flags.DEFINE_integer("episodes", 2000, "Episodes shown at most.", lower_bound=1, flag_values=values)


def main(values: flags.FlagValues) -> None:
    from rlrag.view import write_page

    directory = Path(values.workdir)
    if not directory.is_dir():
        raise Mistake(f"--workdir={directory}: there is no such directory; name that of a training, such as runs/demo")
    out = Path(values.out) if values.out else directory / "view.html"
    shown, total = write_page(directory, out, values.episodes)
    print(f"{out}: {shown} of {total} logged episodes, {out.stat().st_size / 2**20:.1f} MiB; open it in a browser")


if __name__ == "__main__":
    run(main, define_flags, required={"workdir": "runs/demo"}, doc=__doc__)
