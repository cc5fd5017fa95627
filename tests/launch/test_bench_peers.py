"""The comparison with the peers at toy size, without their environments: who answers for them is made up here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import bench_peers
from launch.flags import run
from launch.peers import pairs, report, traps, workloads
from launch.peers.protocol import Contender, Pace
from launch.peers.workloads import OURS, TORCH, TUNIX, Workload
from rlrag.model.architecture import Architecture

ROOT = Path(__file__).resolve().parents[2]
TOY = Workload("toy", "generate", 2, 2, 16, 4, {TUNIX: 2.0, TORCH: 2.0})

# A contender that takes as long as it is told, and prints like a library.
FAKE = """
import sys, time
from launch.peers import workloads
from launch.peers.protocol import Channel, serve
channel, workload = Channel(), workloads.load(sys.argv[1])
print("not an answer", flush=True)
def work(seed):
    print("still none", flush=True)
    time.sleep(float(sys.argv[2]))
    return workload.tokens
serve(channel, work, 1, versions={"fake": "1"}, logits=[[float(sys.argv[3])]], settings={"slots": 4})
"""


def fake(workload: Path, seconds: float, logit: float = 0.0) -> list[str]:
    return [sys.executable, "-c", FAKE, str(workload), str(seconds), str(logit)]


def test_prompts_are_words_of_one_token_and_the_same_everywhere(tmp_path: Path):
    first = workloads.prompts(TOY, 3, 64)
    assert first == workloads.prompts(TOY, 3, 64) != workloads.prompts(TOY, 4, 64)
    assert [len(prompt.split()) for prompt in first] == [16, 16]
    assert {int(word[1:]) for prompt in first for word in prompt.split()} <= set(range(2, 64))
    workloads.save(TOY, tmp_path / "workload.json")
    assert workloads.load(tmp_path / "workload.json") == TOY
    assert TOY.tokens == 16


def test_a_contender_answers_however_much_it_prints_and_its_end_is_told(tmp_path: Path):
    workloads.save(TOY, tmp_path / "workload.json")
    with Contender("fake", fake(tmp_path / "workload.json", 0.02), tmp_path / "log", directory=ROOT) as contender:
        assert contender.hear()["ready"]
        answer = contender.ask(seed=1)
        assert answer["tokens"] == 16 and 0.02 <= answer["seconds"] < 5
    assert (tmp_path / "log").read_text().splitlines() == ["not an answer", "still none", "still none"]
    broken = [sys.executable, "-c", "raise RuntimeError('out of luck')"]
    with (
        Contender("broken", broken, tmp_path / "log") as contender,
        pytest.raises(ValueError, match=r"broken ended with status 1: see .*log\n(.|\n)*out of luck"),
    ):
        contender.hear()


def test_a_training_loop_is_paced_step_by_step():
    told, requests = [], [{"seed": 0}, {"seed": 1}, None]

    class Wire:
        def tell(self, **values):
            told.append(values)

        def wait(self):
            return requests.pop(0)

    pace = Pace(Wire(), 2, settings={})  # type: ignore[arg-type]
    assert [pace.step_ended(16, update_s=number) for number in range(4)] == [True, True, True, False]
    assert told[0] == {"ready": True, "settings": {}}
    assert [(each["tokens"], each["update_s"]) for each in told[1:]] == [(16, 2), (16, 3)]


REMOVED = {
    "jax": "0", "date": "2026-01-01",
    "rows": [
        {
            "trap": "a toy", "straight_ms": 300.0, "ours_ms": 2.5, "ratio": 119.5, "rounds": 5, "step": "update",
            "cost": 0.25,
        }
    ],
}  # fmt: skip


def recorded(kind: str = "generate") -> dict:
    """Three rounds, in which the machine's speed drifts."""
    rounds = [
        {
            name: {"seconds": speed * seconds, "tokens": 16}
            for name, seconds in ((OURS, 1.0), (TUNIX, 3.0), (TORCH, 1.5))
        }
        for speed in (1.0, 2.0, 4.0)
    ]
    rounds[0][OURS] |= {"update_s": 0.5, "device_s": 0.4}
    workload = {**vars(TOY), "kind": kind, "name": kind}
    return {
        "workload": workload, "date": "2026-01-01", "versions": {OURS: {"jax": "0"}}, "rounds": rounds,
        "agreement": {TUNIX: 1e-7}, "settings": {"rollout.burst": 8},
    }  # fmt: skip


def test_the_report_takes_ratios_within_rounds():
    text = report.write({"generate": recorded(), "grpo": recorded("grpo")}, {"device": "a toy"})
    assert "| rlrag | 2.00 (1.00-4.00) | 8 |  |  |  |" in text
    assert "| Tunix Sampler | 6.00 (3.00-12.00) | 3 | 3.00x (3.00-3.00) | 2x | reached |" in text
    assert "| TRL GRPOTrainer | 3.00 (1.50-6.00) | 5 | 1.50x (1.50-1.50) | 2x | **missed** |" in text
    assert "the update takes 0.50 s" in text
    assert "Each trap by itself" not in text
    assert "- device: a toy" in text and "tunix 1.0e-07" in text and "rollout.burst 8" in text


