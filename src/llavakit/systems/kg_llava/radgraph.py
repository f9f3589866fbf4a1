"""RadGraph's output: entities and relations of a report put together to observations, and texts as it tokenises them.

The network is not here; these are the steps around it (`radgraph/radgpt.py` and `radgraph/utils.py`, MIT).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llavakit.errors import UserError, quoted

RELATIONS = ("suggestive_of", "located_at", "modify")
OBSERVATION, ANATOMY = "Observation", "Anatomy"
TAGS = ("definitely absent", "uncertain", "definitely present")  # the first that an entity has counts
_EDGES = "\n .\"'"
_WORDS = re.compile(r"\w+|[^\w\s]+")  # NLTK's wordpunct

Entities = Mapping[str, Mapping[str, Any]]


def check(graph: Mapping[str, Any], *, known: bool = True) -> Entities:
    """The entities of an annotation.

    Args:
        known: Refuse relations other than `RELATIONS`; the original passes over them.

    Raises:
        UserError: Naming the first that is not in order, or whose relation is unknown or leads nowhere.
    """
    entities = graph.get("entities")
    if not isinstance(entities, Mapping):
        raise UserError(f"entities is {quoted(entities)}; must be an object")
    for number, entity in entities.items():
        kinds = {"tokens": str, "label": str, "start_ix": int, "end_ix": int, "relations": list}
        for key, kind in kinds.items():
            if not isinstance(entity, Mapping) or not isinstance(entity.get(key), kind):
                raise UserError(f"entity {number} has no {key} of its kind")
        for relation in entity["relations"]:
            if not isinstance(relation, Sequence) or len(relation) != 2:
                raise UserError(f"entity {number}: relation {quoted(relation)}; must be [kind, entity]")
            if known and relation[0] not in RELATIONS:
                listed = ", ".join(RELATIONS)
                raise UserError(f"entity {number}: relation {quoted(relation[0])} is unknown; known: {listed}")
            if relation[0] in RELATIONS and relation[1] not in entities:
                raise UserError(f"entity {number}: relation to {quoted(relation[1])}, which is no entity")
    return entities


def _targets(entity: Mapping[str, Any], kind: str) -> list[str]:
    return [to for relation, to in entity["relations"] if relation == kind]


def suggestions(graph: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Subject and object of every `suggestive_of` of an observation, in order."""
    entities = check(graph)
    for entity in entities.values():
        if OBSERVATION in entity["label"]:
            for target in _targets(entity, "suggestive_of"):
                yield entity["tokens"], entities[target]["tokens"]


def _modifiers(entities: Entities, kind: str) -> dict[str, list[str]]:
    """What modifies an entity, among entities of a kind.

    An entity that its first modifier has for its only one is left out: of two that modify each other one is kept.
    """
    found: dict[str, list[str]] = {}
    for number, entity in entities.items():
        if kind in entity["label"]:
            for target in _targets(entity, "modify"):
                found.setdefault(target, []).append(number)
    kept: dict[str, list[str]] = {}
    for target, modifiers in found.items():
        if kept.get(modifiers[0]) != [target]:
            kept[target] = modifiers
    return kept


def _gathered(entities: Entities, number: str, modifiers: Mapping[str, list[str]], seen: set[str]) -> list[str]:
    """An entity behind whatever modifies it, each once."""
    if number in seen:
        return []
    seen.add(number)
    inner = [one for other in modifiers.get(number, ()) for one in _gathered(entities, other, modifiers, seen)]
    return [*inner, number]


class _Name:
    """An entity with its modifiers: words in the order of the text, and where they begin and end."""

    def __init__(self, entities: Entities, number: str, modifiers: Mapping[str, list[str]]) -> None:
        self.parts = [entities[one] for one in _gathered(entities, number, modifiers, set())]
        first = {entity["start_ix"]: entity["tokens"] for entity in reversed(self.parts)}
        begins = sorted(int(entity["start_ix"]) for entity in self.parts)
        self.text = " ".join(dict.fromkeys(first[begin] for begin in begins)).lower().strip(_EDGES)
        self.begins = list(dict.fromkeys(begins))
        self.ends = sorted({int(entity["end_ix"]) for entity in self.parts})


def observations(graph: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The main observations of a report, each with its modifiers, place, certainty and what it suggests.

    Args:
        graph: `text` and `entities` of an annotation: `tokens`, `label`, `start_ix`, `end_ix`, `relations`.

    Raises:
        UserError: If an entity is not in order.
    """
    entities = check(graph, known=False)
    of_observations, of_anatomy = _modifiers(entities, OBSERVATION), _modifiers(entities, ANATOMY)
    found = []
    for number, entity in entities.items():
        if OBSERVATION not in entity["label"] or _targets(entity, "modify"):
            continue
        name = _Name(entities, number, of_observations)
        labels = {part["label"].rpartition("::")[2] for part in name.parts if OBSERVATION in part["label"]}
        places = [_Name(entities, target, of_anatomy) for target in _targets(entity, "located_at")]
        places = [place for place in places if not _within(place.text, [other.text for other in places])]
        targets = [entities[target]["tokens"] for target in _targets(entity, "suggestive_of")]
        texts = [f"{entity['tokens']} suggestive of {target}" for target in targets]
        found.append(
            {
                "observation": name.text,
                "observation_start_ix": name.begins,
                "located_at": [place.text for place in places],
                "located_at_start_ix": [place.begins for place in places],
                "tags": [next((tag for tag in TAGS if tag in labels), TAGS[-1])],
                "suggestive_of": [text for text in texts if not _within(text, texts)] or None,
                "observation_end_ix": name.ends,
            }
        )
    return found


def _within(text: str, others: Sequence[str]) -> bool:
    """Whether another text holds this one, and every word of it as a word."""
    return any(text != other and text in other and set(text.split()) <= set(other.split()) for other in others)


def tokenised(report: str) -> str:
    """A report as RadGraph-XL reads it: words and punctuation separated by blanks."""
    for old, new in (("\\n", "  "), ("\\f", "  "), ("\\u2122", "      "), ("\n", " "), ('\\"', "``")):
        report = report.replace(old, new)
    report = " ".join(_WORDS.findall(re.sub(r"\s+", " ", report)))
    for old, new in ((").", ") ."), ("%.", "% ."), (".'", ". '"), ("%,", "% ,"), ("%)", "% )")):
        report = report.replace(old, new)
    return report


def entities_of(spans: Sequence[Sequence[Any]], relations: Sequence[Sequence[Any]], words: Sequence[str]) -> Entities:
    """Entities of the spans that the network predicts.

    Args:
        spans: `[start, end, label]`, ends included.
        relations: `[start, end, start of the target, end of the target, kind]`; those to what is no entity are left
            out.
        words: The tokens of the report.
    """
    places = [list(span[:2]) for span in spans]
    found = {}
    for number, (start, end, label, *_) in enumerate(spans, 1):
        own = [relation for relation in relations if list(relation[:2]) == [start, end]]
        found[str(number)] = {
            "tokens": " ".join(words[start : end + 1]),
            "label": label,
            "start_ix": start,
            "end_ix": end,
            "relations": [[to[4], str(places.index(list(to[2:4])) + 1)] for to in own if list(to[2:4]) in places],
        }
    return found
