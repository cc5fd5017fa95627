"""One row of a published question-answering file to one Example.

    hotpotqa          HotpotQA JSON (train, dev distractor and fullwiki)
    2wikimultihopqa   2WikiMultiHopQA JSON
    musique           MuSiQue JSONL
    ircot             IRCoT / Adaptive-RAG JSONL of the three above
    bamboogle         rows with "Question" and "Answer"
    nq_open           NQ-open JSONL
    pooled            questions of a pooled corpus, with gold_ids
    search_r1         Search-R1 / verl parquet
    jsonl             {"question", "answers" or "answer"}, and where known "id", "hops", "gold", "scope", "solution"
    gsm8k             {"question", "answer": "reasoning #### number"}; the whole answer is kept as fields["solution"]
    chat              {"messages": [{"role", "content"}]}: the last user message asks, a reply to it is the solution
    prompt            {"prompt"}, and "answers", "answer" or "solution" where known

Fields that no part of an Example takes are kept by name in `Example.fields`; paragraphs that come with a question are
kept there as `fields["paragraphs"]`, a list of Passages whose ids are those of a pooled corpus (`passage_id`).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlrag.trajectory import Example, Passage

Row = Mapping[str, Any]

_ID_FIELDS = ("id", "_id", "qid", "question_id")
_ANSWER_FIELDS = ("answers", "answer", "golden_answers", "Answer")


def passage_id(title: str, text: str) -> str:
    """The id that a passage has in every pooled corpus: "w" + 12 hex digits of sha1(title + newline + text), both with
    white space collapsed. (A pooled corpus keeps one of several passages that differ in case or punctuation only, so
    an id made from another copy of the paragraph may be absent there.)"""
    return "w" + hashlib.sha1(f"{_collapse(title)}\n{_collapse(text)}".encode()).hexdigest()[:12]


def detect_format(row: Row) -> str:
    """The name of the format that a row is in, by its fields."""
    if "reward_model" in row:
        return "search_r1"
    if "answers_objects" in row:
        return "ircot"
    if "question_decomposition" in row:
        return "musique"
    if "context" in row and "supporting_facts" in row:
        return "2wikimultihopqa" if "evidences" in row else "hotpotqa"
    if "Question" in row:
        return "bamboogle"
    if "gold_ids" in row:
        return "pooled"
    if "messages" in row:
        return "chat"
    if "prompt" in row:
        return "prompt"
    if isinstance(row.get("question"), str) and "#### " in str(row.get("answer")):
        return "gsm8k"
    if "question" in row and any(name in row for name in _ANSWER_FIELDS):
        return "nq_open" if set(row) == {"question", "answer"} and isinstance(row["answer"], list) else "jsonl"
    names = ", ".join(str(name) for name in list(row)[:8]) + (", ..." if len(row) > 8 else "")
    raise ValueError(
        f"a row with fields {names or '(none)'} is of no known format; give rows with question and answers, or name "
        f"the format: {', '.join(PARSERS)}"
    )


def parse_row(row: Row, format: str, default_id: str) -> Example:
    """Turn a row into an Example; default_id names it where the row has no id of its own.

    Raises ValueError with the field, what is wrong with it and the remedy.
    """
    parse = PARSERS.get(format)
    if parse is None:
        raise ValueError(f"format is {format!r}: give one of {', '.join(PARSERS)}")
    return parse(row, default_id)


def _hotpotqa(row: Row, default_id: str) -> Example:
    return _with_sentences(row, default_id, joint="")


def _two_wiki(row: Row, default_id: str) -> Example:
    return _with_sentences(row, default_id, joint=" ")


def _with_sentences(row: Row, default_id: str, joint: str) -> Example:
    """context [[title, [sentence]]], supporting_facts [[title, sentence number]]. hops = supporting paragraphs.

    HotpotQA's sentences bring their leading spaces along, 2Wiki's do not: hence `joint`.
    """
    context, facts = _need(row, "context", list), _need(row, "supporting_facts", list)
    try:
        paragraphs = [_passage(title, joint.join(sentences)) for title, sentences in context]
        titles = list(dict.fromkeys(title for title, _ in facts))
    except (TypeError, ValueError):
        raise ValueError(
            "fields 'context' and 'supporting_facts' are not lists of [title, sentences] and [title, number]; "
            "give the published layout"
        ) from None
    by_title = {paragraph.title: paragraph for paragraph in reversed(paragraphs)}  # the first of a title wins
    found = (by_title.get(_collapse(title)) for title in titles)
    return _example(
        row,
        default_id,
        question=_need(row, "question", str),
        answers=_need(row, "answer"),
        hops=len(titles),
        gold=[paragraph.id for paragraph in found if paragraph is not None],  # fullwiki contexts may lack some
        paragraphs=paragraphs,
        used=("question", "answer", "context"),
    )


def _musique(row: Row, default_id: str) -> Example:
    """Gold passages in hop order, by the question's decomposition. Aliases count as answers."""
    steps, rows = _need(row, "question_decomposition", list), _need(row, "paragraphs", list)
    by_number = {_need(p, "idx", int): _passage(_need(p, "title", str), _need(p, "paragraph_text", str)) for p in rows}
    supports = [step.get("paragraph_support_idx") for step in steps]
    unknown = [number for number in supports if number is not None and number not in by_number]
    if unknown:
        raise ValueError(f"field 'paragraph_support_idx' is {unknown[0]}, which no paragraph has; give a listed idx")
    return _example(
        row,
        default_id,
        question=_need(row, "question", str),
        answers=[_need(row, "answer", str), *row.get("answer_aliases", [])],
        hops=len(steps),
        gold=[by_number[number].id for number in supports if number is not None],
        paragraphs=list(by_number.values()),
        used=("question", "answer", "answer_aliases", "paragraphs"),
    )


