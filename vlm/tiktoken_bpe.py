"""Text <-> token ids with a vocabulary in tiktoken's file format: one base64 token and its rank per line.

Byte-pair encoding by rank, as tiktoken does it: the pair of neighbours whose joint token ranks lowest is merged, the
leftmost first. It knows no model: the pattern that cuts a text into words, and the special tokens, are given.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import heapq
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import regex

from planner.errors import SourceError
from vlm.checkpoint import refuse_lfs_pointer

GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How GPT-4's tokenizer cuts a text into words, where DIGITS is the most digits in one."""


class TiktokenTokenizer:
    """Encoder and decoder over one vocabulary; special tokens are matched whole before words are sought."""

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        *,
        most_digits: int,
        specials: Sequence[str],
        stops: Sequence[str],
        pad: str,
        where: str = "the vocabulary",
    ) -> None:
        """`specials` are numbered on from the vocabulary's last id; `stops` of them end an answer, `pad` fills rows.

        Raises: SourceError when ranks are not 0 to size - 1, or a byte has no token.
        """
        _refuse_gaps(ranks, where)
        self._ranks = ranks
        self._id_of_special = {name: len(ranks) + index for index, name in enumerate(specials)}
        self._tokens = [*sorted(ranks, key=lambda token: ranks[token]), *(name.encode() for name in specials)]
        self._words = regex.compile(GPT4_WORDS.replace("DIGITS", str(most_digits)))
        self._special_pattern = regex.compile("|".join(map(regex.escape, specials)))
        self.pad_id = self._id_of_special[pad]
        self.stop_ids = tuple(self._id_of_special[name] for name in stops)

    @property
    def vocab_size(self) -> int:
        """Ids in use, the special ones too."""
        return len(self._tokens)

    def id_of(self, special: str) -> int | None:
        """Id of a special token; None when there is none of that name."""
        return self._id_of_special.get(special)

    def encode(self, text: str, add_bos: bool = True, *, continued: bool = False) -> list[int]:
        """Ids of a text, in Unicode's composed form. Nothing is put in front, whatever the other arguments say.

        Raises: ValueError when the text is not valid Unicode (a lone surrogate).
        """
        text = unicodedata.normalize("NFC", text)
        ids: list[int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            ids += self._plain_ids(text[end : match.start()])
            ids.append(self._id_of_special[match.group()])
            end = match.end()
        return ids + self._plain_ids(text[end:])

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; the text of a longer list always starts with the text of its beginning.

        For that, a last character whose bytes are not all there yet is left out; bytes that can no longer become one
        are shown as U+FFFD.
        Raises: ValueError for an id outside the vocabulary.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = []
        for token_id in map(int, ids):
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"id {token_id} is outside the vocabulary of {self.vocab_size} (0 to size - 1)")
            if token_id < len(self._ranks):
                text.append(decoder.decode(self._tokens[token_id]))
                continue
            text.append(decoder.decode(b"", final=True))
            text.append("" if skip_special_tokens else self._tokens[token_id].decode())
        return "".join(text)

    def _plain_ids(self, text: str) -> list[int]:
        return [token_id for word in self._words.findall(text) for token_id in merged_ids(word.encode(), self._ranks)]


def merged_ids(word: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Token ids of one word, every single byte of which has a rank."""
    ends = [*range(1, len(word) + 1)]  # by the start of a part; 0 where a part was merged into the one before
    starts_before = [*range(-1, len(word) - 1)]
    pairs: list[tuple[int, int, int]] = []

    def offer(start: int) -> None:
        """The part at `start` and the next as a pair to merge, if they have a joint token."""
        if start >= 0 and (middle := ends[start]) < len(word):
            rank = ranks.get(word[start : ends[middle]])
            if rank is not None:
                heapq.heappush(pairs, (rank, start, ends[middle]))

    for start in range(len(word)):
        offer(start)
    while pairs:
        _, start, end = heapq.heappop(pairs)
        middle = ends[start]
        if not 0 < middle < end or ends[middle] != end:
            continue  # one of the two has been merged with another meanwhile
        ends[start], ends[middle] = end, 0
        if end < len(word):
            starts_before[end] = start
        offer(start)
        offer(starts_before[start])
    return [ranks[word[start:end]] for start, end in _parts(ends)]


def _parts(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(ends):
        yield start, ends[start]
        start = ends[start]


def read_ranks(path: Path) -> dict[bytes, int]:
    """The vocabulary in a file.

    Raises: SourceError when it cannot be read, or naming the first line that is not `base64 rank`.
    """
    try:
        refuse_lfs_pointer(path)
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror or error}. A model folder of this family holds its vocabulary "
            "under that name; download it next to config.json"
        ) from error
    ranks = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise SourceError(
                f"{path}, line {number}: {line[:40]!r} is not a base64 token and its rank. "
                "The file is damaged or of another kind; download it again"
            ) from error
    return ranks


def _refuse_gaps(ranks: Mapping[bytes, int], where: str) -> None:
    if sorted(ranks.values()) != [*range(len(ranks))]:
        raise SourceError(f"{where} has {len(ranks)} tokens, but their ranks are not 0 to {len(ranks) - 1}, each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise SourceError(
            f"{where} has no token for {len(missing)} single bytes, first 0x{missing[0]:02x}: "
            "it could not encode every text"
        )
