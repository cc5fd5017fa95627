"""Plan past this machine: python -m launch.plan --config=configs/scale.py:qwen2.5-7b --mesh=data:16,model:4

Bytes a device, whether they fit, the largest batch that does; floating point operations and bytes that devices send
each other; how long a step takes at least. No device is needed and nothing is allocated: shapes and shardings are
compiled for virtual devices on this CPU. --config.FIELD=VALUE changes a field.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    from launch.flags import define_config

    define_config(values, argv)
    flags.DEFINE_string("mesh", "", "Sizes by axis, as data:64,model:4; empty: the config's.", flag_values=values)
    flags.DEFINE_list("device", ["h200"], "tpu-v5p, h200, h100 or cpu; several joined by commas.", flag_values=values)
    flags.DEFINE_integer(
        "sampled_tokens", 0, "Tokens that an episode samples; 0: half of the longest.", flag_values=values
    )
    flags.DEFINE_integer(
        "observed_tokens", 0, "Tokens of its prompt and passages; 0: half of the longest.", flag_values=values
    )
    flags.DEFINE_bool(
        "all",
        False,
        "The shapes of configs/scale.py, on meshes and devices of their own; other flags do not count.",
        flag_values=values,
    )
    flags.DEFINE_string("out", "", "With --all: FILE.json and FILE.md are written.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    from launch.flags import Mistake
    from rlrag.config import check
    from rlrag.devices import find_device

    names = values.device
    for name in names:
        find_device(name)
    if values.out and not values.all:
        raise Mistake(f"--out is {values.out!r}: a table is written with --all alone")
    if not values.all:
        if values.config is None:
            raise Mistake("--config is missing: give --config=configs/scale.py:qwen2.5-7b, or --all")
        check(values.config)
        if values.mesh:
            values.config.mesh = parse_mesh(values.mesh)
        pretend(devices_of(values.config.mesh))
        show(values, names)
        return
    from configs.scale import VARIANTS, get_config

    experiments = {name: get_config(name) for name in VARIANTS}
    pretend(max(devices_of(each.mesh) for each in experiments.values()))
    tabulate(values, experiments)


def parse_mesh(text: str):
    """data:64,model:4 -> the sizes. Raises ValueError where it cannot be read."""
    from dataclasses import fields

    from rlrag.config import Mesh

    axes = [field.name for field in fields(Mesh)]
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if axis not in axes or axis in sizes or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"mesh is {text!r}: write axis:size once for each of {', '.join(axes)}, as data:64,model:4"
            )
        sizes[axis] = int(size)
    return Mesh(**{"data": 1, **sizes})


def devices_of(mesh) -> int:
    import math

    if mesh.data == -1:
        raise ValueError("mesh.data is -1, all devices that there are: say how many with --mesh=data:8,model:1")
    return math.prod(vars(mesh).values())


def pretend(many: int) -> None:
    """Let this process have as many virtual devices. JAX reads it when it starts, and nothing has started it yet."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    others = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{others} --xla_force_host_platform_device_count={many}".strip()


def load_of(values: flags.FlagValues, setting):
    from rlrag.plan import Load

    half, settings = setting.task.workflow.max_tokens // 2, setting.stage.settings
    episodes = settings.questions * settings.group_size
    load = Load(episodes, values.sampled_tokens or half, values.observed_tokens or half)
    load.check(setting.task.workflow.max_tokens)
    return load


def show(values: flags.FlagValues, names: Sequence[str]) -> None:
    import tempfile

    from rlrag.devices import CPU, find_device
    from rlrag.plan import Assumed, forecast, open_setting
    from rlrag.plan_report import describe
    from rlrag.survey import survey

    assumed = Assumed()
    with tempfile.TemporaryDirectory() as folder, open_setting(values.config, Path(folder)) as setting:
        load, surveys = load_of(values, setting), {}
        for number, name in enumerate(names):
            native, device = name == CPU, find_device(name)
            if native not in surveys:
                surveys[native] = survey(setting, native)
            made = forecast(surveys[native], setting, name, device, load, assumed)
            print("\n" * (number > 0) + describe(surveys[native], name, device, made, load, assumed))


def tabulate(values: flags.FlagValues, experiments) -> None:
    import json
    import sys
    import tempfile
    import time

    from rlrag.devices import DEVICES
    from rlrag.plan import Assumed, forecast, open_setting
    from rlrag.plan_report import Case, as_json, table
    from rlrag.survey import survey

    begin, assumed, cases, load = time.monotonic(), Assumed(), [], None
    for shape, experiment in experiments.items():
        with tempfile.TemporaryDirectory() as folder, open_setting(experiment, Path(folder)) as setting:
            load, found = load_of(values, setting), survey(setting, native=False)
            for name, device in DEVICES.items():
                made = forecast(found, setting, name, device, load, assumed)
                cases.append(Case(shape, name, found, made))
        print(f"{shape} surveyed, {time.monotonic() - begin:,.0f} s", file=sys.stderr)
    assert load is not None
    text = table(cases, DEVICES, load, assumed, time.monotonic() - begin)
    print(text)
    if values.out:
        Path(f"{values.out}.md").write_text(text)
        Path(f"{values.out}.json").write_text(json.dumps(as_json(cases, load, assumed), indent=1) + "\n")


if __name__ == "__main__":
    from launch.flags import run

    run(main, define_flags, doc=__doc__)