def _ircot(row: Row, default_id: str) -> Example:
    """answers_objects: any of their spans is right (else the number, else the date, as in DROP)."""
    answers: list[str] = []
    for answer in _need(row, "answers_objects", list):
        date = " ".join(filter(None, (answer.get("date", {}).get(part) for part in ("day", "month", "year"))))
        answers += answer.get("spans") or [answer.get("number") or date]
    contexts = _need(row, "contexts", list)
    paragraphs = [_passage(_need(p, "title", str), _need(p, "paragraph_text", str)) for p in contexts]
    gold = [paragraph.id for paragraph, p in zip(paragraphs, contexts) if p.get("is_supporting")]
    return _example(
        row,
        default_id,
        question=_need(row, "question_text", str),
        answers=answers,
        hops=len(set(gold)) or None,
        gold=gold,
        paragraphs=paragraphs,
        used=("question_text", "answers_objects", "contexts"),
    )


def _search_r1(row: Row, default_id: str) -> Example:
    """Question and answers from their own columns where present, else from the chat prompt (the text after its last
    "Question:") and the reward's ground truth. The id is "source/id": merged sets number each source from 0."""
    truth = _need(_need(row, "reward_model", dict), "ground_truth")
    answers = row.get("golden_answers")
    if answers is None:
        answers = truth["target"] if isinstance(truth, dict) and "target" in truth else truth
    question = row.get("question")
    if question is None:
        turns = [turn for turn in _need(row, "prompt", list) if turn.get("role") == "user"]
        if not turns:
            raise ValueError("field 'prompt' has no turn of role 'user'; give one, or a field 'question'")
        question = turns[-1]["content"].rpartition("Question:")[2]
    extra = row.get("extra_info") or {}
    number = row.get("id", "-".join(str(extra[name]) for name in ("split", "index") if name in extra))
    source = row.get("data_source")
    id = f"{source}/{number}" if source and number not in ("", None) else default_id
    return _example(
        {**row, "id": id}, default_id, question, answers, used=("question", "golden_answers", "reward_model")
    )


def _bamboogle(row: Row, default_id: str) -> Example:
    name = "answer" if "answer" in row else "Answer"
    return _example(row, default_id, _need(row, "Question", str), _need(row, name), used=("Question", name))


def _plain(row: Row, default_id: str) -> Example:
    name = next((name for name in _ANSWER_FIELDS if name in row), "answers")
    hops = row.get("hops")
    if hops is not None and (isinstance(hops, bool) or not isinstance(hops, int)):
        raise ValueError(f"field 'hops' is {hops!r}; give a whole number, or leave it out")
    gold = row.get("gold_ids", row.get("gold")) or []
    if not isinstance(gold, list) or not all(isinstance(id, str) for id in gold):
        raise ValueError(f"gold passage ids are {str(gold)[:60]!r}; give a list of strings")
    return _example(
        row,
        default_id,
        question=_need(row, "question", str),
        answers=_need(row, name),
        hops=hops,
        gold=gold,
        scope=row.get("scope"),
        used=("question", name, "hops", "gold_ids", "gold", "scope"),
    )


