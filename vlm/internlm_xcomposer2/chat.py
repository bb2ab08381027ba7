"""Messages -> the prompt text of an InternLM2 or InternLM-XComposer2 chat model.

Text only: it knows neither token ids nor image sizes. An image is the placeholder `<ImageHere>` inside a message;
`processing` replaces it by image positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

# The spelling every tokenizer.model of the family has as a piece; `<|im_start|>` and `<|im_end|>` are its newer names.
TURN_START = "[UNUSED_TOKEN_146]"
TURN_END = "[UNUSED_TOKEN_145]"
IMAGE_PLACEHOLDER = "<ImageHere>"
ROLES = ("system", "user", "assistant")

DEFAULT_SYSTEM = "You answer questions about text and images, briefly and honestly, in the language of the question."

# Everything that the tokenizer reads as a special piece: in a message it would open or close turns in another's name.
_MARKERS = re.compile(r"\[UNUSED_TOKEN_\d+\]|<\|(?:im|action)_(?:start|end)\|>|<\|(?:interpreter|plugin)\|>|</?s>")

Message = Mapping[str, str]


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


def chat_prompt(messages: Sequence[Message]) -> str:
    """Prompt text that ends where the assistant's answer begins; the leading `<s>` is the tokenizer's to add.

    No system turn unless the messages start with one (`DEFAULT_SYSTEM` is there to be used).
    Raises: ValueError naming every message that has another shape, role, place or a turn marker in its text.
    """
    _refuse_faults(messages)
    turns = [f"{TURN_START}{message['role']}\n{message['content']}{TURN_END}\n" for message in messages]
    return "".join([*turns, f"{TURN_START}assistant\n"])


def with_image_in_front(messages: Sequence[Message]) -> list[Message]:
    """The same messages with one image placeholder in front of the first user text, where later turns still see it."""
    _refuse_faults(messages)
    first_user_index = next(index for index, message in enumerate(messages) if message.get("role") == "user")
    changed = list(messages)
    content = f"{IMAGE_PLACEHOLDER}{messages[first_user_index]['content']}"
    changed[first_user_index] = {"role": "user", "content": content}
    return changed


def _refuse_faults(messages: Sequence[Message]) -> None:
    faults = [f"message {index} {fault}" for index, each in enumerate(messages) if (fault := _message_fault(each))]
    faults += _order_faults(messages)
    if faults:
        raise ValueError(
            f"{len(faults)} fault(s) in {len(messages)} messages: {'; '.join(faults)}. A conversation is "
            "an optional system message, then user and assistant in turns, ending with the user"
        )


def _message_fault(message: Message) -> str | None:
    """What is wrong with one message by itself."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"has the role {role!r}: known are {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"has content of type {type(content).__name__}: text is needed, with {IMAGE_PLACEHOLDER} for an image"
    if not content.strip():
        return f"({role}) is empty"
    if marker := _MARKERS.search(content):
        return f"({role}) contains the control text {marker.group()!r}: remove it"
    return None


def _order_faults(messages: Sequence[Message]) -> list[str]:
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    return [] if turns == expected else [f"the roles run {' '.join(map(str, roles)) or '(none)'}"]
