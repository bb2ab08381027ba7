"""How InternLM2 and InternLM-XComposer2 write a conversation; the tokenizer adds the leading `<s>`."""

from __future__ import annotations

import re

from vlm.chat import IMAGE_PLACEHOLDER, ROLES, ChatFormat, Message, chat_messages

__all__ = ["CHAT", "DEFAULT_SYSTEM", "IMAGE_PLACEHOLDER", "Message", "chat_messages", "chat_prompt"]

# The spelling every tokenizer.model of the family has as a piece; `<|im_start|>` and `<|im_end|>` are its newer names.
TURN_START = "[UNUSED_TOKEN_146]"
TURN_END = "[UNUSED_TOKEN_145]"

DEFAULT_SYSTEM = "You answer questions about text and images, briefly and honestly, in the language of the question."

CHAT = ChatFormat(
    turns={role: f"{TURN_START}{role}\n{{}}{TURN_END}\n" for role in ROLES},
    answer=f"{TURN_START}assistant\n",
    markers=re.compile(r"\[UNUSED_TOKEN_\d+\]|<\|(?:im|action)_(?:start|end)\|>|<\|(?:interpreter|plugin)\|>|</?s>"),
)
"""No system turn unless the messages start with one (`DEFAULT_SYSTEM` is there to be used)."""

chat_prompt = CHAT.prompt
with_image_in_front = CHAT.with_image_in_front