def _gsm8k(row: Row, default_id: str) -> Example:
    solution = _need(row, "answer", str)
    number = solution.rpartition("####")[2].strip().replace(",", "")
    rest = {name: value for name, value in row.items() if name not in ("question", "answer")}
    return _example(
        rest | {"solution": solution}, default_id, question=_need(row, "question", str), answers=number, used=()
    )


def _chat(row: Row, default_id: str) -> Example:
    messages = _need(row, "messages", list)
    try:
        asked = [n for n, m in enumerate(messages) if m["role"] == "user"][-1]
        question = messages[asked]["content"]
        replies = [m["content"] for m in messages[asked + 1 :] if m["role"] == "assistant"]
    except (TypeError, KeyError, IndexError):
        raise ValueError("field 'messages' holds no user message; give a list of {role, content}") from None
    return _free({**row, "question": question} | ({"solution": replies[0]} if replies else {}), default_id, "messages")


def _prompt(row: Row, default_id: str) -> Example:
    return _free({**row, "question": _need(row, "prompt", str)}, default_id, "prompt")


def _free(row: Row, default_id: str, used: str) -> Example:
    """A row whose answers may be unknown: its reward is then the user's own."""
    name = next((name for name in _ANSWER_FIELDS if name in row), None)
    fields = {key: value for key, value in row.items() if key not in (used, "question", name)}
    example = _example(fields, default_id, question=row["question"], answers=row[name] if name else "-", used=())
    return example if name else replace(example, answers=())


PARSERS: dict[str, Callable[[Row, str], Example]] = {
    "hotpotqa": _hotpotqa,
    "2wikimultihopqa": _two_wiki,
    "musique": _musique,
    "ircot": _ircot,
    "bamboogle": _bamboogle,
    "nq_open": _plain,
    "pooled": _plain,
    "search_r1": _search_r1,
    "jsonl": _plain,
    "gsm8k": _gsm8k,
    "chat": _chat,
    "prompt": _prompt,
}


def _example(
    row: Row,
    default_id: str,
    question: Any,
    answers: Any,
    *,
    hops: int | None = None,
    gold: Iterable[str] = (),
    scope: str | None = None,
    paragraphs: Sequence[Passage] | None = None,
    used: Sequence[str],
) -> Example:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question is {question!r}; give a text")
    id = next((row[name] for name in _ID_FIELDS if row.get(name) not in (None, "")), default_id)
    fields = {name: value for name, value in row.items() if name not in used and name not in _ID_FIELDS}
    if paragraphs is not None:
        fields["paragraphs"] = list(paragraphs)
    return Example(
        id=str(id),
        question=question.strip(),
        answers=clean_answers(answers),
        hops=hops,
        gold=tuple(dict.fromkeys(gold)),
        scope=scope,
        fields=fields,
    )


def clean_answers(answers: Any) -> tuple[str, ...]:
    """Gold answers as distinct, stripped, not empty strings: from one or a list of strings, numbers or truth values
    (yes, no). Raises ValueError where none is left."""
    values = answers if isinstance(answers, list | tuple) else [answers]
    texts = []
    for value in values:
        if isinstance(value, bool):
            texts.append("yes" if value else "no")
        elif isinstance(value, str | int | float):
            texts.append(str(value).strip())
        else:
            raise ValueError(f"the answers are {str(answers)[:60]!r}; give a string or a list of strings")
    kept = tuple(dict.fromkeys(text for text in texts if text))
    if not kept:
        raise ValueError(f"the answers are {str(answers)[:60]!r}; give at least one that is not empty")
    return kept


def _need(row: Row, name: str, kind: type | None = None) -> Any:
    if name not in row:
        raise ValueError(f"field {name!r} is missing; give it, or name another format")
    if kind is not None and not isinstance(row[name], kind):
        raise ValueError(f"field {name!r} is {str(row[name])[:60]!r}; give a {kind.__name__}")
    return row[name]


def _passage(title: str, text: str) -> Passage:
    return Passage(passage_id(title, text), _collapse(title), _collapse(text))


def _collapse(text: str) -> str:
    return " ".join(text.split())
