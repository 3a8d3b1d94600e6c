"""The model's chat template: messages → a prompt.

It is the one of the model's tokenizer_config.json (microsoft/bitnet-b1.58-2B-4T); the one inside the published GGUF is
another model's. `<|begin_of_text|>`, then for each message `Role: content<|eot_id|>` with the role capitalised and the
content trimmed, then `Assistant: `.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BEGIN = "<|begin_of_text|>"
END_OF_TURN = "<|eot_id|>"
REPLY = "Assistant: "
NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
JINJA = (
    "{% for message in messages %}"
    "{% set content = message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Message:
    """What one side said; `role` is a key of `NAMES`."""

    role: str
    content: str

    @property
    def turn(self) -> str:
        """The text of the turn, without its end."""
        return f"{NAMES[self.role]}: {self.content.strip()}"


def tokens(messages: Sequence[Message], begin: int | None, end_of_turn: int | None) -> tuple[int | str, ...]:
    """The prompt as control tokens, which are ids, and texts in which nothing is one, whatever they spell."""
    prompt: list[int | str] = [] if begin is None else [begin]
    for message in messages:
        prompt.append(message.turn)
        if end_of_turn is not None:
            prompt.append(end_of_turn)
    return (*prompt, REPLY)


def text(messages: Sequence[Message]) -> str:
    """The prompt as a text that spells its control tokens."""
    return BEGIN + "".join(message.turn + END_OF_TURN for message in messages) + REPLY
