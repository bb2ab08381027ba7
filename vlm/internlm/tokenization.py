"""The tokenizer of a first InternLM or InternLM-XComposer: sentencepiece, as InternLM2's, with other specials."""

from __future__ import annotations

import re
from typing import ClassVar

from vlm.internlm_xcomposer2.tokenization import InternLM2Tokenizer, SpecialPieces

END_OF_HUMAN, END_OF_ANSWER = "<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>"
"""Pieces 103027 and 103028. Source: InternLM-XComposer `37b8258~1`, huggingface/internlm-xcomposer-vl/modeling."""


class InternLMTokenizer(InternLM2Tokenizer):
    """Encoder and decoder over one sentencepiece model; every `<TOKENS_UNUSED_n>` is matched whole."""

    specials: ClassVar = SpecialPieces(
        family="a first InternLM or InternLM-XComposer",
        reserved=re.compile(r"<TOKENS_UNUSED_\d+>"),
        needed=(END_OF_HUMAN, END_OF_ANSWER),
        stops=(END_OF_HUMAN, END_OF_ANSWER),
        piece_of_name={"<eoh>": END_OF_HUMAN, "<eoa>": END_OF_ANSWER},
    )
