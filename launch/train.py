"""Train: python -m launch.train --config=configs/search_grpo.py:demo --workdir=runs/demo

The same command goes on from the newest checkpoint in the workdir; --config.FIELD=VALUE changes a field, as in
--config.seed=1 --config.steps=100 (rlrag/config.py lists them).
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch.flags import define_config, run


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    define_config(values, argv)
    flags.DEFINE_string(
        "workdir", None, "Directory of the run: metrics, curve, result, checkpoints.", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    from rlrag.config import check

    check(values.config)
    from rlrag.train import train  # imports JAX, which takes seconds: a wrong value is told before

    train(values.config, Path(values.workdir))


if __name__ == "__main__":
    run(
        main,
        define_flags,
        required={"config": "configs/search_grpo.py:demo", "workdir": "runs/demo"},
        doc=__doc__,
        interrupted="interrupted: the same command goes on from the last checkpoint",
    )
