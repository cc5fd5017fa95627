"""Decode and GRPO steps beside Tunix, transformers and TRL: python -m launch.bench_peers (make bench-peers)

Every contender is a process in its own environment; they work in turn, the others wait. What is measured goes to
OUT.json round by round, the report to OUT.md; rounds that OUT.json has already are not measured again. What the traps
cost that rlrag avoids (launch.peers.traps) is measured last, into OUT_traps.json.
"""

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import flags

from launch.peers import report, workloads
from launch.peers.protocol import Contender, Message
from launch.peers.workloads import OURS, TORCH, TUNIX, WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[1]
MODULES = {OURS: "launch.peers.ours", TUNIX: "launch.peers.tunix", TORCH: "launch.peers.hugging_face"}
AGREE = 1e-4  # largest difference of logits


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    names = [name for name in WORKLOADS if name != "decode_1"]
    flags.DEFINE_list("workloads", names, f"Which of {', '.join(WORKLOADS)}.", flag_values=values)
    flags.DEFINE_list("contenders", list(MODULES), f"Which of {', '.join(MODULES)}.", flag_values=values)
    flags.DEFINE_integer("rounds", 3, "Rounds of a workload.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("traps", True, "Measure what each avoided trap costs, too.", flag_values=values)
    flags.DEFINE_bool("fresh", False, "Measure again what OUT.json has.", flag_values=values)
    flags.DEFINE_string("out", "docs/results/peers", "Files without their .json and .md.", flag_values=values)
    flags.DEFINE_string("work", "runs/peers", "Directory of weights and logs.", flag_values=values)
    flags.DEFINE_string("rlrag_python", sys.executable, "Interpreter that has rlrag's packages.", flag_values=values)
    flags.DEFINE_string("tunix_python", ".venv-tunix/bin/python", "Interpreter that has Tunix.", flag_values=values)
    flags.DEFINE_string("torch_python", ".venv-torch/bin/python", "Interpreter that has TRL.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    for flag, known in (("workloads", WORKLOADS), ("contenders", MODULES)):
        for name in getattr(values, flag):
            if name not in known:
                raise ValueError(f"--{flag} has {name!r}: choose of {', '.join(known)}")
    pythons = {OURS: values.rlrag_python, TUNIX: values.tunix_python, TORCH: values.torch_python}
    work, out = Path(values.work).absolute(), Path(values.out)
    work.mkdir(parents=True, exist_ok=True)
    model = prepare_model(work / "model", pythons[TORCH])
    results, traps = out.with_suffix(".json"), out.with_name(f"{out.name}_traps.json")
    recorded = json.loads(results.read_text()) if results.exists() else {}
    for name in values.workloads:
        before = [] if values.fresh else recorded.get(name, {}).get("rounds", [])
        before = [each for each in before if set(each) == set(values.contenders)]
        if len(before) >= values.rounds:
            print(f"{name}: {results} has it (--fresh measures again)")
            continue
        commands = {each: command(pythons[each], each, work / name, model) for each in values.contenders}
        for one in measure(WORKLOADS[name], commands, before, values.rounds, work / name):
            recorded[name] = one
            recorded = {known: recorded[known] for known in WORKLOADS if known in recorded}
            results.write_text(json.dumps(recorded, indent=1) + "\n")
            write(out, recorded, traps)
    if values.traps and (values.fresh or not traps.exists()):
        measure_traps(pythons[OURS], traps)
    write(out, recorded, traps)
    print(f"{results} and {out.with_suffix('.md')}")


def measure_traps(python: str, file: Path) -> None:
    """What each costs that ours avoids, into a file."""
    print("what the traps cost", flush=True)
    arguments = [python, "-m", "launch.peers.traps", f"--out={file.absolute()}"]
    subprocess.run(arguments, cwd=ROOT, env=environment(), check=True)


def write(out: Path, recorded: Mapping[str, Any], traps: Path) -> None:
    """The report of what is known so far."""
    removed = json.loads(traps.read_text()) if traps.exists() else None
    out.with_suffix(".md").write_text(report.write(recorded, header(recorded), removed))


def prepare_model(folder: Path, torch_python: str) -> Path:
    """The weights and the tokenizer that all contenders load; made once."""
    from rlrag.agents.tokenizer import END, PAD, word_tokenizer

    if not (folder / "model.safetensors").exists():
        command = [torch_python, "-m", MODULES[TORCH], f"--make={folder}"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(command)} failed, `make bench-peers` installs what it needs:\n{done.stderr}")
    words = map(workloads.word, range(2, workloads.vocabulary_of(folder)))
    tokenizer = word_tokenizer(words)
    tokenizer.save(folder)
    assert (tokenizer.pad_id, tokenizer.end_id) == (workloads.PAD, workloads.END), (PAD, END)
    return folder


def environment() -> dict[str, str]:
    """Of a worker: it finds our modules, stays offline, and speaks up from warnings on."""
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }  # fmt: skip


def command(python: str, contender: str, folder: Path, model: Path) -> list[str]:
    own = folder / contender
    arguments = {"workload": folder / "workload.json", "model": model, "work": own}
    return [python, "-m", MODULES[contender], *(f"--{name}={path}" for name, path in arguments.items())]


def measure(
    workload: Workload, commands: Mapping[str, list[str]], before: list[dict[str, Message]], rounds: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """Start all, one after the other, compare their logits, then let them work in turn; what is known after each round.
    before: the rounds that were measured already."""
    folder.mkdir(parents=True, exist_ok=True)
    workloads.save(workload, folder / "workload.json")
    print(f"{workload.name}: {workload.describe()}", flush=True)
    with ExitStack() as running:
        contenders, ready, measured = {}, {}, list(before)
        for name, arguments in commands.items():
            clear(folder / name)
            contender = Contender(name, arguments, folder / f"{name}.log", environment(), ROOT)
            contenders[name] = running.enter_context(contender)
            ready[name] = contender.hear()
            print(f"  {name} is ready", flush=True)
        known = {
            "workload": asdict(workload),
            "date": str(datetime.date.today()),
            "versions": {name: message["versions"] for name, message in ready.items()},
            "agreement": compare(ready),
            "settings": ready.get(OURS, {}).get("settings", {}),
        }
        for number in range(len(before), rounds):
            measured.append({name: contender.ask(seed=number) for name, contender in contenders.items()})
            told = (f"{name} {answer['seconds']:.2f} s" for name, answer in measured[-1].items())
            print(f"  round {number + 1}/{rounds}: {', '.join(told)}", flush=True)
            for name, answer in measured[-1].items():
                if answer["tokens"] != workload.tokens:
                    raise ValueError(
                        f"{name} sampled {answer['tokens']} tokens, {workload.tokens} were asked for: lengths are not "
                        "forced"
                    )
            yield {**known, "rounds": measured}


def clear(folder: Path) -> None:
    """An empty folder in its place: a run that is found there would be gone on with."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def compare(ready: Mapping[str, Message]) -> dict[str, float]:
    """How far the peers' logits are from ours; ValueError where they are not the same model."""
    if OURS not in ready:
        return {}
    differences = {}
    for name, message in ready.items():
        if name == OURS:
            continue
        rows = zip(ready[OURS]["logits"], message["logits"], strict=True)
        differences[name] = max(abs(a - b) for ours, peer in rows for a, b in zip(ours, peer, strict=True))
        if not differences[name] <= AGREE:
            raise ValueError(f"the logits of {name} are {differences[name]} from ours: not the same model")
    return differences


def header(recorded: Mapping[str, Any]) -> dict[str, str]:
    """Where and with what it was measured."""
    versions: dict[str, dict[str, str]] = {}
    for one in recorded.values():
        versions |= one["versions"]
    return {
        "device": f"{processor()}, {len(os.sched_getaffinity(0))} cores, CPU alone",
        **{name: ", ".join(f"{package} {v}" for package, v in found.items()) for name, found in versions.items()},
        "command": "`make bench-peers`",
    }


def processor() -> str:
    """The name of the CPU, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")


if __name__ == "__main__":
    from launch.flags import run

    run(main, define_flags, doc=__doc__)
