"""Answers bAbI's questions from the sentences alone, by replaying them: written apart from the simulation."""

import re

FACT = re.compile(
    r"(?P<who>[A-Z][a-z]+) (?:"
    r"(?:went to|went back to|journeyed to|travelled to|moved to) the (?P<place>[a-z]+)"
    r"|(?:got|took|grabbed|picked up) the (?P<got>[a-z]+)(?: there)?"
    r"|(?:dropped|left|discarded|put down) the (?P<left>[a-z]+)(?: there)?"
    r"|(?:gave|handed|passed) the (?P<gave>[a-z]+) to (?P<whom>[A-Z][a-z]+)"
    r")\."
)
RELATION = re.compile(r"The (?P<one>[a-z]+) is (?P<way>north|south|east|west) of the (?P<other>[a-z]+)\.")


def facts_in(text: str) -> list[str]:
    """The facts among other sentences."""
    return [match.group() for match in re.finditer(f"{FACT.pattern}|{RELATION.pattern}", text)]


def answer(facts: list[str], question: str) -> str:
    """The answer; AssertionError where the facts do not give one."""
    if all(RELATION.fullmatch(fact) for fact in facts):
        return _lies(facts, question)
    where: dict[str, str] = {}
    carries: dict[str, str] = {}
    trail: dict[str, list[str]] = {}
    gifts: list[tuple[str, str, str]] = []
    for fact in facts:
        match = FACT.fullmatch(fact)
        assert match, fact
        who = match["who"]
        if match["place"]:
            assert where.get(who) != match["place"], "goes where they are"
            where[who] = match["place"]
        elif match["got"]:
            assert match["got"] not in carries, "takes what someone carries"
            before = trail.get(match["got"])
            assert before is None or before[-1] == where[who], "takes what lies elsewhere"
            carries[match["got"]] = who
        elif match["left"]:
            assert carries.pop(match["left"]) == who
        else:
            assert carries[match["gave"]] == who and where[who] == where[match["whom"]]
            carries[match["gave"]] = match["whom"]
            gifts.append((who, match["gave"], match["whom"]))
        for thing, holder in carries.items():
            visited = trail.setdefault(thing, [])
            if not visited or visited[-1] != where[holder]:
                visited.append(where[holder])
    return _asked(question, where, trail, gifts)


def _asked(
    question: str, where: dict[str, str], trail: dict[str, list[str]], gifts: list[tuple[str, str, str]]
) -> str:
    if match := re.fullmatch(r"Where is ([A-Z]\w+)\?", question):
        return where[match[1]]
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return trail[match[1]][-1]
    if match := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        visited = trail[match[1]]
        assert visited.count(match[2]) == 1
        return visited[visited.index(match[2]) - 1]
    for form, known, sought in (
        (r"What did (\w+) give to (\w+)\?", (0, 2), 1),
        (r"Who gave the (\w+) to (\w+)\?", (1, 2), 0),
        (r"Who did (\w+) give the (\w+) to\?", (0, 1), 2),
        (r"Who gave the (\w+)\?", (1,), 0),
        (r"Who received the (\w+)\?", (1,), 2),
    ):
        if match := re.fullmatch(form, question):
            return [gift for gift in gifts if tuple(gift[part] for part in known) == match.groups()][-1][sought]
    raise AssertionError(question)


def _lies(facts: list[str], question: str) -> str:
    step = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
    relations = [RELATION.fullmatch(fact).group("one", "way", "other") for fact in facts]
    (middle,) = set.intersection(*({one, other} for one, _, other in relations))
    at = {(0, 0): middle}
    for one, way, other in relations:
        across, up = step[way]
        at[(across, up) if other == middle else (-across, -up)] = one if other == middle else other
    assert len(at) == 3
    if match := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        assert match[2] == middle
        return at[step[match[1]]]
    match = re.fullmatch(r"What is the (\w+) (\w+) of\?", question)
    assert match and match[1] == middle, question
    across, up = step[match[2]]
    return at[(-across, -up)]
