"""Run a study: python -m launch.study --config=configs/algorithms.py

Arms x seeds from cached warm starts, in several processes; the same command goes on after any kill, and only writes the
results again where everything is done. --only=ARM:SEED plays one cell again and compares its weights with the record.
"""

import json
import os
import runpy
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch.flags import Mistake, run


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    define_string = flags.DEFINE_string
    define_string("config", None, "File of the study: configs/NAME.py with get_study().", flag_values=values)
    define_string("runs", "runs", "Directory of warm starts and cells.", flag_values=values)
    define_string("results", "docs/results", "Directory of NAME.json, NAME.md and NAME.png.", flag_values=values)
    define_string("only", "", "ARM:SEED: play this cell again, and compare.", flag_values=values)
    flags.DEFINE_list("arms", [], "Play these arms alone (default: all).", flag_values=values)
    flags.DEFINE_integer("processes", 0, "Cells at once; 0: one a core.", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("allow_dirty", False, "Play a study whose file is not committed.", flag_values=values)


def main(values: flags.FlagValues) -> int:
    from rlrag.results import draw, gather, report
    from rlrag.study import Runner, cells_of, committed

    file = Path(values.config)
    study, get_config = load(file)
    commit = None
    try:
        commit = committed(file)
    except ValueError:
        if not values.allow_dirty:
            raise
    runs = Path(values.runs)
    cells = cells_of(study, str(file), get_config, runs)
    if values.only:
        return again(values.only, cells, runs)
    unknown = [arm for arm in values.arms if arm not in study.arms]
    if unknown:
        raise Mistake(f"--arms={unknown[0]}: the arms are {', '.join(study.arms)}")
    chosen = [cell for (arm, _), cell in cells.items() if not values.arms or arm in values.arms]
    failed = Runner(chosen, values.processes or os.cpu_count() or 1).run()
    command = f"python -m launch.study --config={file}"
    result = gather(study, cells, command, commit)
    out = Path(values.results)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{study.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{study.name}.md").write_text(report(result, f"{study.name}.png"))
    draw(out / f"{study.name}.png", result)
    print(f"{out / study.name}.json, .md and .png written; {len(result['missing'])} of {len(cells)} cells missing")
    if failed:
        print(f"failed: {', '.join(cell.name for cell in failed)}; the same command tries again", file=sys.stderr)
    return 1 if failed else 0


def load(file: Path):
    """The study of a config file and its get_config. ValueError, in one line, where it has none."""
    if not file.is_file():
        raise Mistake(f"--config={file}: no such file; give a study, such as configs/algorithms.py")
    names = runpy.run_path(str(file))
    if "get_study" not in names:
        raise Mistake(f"--config={file}: it has no get_study(), see docs/guides/studies.md")
    study = names["get_study"]()
    study.check()
    return study, names["get_config"]


def again(only: str, cells, runs: Path) -> int:
    """Play one cell from its warm start in a fresh directory; 0 where its weights are those on record."""
    from rlrag.study import Cell, Runner

    arm, _, seed = only.rpartition(":")
    key = (arm, int(seed)) if seed.isdecimal() else None
    if key not in cells:
        raise Mistake(f"--only={only}: give ARM:SEED, such as {next(iter(cells.values())).name}")
    cell = cells[key]
    directory = runs / "again" / f"{cell.directory.parent.name}-{cell.directory.name}"
    shutil.rmtree(directory, ignore_errors=True)
    command = tuple(f"--workdir={directory}" if part.startswith("--workdir=") else part for part in cell.command)
    print(shlex.join(command))
    if Runner([Cell(cell.name, directory, command, cell.after)], 1).run():
        return 1
    new = Cell(cell.name, directory, command).result
    assert new is not None
    if cell.result is None:
        print(f"{cell.name}: {new['weights_sha256']}, nothing on record to compare with")
        return 0
    equal = new["weights_sha256"] == cell.result["weights_sha256"]
    print(f"{cell.name}: {new['weights_sha256']} is {'equal to' if equal else 'DIFFERENT from'} the record")
    return 0 if equal else 1


if __name__ == "__main__":
    run(
        lambda values: sys.exit(main(values)),
        define_flags,
        required={"config": "configs/algorithms.py"},
        doc=__doc__,
        interrupted="interrupted: the same command goes on",
    )
