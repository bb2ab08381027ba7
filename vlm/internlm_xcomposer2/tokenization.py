"""Text <-> token ids with the sentencepiece model (`tokenizer.model`) of an InternLM2 or InternLM-XComposer2 folder.

What the first InternLM's tokenizer does otherwise is said by another `SpecialPieces`.

No code of the folder is run. It knows nothing of images: an image position is only an id that `processing` inserts.
Ids are looked up by piece, so a small test vocabulary works like the real one.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import sentencepiece

from planner.errors import SourceError
from vlm.checkpoint import refuse_lfs_pointer

TOKENIZER_FILE = "tokenizer.model"

# Newer names of six pieces. Source: InternLM/InternLM:chat/chat_format.md, ids 92543 down to 92538.
PIECE_OF_NAME = {
    "<|im_start|>": "[UNUSED_TOKEN_146]",
    "<|im_end|>": "[UNUSED_TOKEN_145]",
    "<|action_start|>": "[UNUSED_TOKEN_144]",
    "<|action_end|>": "[UNUSED_TOKEN_143]",
    "<|interpreter|>": "[UNUSED_TOKEN_142]",
    "<|plugin|>": "[UNUSED_TOKEN_141]",
}
_SPACE_MARK = "\u2581"
# Protobuf messages merge when concatenated and the last scalar wins: normalizer_spec {add_dummy_prefix: false}.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialPieces:
    """Which pieces of a vocabulary are read whole, and what conversations need of them.

    `reserved` matches pieces beside the control ones; `piece_of_name` are other names of pieces. Without those `needed`
    it is the tokenizer of another `family`. `stops` end an answer, as the end of the sequence does.
    """

    family: str
    reserved: re.Pattern[str]
    needed: tuple[str, ...]
    stops: tuple[str, ...]
    piece_of_name: Mapping[str, str] = field(default_factory=dict)


class InternLM2Tokenizer:
    """Encoder and decoder over one sentencepiece model.

    Special pieces (`<s>`, `</s>`, every `[UNUSED_TOKEN_n]` and its newer name) are matched whole before sentencepiece
    sees the text between them. The space that some models put in front of a text (dummy prefix) goes in front of plain
    text that starts the sequence, and never after a special piece. The official slow tokenizer gives sentencepiece the
    whole text, with the same ids but for one case: of a text that starts with a special piece, a model with dummy
    prefix would make a lone space first, and here it does not.
    """

    specials: ClassVar = SpecialPieces(
        family="an InternLM2 or InternLM-XComposer2",
        reserved=re.compile(r"\[UNUSED_TOKEN_\d+\]"),
        needed=("[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]"),
        stops=("[UNUSED_TOKEN_145]",),
        piece_of_name=PIECE_OF_NAME,
    )

    def __init__(self, model_bytes: bytes, *, where: str = TOKENIZER_FILE) -> None:
        self._at_start = _processor(model_bytes, where)
        self._continued = _processor(model_bytes + _NO_DUMMY_PREFIX, where)
        self._adds_dummy_prefix = self._at_start.encode("a") != self._continued.encode("a")
        self._id_of_special = _special_ids(self._at_start, self.specials, where)
        self._special_ids = frozenset(self._id_of_special.values()) | {self._at_start.unk_id()}
        self._special_pattern = re.compile("|".join(map(re.escape, self._id_of_special)))

    @classmethod
    def from_folder(cls, path: str | Path) -> InternLM2Tokenizer:
        """The tokenizer of a model folder.

        Raises: SourceError when `tokenizer.model` is missing, unreadable, a Git LFS pointer or no model of this family.
        """
        file = Path(path) / TOKENIZER_FILE
        try:
            refuse_lfs_pointer(file)
            model_bytes = file.read_bytes()
        except OSError as error:
            raise SourceError(
                f"{file} cannot be read: {error.strerror or error}. A model folder of this family holds its "
                "sentencepiece model under that name; download it next to config.json"
            ) from error
        return cls(model_bytes, where=str(file))

    @property
    def vocab_size(self) -> int:
        return self._at_start.get_piece_size()

    @property
    def bos_id(self) -> int:
        return self._at_start.bos_id()

    @property
    def eos_id(self) -> int:
        return self._at_start.eos_id()

    @property
    def pad_id(self) -> int:
        """The model's padding id, or the end-of-sequence id where it has none, as in every model of the family."""
        pad_id = self._at_start.pad_id()
        return pad_id if pad_id >= 0 else self.eos_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer, `</s>` and the end of a turn: the `eos_token_id` of generate."""
        return self.eos_id, *(self._id_of_special[piece] for piece in self.specials.stops)

    def id_of(self, special: str) -> int | None:
        """Id of a special piece in either spelling; None when the model has no such piece."""
        return self._id_of_special.get(special)

    def encode(self, text: str, add_bos: bool = True, *, continued: bool = False) -> list[int]:
        """Ids of a text; `continued` says that other tokens precede it, so that it gets no dummy prefix.

        Raises: ValueError when the text is not valid Unicode (a lone surrogate).
        """
        _refuse_surrogates(text)
        ids = [self.bos_id] if add_bos else []
        end = 0
        for match in self._special_pattern.finditer(text):
            ids += self._plain_ids(text[end : match.start()], at_start=end == 0 and not continued)
            ids.append(self._id_of_special[match.group()])
            end = match.end()
        return ids + self._plain_ids(text[end:], at_start=end == 0 and not continued)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; the text of a longer list always starts with the text of its beginning.

        For that, a last character whose bytes are not all there yet is left out; bytes that can no longer become
        one are shown as U+FFFD. Takes tensors, and is what transformers' TextStreamer asks of a tokenizer.
        Raises: ValueError for an id outside the vocabulary.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text: list[str] = []
        # Only text that starts the sequence was given a dummy prefix by `encode`.
        may_have_prefix = self._adds_dummy_prefix
        for token_id in map(int, ids):
            if token_id not in self._special_ids:
                plain = decoder.decode(self._bytes_of(token_id))
                text.append(plain[1:] if may_have_prefix and plain.startswith(" ") else plain)
                may_have_prefix = False
                continue
            text.append(decoder.decode(b"", final=True))
            text.append("" if skip_special_tokens else self._at_start.id_to_piece(token_id))
            may_have_prefix = may_have_prefix and token_id == self.bos_id
        return "".join(text)

    def _plain_ids(self, text: str, *, at_start: bool) -> list[int]:
        processor = self._at_start if at_start else self._continued
        return list(processor.encode(text))

    def _bytes_of(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"id {token_id} is outside the vocabulary of {self.vocab_size} pieces (0 to size - 1)")
        piece = self._at_start.id_to_piece(token_id)
        if self._at_start.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()


def _processor(model_bytes: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    if not model_bytes:
        raise SourceError(f"{where} is empty (0 bytes), but must be a sentencepiece model. Download the file again")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    except RuntimeError as error:
        raise SourceError(
            f"{where} ({len(model_bytes)} bytes) is not a readable sentencepiece model: {error}. "
            "It may be cut off or be another file; download it again"
        ) from error


def _special_ids(
    processor: sentencepiece.SentencePieceProcessor, specials: SpecialPieces, where: str
) -> dict[str, int]:
    """Ids of every special piece and of its newer name; `<unk>` is left to be ordinary text.

    Raises: SourceError naming every piece without which no conversation can be written.
    """
    num_pieces = processor.get_piece_size()
    id_of_piece = {
        piece: token_id
        for token_id, piece in enumerate(map(processor.id_to_piece, range(num_pieces)))
        if specials.reserved.fullmatch(piece) or processor.is_control(token_id)
    }
    missing = [piece for piece in specials.needed if piece not in id_of_piece]
    missing += [name for name in ("bos_id", "eos_id") if getattr(processor, name)() < 0]
    if missing:
        raise SourceError(
            f"{where} has {num_pieces} pieces, but not {', '.join(missing)}: it is not the tokenizer of "
            f"{specials.family} model. Take the tokenizer.model of the same repository as the weights"
        )
    newer = {name: id_of_piece[piece] for name, piece in specials.piece_of_name.items() if piece in id_of_piece}
    return newer | id_of_piece


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate {text[error.start]!r} at position {error.start}: "
            "it is not valid Unicode; decode the input as UTF-8 first"
        ) from error
