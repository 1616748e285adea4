"""Records into tokens as the tokenizer in the model's folder gives them: prompts with answers, and chats.

What a fine-tuned model has read are then the very ids that transformers' tokenizer makes of a prompt where it is used:
special tokens of a template, and those before every text. What a record spells like a special token stays text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from atlas_megatron.data.records import Record, check_unicode, value_at
from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.finetune.settings import FIELD

ANSWER, MESSAGES = "target", "messages"  # the fields that make a record a prompt with its answer, or a chat
LEARNED_ROLE = "assistant"


class TurnError(ValueError):
    """A chat whose learned turns cannot be told from the others."""


class Prompts:
    """Of one model and one template."""

    def __init__(self, folder: Path, template: str, tokenizer: Tokenizer) -> None:
        self.folder, self.template, self.tokenizer = folder, template, tokenizer

    @cached_property
    def _theirs(self) -> Any:
        """transformers' tokenizer, which runs no code of the folder."""
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"transformers cannot read the tokenizer in {self.folder} ({reason}); mend it") from error
        backend = getattr(found, "backend_tokenizer", None)
        if backend is not None and getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        return found

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        added = self._theirs.added_tokens_decoder
        named = zip(self._theirs.all_special_tokens, self._theirs.all_special_ids, strict=True)
        return {token.content: number for number, token in added.items() if token.special} | dict(named)

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        # The longest first: one may begin like another.
        ordered = sorted(filter(None, self._special_ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def answer(self, record: Record) -> tuple[np.ndarray, int]:
        """Prompt, answer and end, and how many of the first tokens are not learned. Raises ValueError."""
        prompt = self._prompt({name: field(record, name) for name in FIELD.findall(self.template)})
        answer = [*self.tokenizer.encode(field(record, ANSWER)), self.tokenizer.eod]
        if len(prompt) + len(answer) < 2:
            raise ValueError(f"{record.place}: prompt and answer are empty; remove it")
        return np.asarray([*prompt, *answer], dtype=np.int32), max(1, len(prompt))

    def _prompt(self, values: Mapping[str, str]) -> list[int]:
        text = FIELD.sub(lambda found: values[found[1]], self.template)
        if self._special and any(self._special.search(value) for value in values.values()):
            return [*self._before(), *self._apart(values)]
        plain = self._theirs(text, add_special_tokens=False).input_ids
        return [*self._before(), *plain]

    def _before(self) -> list[int]:
        """What the tokenizer writes before every text, as many do with the token that begins one."""
        plain = self._theirs("a", add_special_tokens=False).input_ids
        whole = self._theirs("a").input_ids
        place = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        return list(whole[:place])

    def _apart(self, values: Mapping[str, str]) -> list[int]:
        """A prompt some of whose values spell special tokens: those of the template count, and theirs are text."""
        assert self._special is not None
        ids: list[int] = []
        text = ""
        place = 0
        for found in [*re.finditer(f"{FIELD.pattern}|{self._special.pattern}", self.template), None]:
            text += self.template[place : found.start() if found else None]
            if found and found[1] is not None:
                text += values[found[1]]
            else:
                ids += self.tokenizer.encode(text) if text else []
                ids += [self._special_ids[found[0]]] if found else []
                text = ""
            place = found.end() if found else 0
        return ids

    def chat(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a chat by the tokenizer's template, and which of them are learned: the assistant's turns.

        Raises ValueError for a record that is no chat, and where the tokenizer has no template for it.
        """
        messages = _messages(record)
        if not self._theirs.chat_template:
            raise ValueError(
                f"{record.place} is a chat, and the tokenizer in {self.folder} has no chat template; put its "
                "chat_template.jinja there"
            )
        from jinja2 import TemplateSyntaxError

        try:
            ids, learned = self._masked(messages) if self._marks_turns() else self._by_turns(messages)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template in {self.folder} is none ({error}, line {error.lineno}); mend its "
                "chat_template.jinja"
            ) from error
        except TurnError as error:
            raise ValueError(f"{record.place}: {error}") from error
        except Exception as error:  # a template is a program, which may fail in any way
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"{record.place}: the chat template refuses it ({reason}); mend or remove it") from error
        if not any(learned):
            raise ValueError(f"{record.place}: no turn of the {LEARNED_ROLE}, so nothing is learned; remove it")
        special = {*self._special_ids.values(), self.tokenizer.eod}
        # Without an end the model would never stop. Most templates write one, some with a line end after it.
        if learned[-1] and not special.intersection(ids[-3:]):
            ids, learned = [*ids, self.tokenizer.eod], [*learned, True]
        return np.asarray(ids, dtype=np.int32), np.asarray(learned, dtype=bool)

    def _marks_turns(self) -> bool:
        return bool(re.search(r"\{%-?\s*generation\b", str(self._theirs.chat_template)))

    def _masked(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """By a template that says itself what the assistant generates."""
        found = self._theirs.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]

    def _by_turns(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """By what the template writes up to the start and up to the end of each turn of the assistant."""
        text = self._written(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == LEARNED_ROLE:
                before = self._written(messages[:number], answering=True)
                after = self._written(messages[: number + 1])
                if not text.startswith(before) or not text.startswith(after):
                    raise TurnError(
                        f"the chat template writes turn {number + 1} otherwise when more follow, and does not mark "
                        "it as generated; give each turn as a chat of its own"
                    )
                spans.append((len(before), len(after)))
        found = self._theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [any(begin <= start < end for begin, end in spans) for start, _ in found["offset_mapping"]]
        return list(found["input_ids"]), learned

    def _written(self, messages: list[dict[str, Any]], answering: bool = False) -> str:
        """What the template makes of turns; answering: with what it writes before the assistant's next one."""
        if not messages:
            return ""
        return str(
            self._theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
        )


def field(record: Record, name: str) -> str:
    """A record's text under a name, which may be a path. Raises ValueError naming the record."""
    try:
        value = value_at(record.values, name)
        found = f"{type(value).__name__}, not text"
    except KeyError:
        value, found = None, "nothing"
    if not isinstance(value, str):
        raise ValueError(
            f"{record.place}: {name!r} holds {found}; mend the line, or choose its fields with --prompt"
        )
    check_unicode(value, name, record.place)
    return value


def _messages(record: Record) -> list[dict[str, Any]]:
    found = record.values.get(MESSAGES)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{record.place}: {MESSAGES!r} holds no list of turns; mend or remove it")
    for number, turn in enumerate(found, start=1):
        role = turn.get("role") if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(turn.get("content"), str):
            raise ValueError(
                f"{record.place}: turn {number} is not {{\"role\": text, \"content\": text}}; mend or remove it"
            )
        check_unicode(turn["content"], MESSAGES, record.place)
    return found
