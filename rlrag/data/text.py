"""Tasks made of what others wrote: questions from files, searches over a corpus, a vocabulary that can spell it all.

    data.train=questions.jsonl.gz?split=train   retriever.kind=bm25   retriever.corpus=passages.jsonl.gz

The tokenizer is loaded from `tokenizer.path`, or trained on the corpus: a byte-level BPE in which every tag is one
token. Training it takes seconds and gives the same vocabulary every time; it is kept all the same, since a model is
nothing without its vocabulary and a corpus can change.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rlrag.agents.chat import Chat, chat_template, transformers_render
from rlrag.agents.search import SearchAgent
from rlrag.agents.tags import Tags
from rlrag.agents.tokenizer import Tokenizer, train_bpe
from rlrag.agents.workflow import Script
from rlrag.config import Experiment, Retriever
from rlrag.data.task import Task, agent_changes, open_source
from rlrag.data.traces import Traces
from rlrag.model.folder import folder_of
from rlrag.retrieval.bm25 import Bm25Index
from rlrag.retrieval.corpus import StoredPassages, read_corpus
from rlrag.retrieval.index import Index, Openings
from rlrag.trajectory import Example, Passage, Trajectory

TRAINED_ON = "trained_on.json"  # beside a kept tokenizer: what it was trained on


def open_text_task(experiment: Experiment, workdir: Path | None = None, remote: Index | None = None) -> Task:
    """The task of an experiment whose data are not a world's. workdir: the run's directory, which keeps the tokenizer.
    remote: what searches instead of an index in this process.

    Demonstrations need the supporting passages (`gold`); a question without them is searched for by its own words.
    Raises ValueError, naming the field and the remedy, for what is missing or does not fit.
    """
    passages = read_passages(experiment)
    tokenizer = open_tokenizer(experiment, corpus_texts(passages), workdir)
    tokenizer.pad_to(experiment.model.vocab_size)  # before the agent reads the vocabulary
    chat = open_chat(experiment, tokenizer, workdir)
    agent = SearchAgent(tokenizer, chat=chat, **agent_changes(experiment.agent))
    index = Openings(remote or open_local(experiment.retriever, passages), experiment.retriever.passage_words)
    data = experiment.data
    train, validation, test = (open_source(spec, data.format) for spec in (data.train, data.validation, data.test))
    traces = Traces(agent, {passage.id: passage for passage in passages})

    def search(queries: Sequence[str], k: int, scope: str | None) -> list[list[Passage]]:
        return index.search(queries, k, [scope] * len(queries))

    def demonstrate(example: Example, number: int) -> Trajectory:
        return traces.demonstrate(example, number, search)

    def random_policy(example: Example) -> Script:
        return traces.random_policy(example, prior)

    prior = [train[row].answers[0] for row in range(min(len(train), 1000))]
    bounds = {"random": random_policy}
    if any(test[row].gold for row in range(len(test))):
        bounds["oracle"] = traces.oracle
    return Task(tokenizer, agent, index, train, validation, test, demonstrate=demonstrate, bounds=bounds)


def open_local(retriever: Retriever, passages: Sequence[Passage]) -> Index:
    """The index in this process."""
    if retriever.kind == "bm25":
        return Bm25Index(passages)
    from rlrag.retrieval.directory import open_index

    source = f"milvus:{retriever.index}" if retriever.kind == "milvus" else retriever.index
    return open_index(source, encoder=retriever.encoder, rerank=retriever.rerank, depth=retriever.depth)


def read_passages(experiment: Experiment) -> list[Passage]:
    """The corpus of an experiment: the file it names, or what is stored beside its index. Demonstrations and a
    tokenizer are made from it; none where neither is wanted and the search is done elsewhere."""
    retriever = experiment.retriever
    if retriever.kind == "world":
        raise ValueError(
            "retriever.kind is 'world', which does not search a corpus: questions from files need "
            "--config.retriever.kind=bm25 and --config.retriever.corpus=FILE"
        )
    if retriever.corpus and Path(retriever.corpus).is_file():
        return list(read_corpus(retriever.corpus))
    first = Path(retriever.index.split(",")[0])
    if not retriever.corpus and retriever.kind == "index" and first.is_dir():
        return list(StoredPassages(first))
    elsewhere = retriever.url or retriever.kind == "milvus"
    demonstrated = experiment.warm_up.steps and not experiment.warm_start
    if not retriever.corpus and elsewhere and experiment.tokenizer.path and not demonstrated:
        return []
    wanted_for = "" if retriever.kind == "bm25" else ", from which demonstrations and a tokenizer are made"
    raise ValueError(
        f"retriever.corpus is {retriever.corpus!r}, which is no file (seen from {Path.cwd()}): give "
        f"--config.retriever.corpus=FILE, JSONL of {{id, title, text}} or {{id, contents}}{wanted_for}"
    )


def corpus_texts(passages: Sequence[Passage]) -> list[str]:
    return [f"{passage.title}\n{passage.text}" for passage in passages]


def open_tokenizer(experiment: Experiment, texts: Sequence[str], workdir: Path | None = None) -> Tokenizer:
    """The tokenizer of `tokenizer.path`; else of the model's folder; else the one kept in `tokenizer.cache` or in the
    run's directory; else one trained on the texts (of a corpus, of a task's rows), which is then kept there.

    Raises ValueError where the kept one was trained on something else.
    """
    settings = experiment.tokenizer
    if settings.path:
        return Tokenizer.load(settings.path)
    if experiment.model.path:
        return Tokenizer.load(folder_of(experiment.model.path, workdir))
    size, tags = settings.train_vocab_size, Tags().strings
    folder = Path(settings.cache) if settings.cache else workdir and workdir / "tokenizer"
    trained_on = {"sha256": _digest(texts), "vocab_size": size, "special": list(tags)}
    kept = json.loads((folder / TRAINED_ON).read_text()) if folder and (folder / TRAINED_ON).is_file() else None
    if folder and kept is not None:
        if kept == trained_on:
            return Tokenizer.load(folder)
        if settings.cache or any((folder.parent / "checkpoints").glob("*")):  # else nothing was learned with it yet
            different = ", ".join(name for name in trained_on if kept.get(name) != trained_on[name])
            raise ValueError(
                f"{folder} holds a tokenizer trained on other texts or another size ({different} differ): remove it, "
                "choose another place with --config.tokenizer.cache=DIR, or use it with --config.tokenizer.path"
            )
    tokenizer = train_bpe(iter(texts), size, special=tags)
    if folder:
        tokenizer.save(folder)
        (folder / TRAINED_ON).write_text(json.dumps(trained_on) + "\n")  # last: it says that the folder is whole
    return tokenizer


def open_chat(experiment: Experiment, tokenizer: Tokenizer, workdir: Path | None = None) -> Chat | None:
    """The chat template of the tokenizer's folder where the experiment wants it."""
    if not experiment.tokenizer.chat_template:
        return None
    if not experiment.tokenizer.path and not experiment.model.path:
        raise ValueError(
            "tokenizer.chat_template is true, but a tokenizer made here has no template: give --config.model.path=DIR "
            "or --config.tokenizer.path=DIR"
        )
    folder = experiment.tokenizer.path or folder_of(experiment.model.path, workdir)
    from transformers import AutoTokenizer  # a second or two, and only here

    return chat_template(tokenizer, transformers_render(AutoTokenizer.from_pretrained(str(folder))))


def _digest(texts: Sequence[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(f"{text}\0".encode())
    return total.hexdigest()
