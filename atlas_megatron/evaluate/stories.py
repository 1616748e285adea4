"""Stories in the manner of bAbI's first five tasks: a small world is simulated, told in facts, and asked about.

After Weston et al. 2015, arXiv 1502.05698, with bAbI's people, places, things, verbs and forms of questions; the
simulation is ours. People and things are somewhere before the story begins, which is not told. Only a person whose
place has been told takes, leaves or gives a thing, and only one that is there: so every answer follows from the facts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
TRAVELLERS = ("Daniel", "John", "Mary", "Sandra")  # of qa1 to qa3
GIVERS = ("Bill", "Fred", "Jeff", "Mary")  # of qa5
MOVE = ("went to", "went back to", "journeyed to", "travelled to", "moved to")
TAKE = ("got", "took", "grabbed", "picked up")
LEAVE = ("dropped", "left", "discarded", "put down")
GIVE = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True)
class Story:
    """facts: sentences in their order. supporting: the places among them of those on which the answer rests."""

    facts: tuple[str, ...]
    question: str
    answer: str
    supporting: tuple[int, ...]


@dataclass(frozen=True)
class Plot:
    """How often each kind of event happens, as weights; a story has from `least` to `most` facts."""

    people: Sequence[str]
    moves: float
    takes: float
    leaves: float
    gives: float
    least: int
    most: int


PLOTS = {
    "qa1": Plot(TRAVELLERS, 1, 0, 0, 0, least=2, most=10),
    "qa2": Plot(TRAVELLERS, 0.6, 0.25, 0.15, 0, least=4, most=24),
    "qa3": Plot(TRAVELLERS, 0.6, 0.25, 0.15, 0, least=6, most=32),
    "qa5": Plot(GIVERS, 0.4, 0.25, 0.05, 0.3, least=4, most=24),
}


@dataclass(frozen=True)
class Sighting:
    """A thing is known to be at a place; facts: those that say so."""

    place: str
    facts: tuple[int, ...]


@dataclass(frozen=True)
class Gift:
    fact: int
    giver: str
    thing: str
    receiver: str


class World:
    """People and things at places, and the facts that told of them."""

    def __init__(self, plot: Plot, random: Random) -> None:
        self.plot, self.random = plot, random
        self.facts: list[str] = []
        self.at = {person: random.choice(PLACES) for person in plot.people}
        self.moved: dict[str, int] = {}  # each person's last move, by the fact that told of it
        self.lies = {thing: random.choice(PLACES) for thing in THINGS}  # where a thing was last put down
        self.holder: dict[str, str] = {}
        self.taken: dict[str, int] = {}  # the fact by which a thing came to its holder
        self.sightings: dict[str, list[Sighting]] = {thing: [] for thing in THINGS}
        self.gifts: list[Gift] = []

    def happen(self) -> None:
        """One event, told in one fact."""
        can_take = [
            (person, thing)
            for person in self.moved
            for thing in THINGS
            if thing not in self.holder and self.lies[thing] == self.at[person]
        ]
        can_leave = [(person, thing) for thing, person in self.holder.items()]
        can_give = [
            (person, thing, other)
            for thing, person in self.holder.items()
            for other in self.moved
            if other != person and self.at[other] == self.at[person]
        ]
        events: list[tuple[float, Callable[[], None]]] = [(self.plot.moves, self._move)]
        if can_take:
            events.append((self.plot.takes, lambda: self._take(*self.random.choice(can_take))))
        if can_leave:
            events.append((self.plot.leaves, lambda: self._leave(*self.random.choice(can_leave))))
        if can_give:
            events.append((self.plot.gives, lambda: self._give(*self.random.choice(can_give))))
        weights, kinds = zip(*events, strict=True)
        self.random.choices(kinds, weights)[0]()

    def _tell(self, text: str) -> int:
        self.facts.append(text)
        return len(self.facts) - 1

    def _there(self) -> str:
        return self.random.choice(("", " there"))

    def _move(self) -> None:
        person = self.random.choice(self.plot.people)
        self.at[person] = self.random.choice([place for place in PLACES if place != self.at[person]])
        self.moved[person] = self._tell(f"{person} {self.random.choice(MOVE)} the {self.at[person]}.")
        for thing, holder in self.holder.items():
            if holder == person:
                self._see(thing, person)

    def _take(self, person: str, thing: str) -> None:
        self.taken[thing] = self._tell(f"{person} {self.random.choice(TAKE)} the {thing}{self._there()}.")
        self.holder[thing] = person
        self._see(thing, person)

    def _leave(self, person: str, thing: str) -> None:
        self.taken[thing] = self._tell(f"{person} {self.random.choice(LEAVE)} the {thing}{self._there()}.")
        del self.holder[thing]
        self.lies[thing] = self.at[person]
        self._see(thing, person)

    def _give(self, person: str, thing: str, other: str) -> None:
        self.taken[thing] = self._tell(f"{person} {self.random.choice(GIVE)} the {thing} to {other}.")
        self.holder[thing] = other
        self.gifts.append(Gift(self.taken[thing], person, thing, other))
        self._see(thing, other)

    def _see(self, thing: str, person: str) -> None:
        """The thing is where the person is. At one place the latest sighting stands for all."""
        found = self.sightings[thing]
        if found and found[-1].place == self.at[person]:
            found.pop()
        found.append(Sighting(self.at[person], tuple(sorted((self.moved[person], self.taken[thing])))))

    def story(self, question: str, answer: str, supporting: Sequence[int]) -> Story:
        return Story(tuple(self.facts), question, answer, tuple(sorted(set(supporting))))


def where_is_a_person(world: World) -> Story | None:
    """qa1, one supporting fact: the person's last move."""
    person = world.random.choice(list(world.moved))
    return world.story(f"Where is {person}?", world.at[person], [world.moved[person]])