@pytest.fixture
def toys(monkeypatch, tmp_path: Path):
    """The bench with made-up contenders and one workload; what Tunix's logits are can be set."""
    logits = {TUNIX: 1e-6}
    monkeypatch.setattr(bench_peers, "WORKLOADS", {"toy": TOY, "decode_1": TOY})
    monkeypatch.setattr(bench_peers, "prepare_model", lambda folder, python: folder)

    def command(python: str, contender: str, folder: Path, model: Path) -> list[str]:
        seconds = {OURS: 0.01, TUNIX: 0.05, TORCH: 0.01}[contender]
        return fake(folder / "workload.json", seconds, logits.get(contender, 0.0))

    monkeypatch.setattr(bench_peers, "command", command)
    monkeypatch.setattr(bench_peers, "measure_traps", lambda python, file: file.write_text(json.dumps(REMOVED)))
    arguments = ["bench_peers", "--workloads=toy", "--rounds=2", f"--out={tmp_path / 'peers'}", f"--work={tmp_path}"]
    return lambda *more: run(bench_peers.main, bench_peers.define_flags, argv=[*arguments, *more]), logits


def test_the_bench_measures_writes_and_goes_on_from_what_it_has(toys, tmp_path: Path, capsys):
    bench, _ = toys
    bench()
    results = json.loads((tmp_path / "peers.json").read_text())
    assert [set(each) for each in results["toy"]["rounds"]] == [{OURS, TUNIX, TORCH}] * 2
    assert results["toy"]["agreement"] == {TUNIX: 1e-6, TORCH: 0.0}
    told = (tmp_path / "peers.md").read_text()
    assert "| Tunix Sampler |" in told
    assert "| a toy | 300 | 2.50 | 119.50x | +25% of update | 5 |" in told and "JAX 0, 2026-01-01." in told
    capsys.readouterr()
    bench()
    assert "has it (--fresh measures again)" in capsys.readouterr().out
    assert json.loads((tmp_path / "peers.json").read_text()) == results
    bench("--rounds=3")
    rounds = json.loads((tmp_path / "peers.json").read_text())["toy"]["rounds"]
    assert len(rounds) == 3 and rounds[:2] == results["toy"]["rounds"]


def test_other_models_and_unknown_names_are_told(toys, tmp_path: Path, capsys):
    bench, logits = toys
    logits[TUNIX] = 0.5
    for argument, message in (
        ("--rounds=1", "the logits of tunix are 0.5 from ours"),
        ("--workloads=decode_2", "--workloads has 'decode_2'"),
        ("--contenders=verl", "--contenders has 'verl'"),
    ):
        with pytest.raises(SystemExit):
            bench(argument)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "peers.json").exists()


def test_both_ways_around_every_trap_agree(tmp_path: Path):
    """At toy size each stands in the table, compared; the decode step, the rollout and the update give its cost."""
    a = Architecture(
        vocab_size=64, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, qkv_bias=True
    )
    toy = pairs.Setting(a, prompts=2, group=2, prompt_tokens=9, new_tokens=6, long_prompt=40, steps=3, burst=4)
    found = traps.main(["--rounds=1", f"--out={tmp_path / 'traps.json'}"], toy)
    assert json.loads((tmp_path / "traps.json").read_text()) == found
    assert len(found["rows"]) == 11 and len(report.traps(found)) == 2 + 11 + 2
    for row in found["rows"]:
        assert row["straight_ms"] > 0 and row["ours_ms"] > 0 and row["apart"] <= traps.AGREE
    assert {row["step"] for row in found["rows"]} == {"decode step", "rollout", "update"}


def test_ways_that_disagree_are_told(monkeypatch):
    wrong = pairs.Trap("a toy", lambda: np.ones(3), lambda: np.array([1, 1, 1.1]), 1, "update")
    monkeypatch.setattr(traps, "build", lambda setting: ([wrong], {"update": (lambda: None, 1)}))
    with pytest.raises(ValueError, match=r"a toy: results are 0\.1"):
        list(traps.measure(pairs.Setting(), 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A toy in Hugging Face's form with words for tokens."""
    import jax

    from rlrag.agents.tokenizer import word_tokenizer
    from rlrag.model.hf_export import export_model
    from rlrag.model.parameters import initialize

    folder = tmp_path_factory.mktemp("model")
    a = Architecture(
        vocab_size=64, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32, qkv_bias=True
    )
    export_model(initialize(a, jax.random.key(0)), a, folder)
    word_tokenizer(map(workloads.word, range(2, 64))).save(folder)
    return folder


@pytest.mark.parametrize("kind", ["generate", "grpo"])
def test_our_worker_decodes_and_trains(kind: str, model: Path, tmp_path: Path):
    workloads.save(Workload("toy", kind, 2, 2, 16, 4), tmp_path / "workload.json")
    command = [
        sys.executable, "-m", "launch.peers.ours", f"--workload={tmp_path / 'workload.json'}", f"--model={model}",
        f"--work={tmp_path}", "--warm_up=1",
    ]  # fmt: skip
    asked = "".join(json.dumps({"seed": seed}) + "\n" for seed in range(2))
    done = subprocess.run(command, input=asked, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    ready, *answers = map(json.loads, done.stdout.splitlines())
    assert len(ready["logits"]) == 16 and len(ready["logits"][0]) == 64
    assert ready["settings"]["rollout.num_slots"] == 4 and "jax" in ready["versions"]
    assert [answer["tokens"] for answer in answers] == [16, 16]
    if kind == "grpo":
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 3 and rows[0]["trained_tokens"] == 16 and rows[0]["micro_batches"] == 1
        assert answers[0]["update_s"] < answers[0]["seconds"]
