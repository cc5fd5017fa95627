"""Tasks made of what others wrote: questions from files, searches over a corpus, a vocabulary that can spell it all.

    data.train=questions.jsonl.gz?split=train   retriever.kind=bm25   retriever.corpus=passages.jsonl.gz

The tokenizer is loaded from `tokenizer.path`, or trained on the corpus: a byte-level BPE in which every tag is one
token. Training it takes seconds and gives the same vocabulary every time; it is kept all the same, since a model is
nothing without its vocabulary and a corpus can change.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlrag.agents.search import SearchAgent
from rlrag.agents.tags import Tags
from rlrag.agents.tokenizer import Tokenizer, train_bpe
from rlrag.agents.workflow import Script
from rlrag.config import Experiment
from rlrag.data.task import Task, agent_changes, open_source
from rlrag.data.traces import Traces
from rlrag.retrieval.client import Index
from rlrag.retrieval.index import Bm25Index, read_corpus
from rlrag.trajectory import Example, Passage, Trajectory

TRAINED_ON = "trained_on.json"  # beside a kept tokenizer: what it was trained on


def open_text_task(experiment: Experiment, workdir: Path | None = None) -> Task:
    """The task of an experiment whose data are not a world's. workdir: the run's directory, which keeps the tokenizer.

    Demonstrations need the supporting passages (`gold`); a question without them is searched for by its own words.
    Raises ValueError, naming the field and the remedy, for what is missing or does not fit.
    """
    passages = read_passages(experiment)
    tokenizer = open_tokenizer(experiment, corpus_texts(passages), workdir)
    tokenizer.pad_to(experiment.model.vocab_size)  # before the agent reads the vocabulary
    agent = SearchAgent(tokenizer, **agent_changes(experiment.agent))
    index = Openings(Bm25Index(passages), experiment.retriever.passage_words)
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


@dataclass(frozen=True)
class Openings:
    """An index that searches whole passages and returns their first `words` words (0: all), so that a short
    observation shows the opening of each and not the whole of one."""

    index: Index
    words: int

    def search(self, queries: Sequence[str], k: int, scopes: Sequence[str | None] | None = None) -> list[list[Passage]]:
        found = self.index.search(queries, k, scopes)
        return [[self._opening(passage) for passage in passages] for passages in found] if self.words else found

    def _opening(self, passage: Passage) -> Passage:
        return replace(passage, text=" ".join(passage.text.split()[: self.words]))


def read_passages(experiment: Experiment) -> list[Passage]:
    """The corpus of an experiment."""
    retriever = experiment.retriever
    if retriever.kind != "bm25":
        raise ValueError(
            f"retriever.kind is {retriever.kind!r}, which does not search a corpus: questions from files need "
            "--config.retriever.kind=bm25 and --config.retriever.corpus=FILE"
        )
    if not Path(retriever.corpus).is_file():
        raise ValueError(
            f"retriever.corpus is {retriever.corpus!r}, which is no file (seen from {Path.cwd()}): give "
            "--config.retriever.corpus=FILE, JSONL of {id, title, text} or {id, contents}"
        )
    return list(read_corpus(retriever.corpus))


def corpus_texts(passages: Sequence[Passage]) -> list[str]:
    return [f"{passage.title}\n{passage.text}" for passage in passages]


def open_tokenizer(experiment: Experiment, texts: Sequence[str], workdir: Path | None = None) -> Tokenizer:
    """The tokenizer of `tokenizer.path`; else the one kept in `tokenizer.cache` or in the run's directory; else one
    trained on the texts (of a corpus, of a task's rows), which is then kept there.

    Raises ValueError where the kept one was trained on something else.
    """
    settings = experiment.tokenizer
    if settings.path:
        return Tokenizer.load(settings.path)
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


def _digest(texts: Sequence[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(f"{text}\0".encode())
    return total.hexdigest()
