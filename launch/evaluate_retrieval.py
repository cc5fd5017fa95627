"""How good an index is:

    python -m launch.evaluate_retrieval --index=runs/words --index=runs/words,runs/dense \\
        --queries=queries.jsonl --qrels=qrels.tsv

A row for each --index (as launch.serve_retrieval names it: a directory, several fused by reciprocal rank, bm25:FILE)
and each --url (a server), with the measures of trec_eval and the queries a second. Files in BEIR's layout.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch.flags import run

MEASURES = ["recall@3", "recall@5", "recall@10", "recall@20", "ndcg@10", "mrr@10"]


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    flags.DEFINE_multi_string("index", [], "What is searched; several times for several rows.", flag_values=values)
    flags.DEFINE_multi_string("url", [], "Servers that are searched.", flag_values=values)
    flags.DEFINE_string("queries", None, "JSONL of {_id, text} or {id, question}.", flag_values=values)
    flags.DEFINE_string("qrels", None, "Tab-separated query-id, corpus-id, score.", flag_values=values)
    flags.DEFINE_string("encoder", "", "Instead of the one that an index names.", flag_values=values)
    flags.DEFINE_string("rerank", "", "module:function(query, passages) -> scores, or `encoder`.", flag_values=values)
    flags.DEFINE_integer("depth", 100, "Passages that fusing and reranking begin with.", flag_values=values)
    flags.DEFINE_string("on_device", "", "How launch.serve_retrieval searches flat indexes.", flag_values=values)
    flags.DEFINE_list("measures", MEASURES, "Names with a rank, as ndcg@10.", flag_values=values)
    flags.DEFINE_string("out", "", "File for the figures as JSON, per query too.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    from rlrag.retrieval import quality
    from rlrag.retrieval.directory import open_index
    from rlrag.retrieval.remote import HttpIndex

    depth = max(quality.parse(name)[1] for name in values.measures)
    if not values.index and not values.url:
        raise ValueError("there is nothing to search: give --index or --url")
    judgments = quality.read_judgments(Path(values.qrels))
    queries = {id: text for id, text in quality.read_queries(Path(values.queries)).items() if id in judgments}
    settings: dict[str, Any] = {name: values[name].value for name in ("encoder", "rerank", "depth", "on_device")}
    sources = [(name, lambda name=name: open_index(name, **settings)) for name in values.index]
    sources += [(url, lambda url=url: HttpIndex([url])) for url in values.url]
    width = max(len(name) for name, _ in sources)
    print(f"{len(queries)} queries".ljust(width), *(f"{name:>10}" for name in values.measures), f"{'queries/s':>10}")
    figures = {}
    for name, opened in sources:
        index = opened()
        begin = time.perf_counter()
        found = quality.search_all(index, queries, depth)
        rate = len(queries) / (time.perf_counter() - begin)
        per_query = quality.measure(found, {id: judgments[id] for id in queries}, values.measures)
        means = quality.mean(per_query)
        figures[name] = {"mean": means, "queries_per_s": rate, "per_query": per_query}
        print(name.ljust(width), *(f"{means[measure]:>10.4f}" for measure in values.measures), f"{rate:>10,.0f}")
    if values.out:
        Path(values.out).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run(main, define_flags, required={"queries": "queries.jsonl", "qrels": "qrels.tsv"}, doc=__doc__)
