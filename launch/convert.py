"""Convert a model: python -m launch.convert --from=HF_DIR --to=DIR, and back

    python -m launch.convert --from=Qwen/Qwen2.5-0.5B --to=runs/qwen     # for --config.model.path, read by many at once
    python -m launch.convert --from=runs/nq --to=runs/exported           # a run's policy, for transformers
    python -m launch.convert --from=runs/qwen --to=runs/exported         # and back
    python -m launch.convert --from=runs/lora --to=runs/adapter --peft   # a run's adapter alone, for peft

A Hugging Face folder is read by --config.model.path as it is: converting it first is for pods, where every process then
reads its own part of the parameters.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch.flags import run


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_string("from", None, "A Hugging Face folder or hub id, a run's directory.", flag_values=values)
    flags.DEFINE_string("to", None, "The folder to write; it must not be there.", flag_values=values)
    flags.DEFINE_string("model", "policy", "Which of a run's models.", flag_values=values)
    flags.DEFINE_bool("best", False, "A run's best parameters by held-out score, not its newest.", flag_values=values)
    flags.DEFINE_string(
        "adapter", "", "Which of a run's adapters is merged into its base; empty: the first; none: the base alone.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("peft", False, "Write a run's adapter alone, in the form of peft.", flag_values=values)
    flags.DEFINE_string("base", "", "The model it is then for; empty: the run's model.path.", flag_values=values)
    flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"], "Of the tensors; empty: as stored.", flag_values=values)
    flags.DEFINE_float(
        "shard_gb", 5.0, "Of a safetensors file at most, in 10^9 bytes.", lower_bound=1e-6, flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    from rlrag.console import say
    from rlrag.convert import convert

    source = values.flag_values_dict()["from"]
    options = {"model": values.model, "best": values.best, "dtype": values.dtype}
    options |= {"adapter": values.adapter, "peft": values.peft, "base": values.base}
    say(convert(source, Path(values.to), shard_bytes=int(values.shard_gb * 1e9), **options))


if __name__ == "__main__":
    run(main, define_flags, required={"from": "HF_DIR", "to": "DIR"}, doc=__doc__)