def where_is_a_thing(world: World) -> Story | None:
    """qa2, two supporting facts: who took, or left, the thing, and where that person went last, or had gone."""
    seen = [thing for thing in THINGS if world.sightings[thing]]
    if not seen:
        return None
    thing = world.random.choice(seen)
    last = world.sightings[thing][-1]
    return world.story(f"Where is the {thing}?", last.place, last.facts)


def where_was_a_thing(world: World) -> Story | None:
    """qa3, three supporting facts and more: a place that the thing came to once, and the one it came from."""
    asked = []
    for thing, found in world.sightings.items():
        places = [sighting.place for sighting in found]
        asked += [(thing, number) for number in range(1, len(found)) if places.count(places[number]) == 1]
    if not asked:
        return None
    thing, number = world.random.choice(asked)
    before, then = world.sightings[thing][number - 1 : number + 1]
    question = f"Where was the {thing} before the {then.place}?"
    return world.story(question, before.place, [*before.facts, *then.facts])


def who_gave_what_to_whom(world: World) -> Story | None:
    """qa5, one supporting fact: the last gift of which the question's terms hold."""
    if not world.gifts:
        return None
    gift = world.random.choice(world.gifts)
    giver, thing, receiver = gift.giver, gift.thing, gift.receiver
    forms: list[tuple[str, str, Callable[[Gift], bool]]] = [
        (f"What did {giver} give to {receiver}?", "thing", lambda g: (g.giver, g.receiver) == (giver, receiver)),
        (f"Who gave the {thing} to {receiver}?", "giver", lambda g: (g.thing, g.receiver) == (thing, receiver)),
        (f"Who did {giver} give the {thing} to?", "receiver", lambda g: (g.giver, g.thing) == (giver, thing)),
        (f"Who gave the {thing}?", "giver", lambda g: g.thing == thing),
        (f"Who received the {thing}?", "receiver", lambda g: g.thing == thing),
    ]
    question, part, holds = world.random.choice(forms)
    last = [other for other in world.gifts if holds(other)][-1]
    return world.story(question, getattr(last, part), [last.fact])


def where_a_place_lies(random: Random) -> Story:
    """qa4: two places lie around a third one, and one of the two facts answers, read forwards or backwards."""
    middle, *around = random.sample(PLACES, 3)
    directions = random.sample(list(OPPOSITE), 2)
    facts = []
    for place, direction in zip(around, directions, strict=True):
        if random.random() < 0.5:
            facts.append(f"The {place} is {direction} of the {middle}.")
        else:
            facts.append(f"The {middle} is {OPPOSITE[direction]} of the {place}.")
    asked = random.randrange(2)
    if random.random() < 0.5:
        question = f"What is {directions[asked]} of the {middle}?"
    else:
        question = f"What is the {middle} {OPPOSITE[directions[asked]]} of?"
    return Story(tuple(facts), question, around[asked], (asked,))


QUESTIONS = {
    "qa1": where_is_a_person,
    "qa2": where_is_a_thing,
    "qa3": where_was_a_thing,
    "qa5": who_gave_what_to_whom,
}


def tell(task: str, random: Random) -> Story:
    """A story of qa1 ... qa5."""
    if task == "qa4":
        return where_a_place_lies(random)
    plot = PLOTS[task]
    while True:
        world = World(plot, random)
        for _ in range(random.randint(plot.least, plot.most)):
            world.happen()
        story = QUESTIONS[task](world)
        # A short story may hold nothing to ask about; the next one will.
        if story:
            return story
