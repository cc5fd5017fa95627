"""Train: python -m launch.train --config=configs/search_grpo.py:demo --workdir=runs/demo

The same command goes on from the newest checkpoint in the workdir.
"""

from pathlib import Path

from absl import flags

from launch.flags import define_config, run

CONFIG = define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: metrics, curve, result, checkpoints.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_: list[str]) -> None:
    from rlrag.train import train  # imports JAX: a wrong flag is told before that

    train(CONFIG.value, Path(WORKDIR.value))


if __name__ == "__main__":
    run(main)
