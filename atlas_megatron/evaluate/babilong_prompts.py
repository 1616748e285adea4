"""BABILong's prompts for qa1 ... qa5, word for word: booydar/babilong, babilong/prompts.py (Apache License 2.0).

An edition is named by the day from which its texts are those of that repository. There, the context is without white
space at its ends and the prompt ends with the question; a chat template around it is not used here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

TEMPLATE = (
    "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\nQuestion: {question}"
)
NEWEST = "2024-06-05"


@dataclass(frozen=True)
class Prompt:
    """What stands before the context."""

    instruction: str
    examples: str
    post_prompt: str


@dataclass(frozen=True)
class Edition:
    """source: whose texts these are. template: how they, the context and the question stand together."""

    source: str
    template: str
    prompts: dict[str, Prompt]


PROMPTS = {
    "qa1": Prompt(
        instruction=(
            "I will give you context with the facts about positions of different persons hidden in some random text "
            "and a question. You need to answer the question based only on the information from the facts. "
            "If a person was in different locations, use the latest location to answer the question."
        ),
        examples=(
            "<example>\n"
            "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. "
            "Where is Charlie?\n"
            "Answer: The most recent location of Charlie is balcony.\n"
            "</example>\n\n"
            "<example>\n"
            "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse "
            "travelled to balcony. Where is Alan?\n"
            "Answer: The most recent location of Alan is shop.\n"
            "</example>"
        ),
        post_prompt=(
            "Always return your answer in the following format: "
            "The most recent location of ’person’ is ’location’. Do not write anything else after that."
        ),
    ),
    "qa2": Prompt(
        instruction=(
            "I give you context with the facts about locations and actions of different persons "
            "hidden in some random text and a question."
            "You need to answer the question based only on the information from the facts.\n"
            "If a person got an item in the first location and travelled to the second location "
            "the item is also in the second location. "
            "If a person dropped an item in the first location and moved to the second location "
            "the item remains in the first location."
        ),
        examples=(
            "<example>\n"
            "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. "
            "Where is the bottle?\n"
            "Answer: The bottle is in the balcony.\n"
            "</example>\n"
            "<example>\n"
            "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where "
            "is the screw driver?\n"
            "Answer: The screw driver is in the kitchen.\n"
            "</example>"
        ),
        post_prompt=(
            "Always return your answer in the following format: The ’item’ is in ’location’. "
            "Do not write anything else after that."
        ),
    ),
    "qa3": Prompt(
        instruction=(
            "I give you context with the facts about locations and actions of different persons "
            "hidden in some random text and a question. "
            "You need to answer the question based only on the information from the facts.\n"
            "If a person got an item in the first location and travelled to the second location "
            "the item is also in the second location. "
            "If a person dropped an item in the first location and moved to the second location "
            "the item remains in the first location."
        ),
        examples=(
            "<example>\n"
            "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. "
            "Daniel journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the kitchen. "
            "Where was the apple before the kitchen?\n"
            "Answer: Before the kitchen the apple was in the bathroom.\n"
            "</example>\n"
            "<example>\n"
            "John went back to the bedroom. John went back to the garden. John went back to the kitchen. "
            "Sandra took the football. Sandra travelled to the garden. Sandra journeyed to the bedroom. "
            "Where was the football before the bedroom?\n"
            "Answer: Before the bedroom the football was in the garden.\n"
            "</example>"
        ),
        post_prompt=(
            "Always return your answer in the following format: "
            "Before the $location_1$ the $item$ was in the $location_2$. Do not write anything else after that."
        ),
    ),
    "qa4": Prompt(
        instruction=(
            "I will give you context with the facts about different people, their location and actions, hidden in "
            "some random text and a question. "
            "You need to answer the question based only on the information from the facts."
        ),
        examples=(
            "<example>\n"
            "The hallway is south of the kitchen. The bedroom is north of the kitchen. "
            "What is the kitchen south of?\n"
            "Answer: bedroom\n"
            "</example>\n"
            "<example>\n"
            "The garden is west of the bedroom. The bedroom is west of the kitchen. What is west of the bedroom?\n"
            "Answer: garden\n"
            "</example>"
        ),
        post_prompt="Your answer should contain only one word - location. Do not write anything else after that.",
    ),
    "qa5": Prompt(
        instruction=(
            "I will give you context with the facts about locations and their relations hidden in some random text "
            "and a question. You need to answer the question based only on the information from the facts."
        ),
        examples=(
            "<example>\n"
            "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. "
            "Bill took the milk there. Who did Mary give the apple to?\n"
            "Answer: Fred\n"
            "</example>\n"
            "<example>\n"
            "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. "
            "Bill travelled to the bedroom. Who gave the football?\n"
            "Answer: Jeff\n"
            "</example>\n"
            "<example>\n"
            "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the bedroom. "
            "Jeff went back to the garden. What did Fred give to Bill?\n"
            "Answer: apple\n"
            "</example>"
        ),
        post_prompt=(
            "Your answer should contain only one word. Do not write anything else after that. "
            "Do not explain your answer."
        ),
    ),
}


def _changed(prompt: Prompt, part: str, new: str, old: str) -> Prompt:
    """The prompt with words of an earlier edition in one part."""
    text = getattr(prompt, part)
    assert new in text, f"{new!r} stands in no {part}"
    return replace(prompt, **{part: text.replace(new, old)})


def _of_may_22() -> dict[str, Prompt]:
    """Before a space was put between two sentences of qa3's first example."""
    return PROMPTS | {"qa3": _changed(PROMPTS["qa3"], "examples", "bedroom. Mary", "bedroom.Mary")}


def _of_may_15() -> dict[str, Prompt]:
    """The first: a space at the end of qa1's, and in qa3's a stop missing, a wrong sign and a wrong answer."""
    later = _of_may_22()
    first, third = later["qa1"], later["qa3"]
    first = replace(first, post_prompt=f"{first.post_prompt} ")
    third = replace(third, instruction=third.instruction.removesuffix("."))
    third = _changed(third, "examples", "Before the bedroom the football", "Before the kitchen the football")
    third = _changed(third, "post_prompt", "$location_1$", "$location_1&")
    return later | {"qa1": first, "qa3": third}


# Newest first, then ours: what the examples say next is put in the model's mouth.
EDITIONS = {
    NEWEST: Edition(f"BABILong {NEWEST}", TEMPLATE, PROMPTS),
    "2024-05-22": Edition("BABILong 2024-05-22", TEMPLATE, _of_may_22()),
    "2024-05-15": Edition("BABILong 2024-05-15", TEMPLATE.replace("\n\n", "\n"), _of_may_15()),
    "answer": Edition(f'BABILong {NEWEST}, and "Answer:" after the question (ours)', f"{TEMPLATE}\nAnswer:", PROMPTS),
}
