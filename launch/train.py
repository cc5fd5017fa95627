"""Train: python -m launch.train --config=configs/search_grpo.py:demo --workdir=runs/demo

The same command goes on from the newest checkpoint in the workdir; --config.FIELD=VALUE changes a field, as in
--config.seed=1 --config.steps=100 (rlrag/config.py lists them). Run it on every host of a pod, and they train together
(launch/processes.py). --compile_only checks and compiles everything, and says
what it will take.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import processes
from launch.flags import define_config, run


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    define_config(values, argv)
    processes.define_flags(values)
    flags.DEFINE_string(
        "workdir", None, "Directory of the run: metrics, curve, result, checkpoints.", flag_values=values
    )
    flags.DEFINE_bool(
        "compile_only", False, "Check and compile everything, say what it will take, and end.", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    from rlrag.config import check

    check(values.config)
    if values.compile_only:
        from rlrag.dry_run import describe, dry_run  # imports JAX, which takes seconds: a wrong value is told before

        if processes.find_place(values, os.environ) is not None:
            raise processes.Mistake(
                "--compile_only looks at the devices of this process alone: python -m launch.plan has those of several "
                "(--mesh=data:64,model:4), or leave out what names the others"
            )
        print(describe(dry_run(values.config, Path(values.workdir))))
        return
    with processes.joined(values):
        from rlrag.train import train

        try:
            train(values.config, Path(values.workdir))
        except SystemExit as end:  # asked to end, and everything is saved
            raise SystemExit(end.code or values.asked_status) from None


if __name__ == "__main__":
    run(
        main,
        define_flags,
        required={"config": "configs/search_grpo.py:demo", "workdir": "runs/demo"},
        doc=__doc__,
        interrupted="interrupted: the same command goes on from the last checkpoint",
    )
