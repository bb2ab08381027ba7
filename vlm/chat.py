"""Messages -> the prompt text of a chat model: one way to write turns per model, the same rules for all.

Text only: it knows neither token ids nor image sizes. An image is the placeholder `<ImageHere>` inside a message;
`processing` replaces it by image positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

IMAGE_PLACEHOLDER = "<ImageHere>"
ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How a model's conversations are written: `turns` by role, each around a `{}`, between `opening` and `answer`.

    `markers` matches what its tokenizer reads as a special piece: in a message it would open or close turns in
    another's name. `default_system` is the system turn of conversations that come without one.
    """

    turns: Mapping[str, str]
    answer: str
    markers: re.Pattern[str]
    opening: str = ""
    default_system: str | None = None

    def prompt(self, messages: Sequence[Message]) -> str:
        """Prompt text that ends where the assistant's answer begins.

        Raises: ValueError naming every message that has another shape, role, place or a turn marker in its text.
        """
        self.refuse_faults(messages)
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        # Not str.format: contents have braces of their own.
        turns = [self.turns[message["role"]].replace("{}", message["content"]) for message in messages]
        return "".join([self.opening, *turns, self.answer])

    def with_image_in_front(self, messages: Sequence[Message]) -> list[Message]:
        """The same messages with one image placeholder in front of the first user text, where later turns see it.

        Raises: ValueError as `prompt`.
        """
        self.refuse_faults(messages)
        first_user_index = next(index for index, message in enumerate(messages) if message.get("role") == "user")
        changed = list(messages)
        content = f"{IMAGE_PLACEHOLDER}{messages[first_user_index]['content']}"
        changed[first_user_index] = {"role": "user", "content": content}
        return changed

    def refuse_faults(self, messages: Sequence[Message]) -> None:
        """Raise ValueError naming everything that is wrong with a conversation."""
        faults = [
            f"message {index} {fault}" for index, each in enumerate(messages) if (fault := self._message_fault(each))
        ]
        faults += _order_faults(messages)
        if faults:
            raise ValueError(
                f"{len(faults)} fault(s) in {len(messages)} messages: {'; '.join(faults)}. A conversation is "
                "an optional system message, then user and assistant in turns, ending with the user"
            )

    def _message_fault(self, message: Message) -> str | None:
        """What is wrong with one message by itself."""
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return f"has the role {role!r}: known are {', '.join(ROLES)}"
        if not isinstance(content, str):
            return (
                f"has content of type {type(content).__name__}: text is needed, with {IMAGE_PLACEHOLDER} for an image"
            )
        if not content.strip():
            return f"({role}) is empty"
        if marker := self.markers.search(content):
            return f"({role}) contains the control text {marker.group()!r}: remove it"
        return None


def chat_messages(
    question: str, *, history: Iterable[tuple[str, str]] = (), system: str | None = None
) -> list[Message]:
    """Messages of one question after earlier (question, answer) pairs."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for earlier_question, answer in history:
        messages.append({"role": "user", "content": earlier_question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": question})
    return messages


def _order_faults(messages: Sequence[Message]) -> list[str]:
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    return [] if turns == expected else [f"the roles run {' '.join(map(str, roles)) or '(none)'}"]
