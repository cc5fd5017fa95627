"""A small pooled corpus of our own, in the layout of a published one: films, their directors, where those were born."""

import json
from pathlib import Path

from rlrag.data.formats import passage_id

FILMS = ("Red River", "Winter Light", "The Quiet Harbour", "Seven Bridges", "Glass Mountain", "Night Train",
         "The Salt Road", "Empty Rooms", "Silver Lake", "The Long Field", "Blue Island", "Last Summer")  # fmt: skip
DIRECTORS = ("Anna Berg", "Tomas Lind", "Maria Costa", "Peter Novak", "Elena Petrova", "John Hale", "Ines Silva",
             "Karl Brandt", "Lucia Romano", "David Stone", "Nora Dahl", "Hugo Meyer")  # fmt: skip
TOWNS = (
    "Bergen",
    "Uppsala",
    "Porto",
    "Brno",
    "Kazan",
    "Leeds",
    "Coimbra",
    "Bremen",
    "Siena",
    "Denver",
    "Aarhus",
    "Basel",
)
SETS = ("hotpotqa", "2wikimultihopqa", "musique")


def write_films(folder: Path) -> tuple[Path, Path]:
    """Twelve two-hop questions (eight train, four dev) and their 24 passages, as (questions, passages)."""
    passages, questions = [], []
    for number, (film, director, town) in enumerate(zip(FILMS, DIRECTORS, TOWNS, strict=True)):
        gold = [
            passage(
                f"{film} (film)", f"{film} is a film of {1950 + number} directed by {director} for a small studio."
            ),
            passage(director, f"{director} was a director and painter. The family lived in {town} for many years."),
        ]
        passages += gold
        questions.append({
            "id": f"film-{number}",
            "dataset": SETS[number % 3],
            "split": "train" if number < 8 else "dev",
            "question": f"In which town did the family of the director of {film} live?",
            "answers": [town],
            "type": "bridge",
            "hops": 2,
            "gold_ids": [p["id"] for p in gold],
        })  # fmt: skip
    return write(folder / "questions.jsonl", questions), write(folder / "passages.jsonl", passages)


def passage(title: str, text: str) -> dict[str, str]:
    return {"id": passage_id(title, text), "title": title, "text": text}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
