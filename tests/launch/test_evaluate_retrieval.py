import json
import subprocess
import sys
from pathlib import Path

from tests.retrieval.serving import Echo, serving
from tests.shared_data import FIXTURES

ROOT = Path(__file__).resolve().parents[2]


def evaluate(*arguments):
    command = [sys.executable, "-m", "launch.evaluate_retrieval", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_row_for_each_index_and_server(tmp_path):
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "Ada Holt"}\n{"_id": "2", "text": "bells"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\tb\t1\n1\tc\t1\n2\td\t1\n3\ta\t1\n")
    files = [f"--queries={tmp_path / 'queries.jsonl'}", f"--qrels={tmp_path / 'qrels.tsv'}"]
    index = f"bm25:{FIXTURES / 'corpus_titled.jsonl'}"
    out = tmp_path / "figures.json"
    with serving(Echo()) as url:
        done = evaluate(*files, f"--index={index}", f"--url={url}", "--measures=recall@5,mrr@5", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split()[:2] == ["2", "queries"] and len(done.stdout.splitlines()) == 3
    figures = json.loads(out.read_text())
    assert figures[index]["mean"] == {"recall@5": 0.75, "mrr@5": 0.75}  # b first, c not at all; d second
    assert figures[url]["mean"] == {"recall@5": 0, "mrr@5": 0}
    for arguments, message in (
        (files, "there is nothing to search"),
        ([*files, f"--index={index}", "--measures=bleu@4"], "measure is 'bleu@4'"),
        ([*files, "--index=nowhere"], "nowhere is no index"),
        (["--queries=none.jsonl", files[1], f"--index={index}"], "none.jsonl"),
    ):
        done = evaluate(*arguments)
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
