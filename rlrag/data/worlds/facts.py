"""What is true in one world of the multi-hop task: its people, the chain asked for, and the facts written down.

A world is drawn from its question's id and a few settings, so nothing of it is ever stored: any process that knows
the id can draw it again.
"""

import random
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Name = tuple[str, str]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words("""
    Ada Boris Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Leon Maria Nils Olga Pavel Quinn Rosa Stefan Tessa
    Ulrich Vera Walter Xenia Yusuf Zelda Anton Bianca Carlos Daphne Emil Fiona Georg Hanna Ivan Julia Kurt Laura Marco
    Nora
""")
LAST_NAMES = _words("""
    Abbott Berger Castle Dunn Ellis Foster Grant Hale Ingram Jarvis Keller Lindt Moreau Nash Ortega Price Quist Reyes
    Sloan Turner Upton Vance Weber Xavier Young Zimmer Archer Becker Conrad Drake Evans Fuchs Gibson Hobbs Ibsen Jensen
    Klein Lopez Meyer Norris
""")
PLACES = _words("North South East West Upper Lower Old New Great Little")
TOWNS = _words("Harbor Bridge Field Haven Ridge Valley Ford Mill Port Spring")
PERSON_RELATIONS = ("mentor", "rival", "partner", "neighbor")
PLACE_RELATIONS = ("birthplace", "workplace")
RELATIONS = PERSON_RELATIONS + PLACE_RELATIONS
CURRENT, STALE = "current", "stale"
_STRATA = (4, 5, 0, 8, 1, 6, 7, 2, 9, 3)  # tenths of the unit interval by the last digit of a question's number


class Fact(NamedTuple):
    """One passage as a fact; `noise` is the retriever's fixed tie-break for it."""

    subject: Name
    relation: str
    marker: str
    object: Name
    noise: float

    @property
    def text(self) -> str:
        return f"{self.subject[0]} {self.subject[1]} {self.relation} {self.marker} {self.object[0]} {self.object[1]}"


class World(NamedTuple):
    """The facts of one question. `gold` indexes facts, in hop order."""

    subject: Name
    chain: tuple[str, ...]
    answer: Name
    facts: tuple[Fact, ...]
    gold: tuple[int, ...]


_IDENTITY = re.compile(r"multihop-(train|validation|test)-\d+-\d{6,}")


@lru_cache(8192)
def draw_world(
    identity: str,
    entities: int,
    hop_shares: tuple[float, ...],
    current_facts: int,
    stale_facts: int,
    stale_share: float,
    same_first_name: float,
) -> World:
    """The world of a question: names, the chain, the gold facts, their stale twins, then look-alikes until it is full.

    The latest 8192 are kept, about 5 kB each; threads may share the cache. Settings are those of `MultihopWorld`.
    """
    if not _IDENTITY.fullmatch(identity):
        raise ValueError(f"{identity!r} names no multi-hop question: an id looks like multihop-test-7-000012")
    # Seeded by the text, which Python hashes: whole numbers of one and of two words can give the same stream.
    dice = random.Random(identity)
    uniform = dice.random
    people = _people(entities, same_first_name, dice)

    def pick(options: Sequence) -> Any:
        return options[int(uniform() * len(options))]

    def thing(relation: str, subject: Name, taken: Sequence[Name]) -> Name:
        """An object for a relation that is neither its subject nor in `taken`."""
        while True:
            found = (pick(PLACES), pick(TOWNS)) if relation in PLACE_RELATIONS else pick(people)
            if found != subject and found not in taken:
                return found

    # Stratified, so that any ten questions in a row, and every beginning of a split, have the shares asked for.
    draw = (_STRATA[int(identity[-1])] + uniform()) / len(_STRATA)
    hops = 1
    while hops < len(hop_shares) and draw >= sum(hop_shares[:hops]):
        hops += 1
    chain = shuffled(PERSON_RELATIONS, dice)[: hops - 1]
    chain.append(pick([relation for relation in RELATIONS if relation not in chain]))

    path = [pick(people)]  # the people of the chain are different, so that no bridge is the answer
    facts: dict[tuple[Name, str], Name] = {}
    for relation in chain:
        facts[path[-1], relation] = following = thing(relation, path[-1], path)
        path.append(following)
    gold = list(facts)
    # A stale twin says what was true once: same subject and relation, another object.
    twins = [key for key in gold if uniform() < stale_share]
    stale = [(*key, thing(key[1], key[0], (facts[key],))) for key in twins]

    for subject, relation in gold:  # look-alikes: the same person's other relation, another person's same relation
        other = pick([word for word in RELATIONS if (subject, word) not in facts])
        facts[subject, other] = thing(other, subject, ())
        person = pick([one for one in people if (one, relation) not in facts])
        facts[person, relation] = thing(relation, person, ())
    while len(facts) < current_facts:
        key = pick(people), pick(RELATIONS)
        if key not in facts:
            facts[key] = thing(key[1], key[0], ())
    while len(stale) < stale_facts:
        person, relation = pick(people), pick(RELATIONS)
        if (person, relation) not in gold:
            true_now = facts.get((person, relation)) or person
            stale.append((person, relation, thing(relation, person, (true_now,))))

    passages = [
        Fact(subject, relation, CURRENT, found, 0.2 * uniform()) for (subject, relation), found in facts.items()
    ]
    passages += [Fact(subject, relation, STALE, found, 0.2 * uniform()) for subject, relation, found in stale]
    places = shuffled(range(len(passages)), dice)
    where = {place: number for number, place in enumerate(places)}
    return World(
        path[0], tuple(chain), path[-1], tuple(passages[i] for i in places), tuple(where[i] for i in range(hops))
    )


def shuffled(options: Sequence[Any], dice: random.Random) -> list[Any]:
    """The options in random order. Python keeps the stream of `random()` for ever, that of its `shuffle` it may change,
    and worlds must be the same on every version.
    """
    keys = [dice.random() for _ in options]
    return [options[i] for i in sorted(range(len(options)), key=keys.__getitem__)]


def _people(entities: int, same_first_name: float, dice: random.Random) -> list[Name]:
    """Names of the world's people, all different; in some worlds two of them share the first name."""
    firsts = shuffled(FIRST_NAMES, dice)[:entities]
    if dice.random() < same_first_name:
        firsts[1] = firsts[0]
    lasts = [LAST_NAMES[int(dice.random() * len(LAST_NAMES))] for _ in firsts]
    while firsts[0] == firsts[1] and lasts[0] == lasts[1]:
        lasts[1] = LAST_NAMES[int(dice.random() * len(LAST_NAMES))]
    return list(zip(firsts, lasts))
