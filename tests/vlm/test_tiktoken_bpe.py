"""The tiktoken encoder against a scan of all pairs written here and against the tokenizers library, and its file."""

from __future__ import annotations

import base64
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from planner.errors import SourceError
from vlm.tiktoken_bpe import TiktokenTokenizer, merged_ids, read_ranks

LEARNED = [
    b"th",
    b"he",
    b"the",
    b"in",
    b" t",
    b" the",
    b"er",
    b"ing",
    b"aa",
    b"aaaa",
    b"\xe4\xb8",
    b"\xe4\xb8\xad",
    b"ab",
    b"bab",
]
RANKS = {token: rank for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), *LEARNED])}


def tokenizer(**changes) -> TiktokenTokenizer:
    settings = {
        "most_digits": 3,
        "specials": ["<|end|>", "<|pad|>", "<|turn|>"],
        "stops": ["<|end|>"],
        "pad": "<|pad|>",
    }
    return TiktokenTokenizer(RANKS, **{**settings, **changes})


def scanned(word: bytes) -> list[int]:
    """Byte-pair encoding by scanning: of all pairs the lowest ranked, the leftmost first, until none is left."""
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(RANKS[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in RANKS]
        if not pairs:
            return [RANKS[part] for part in parts]
        _, index = min(pairs)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


@given(
    st.lists(st.sampled_from([b"t", b"h", b"e", b"a", b"b", b" ", b"i", b"n", b"g", b"\xe4", b"\xb8"])).map(b"".join)
)
def test_merging_by_heap_equals_scanning_all_pairs(word: bytes) -> None:
    assert merged_ids(word, RANKS) == scanned(word)


@pytest.mark.parametrize("text", ["the thing in there", "aaaaaaa aab", "中文 and the ring", "babab ab abab"])
def test_ids_equal_those_of_the_tokenizers_library(text: str) -> None:
    letters = bytes_to_unicode()
    shown = {token: "".join(letters[byte] for byte in token) for token in RANKS}
    splits = [
        (RANKS[token], shown[token[:cut]], shown[token[cut:]])
        for token in LEARNED
        for cut in range(1, len(token))
        if token[:cut] in RANKS and token[cut:] in RANKS
    ]
    merges = [(left, right) for _, left, right in sorted(splits)]
    library = Tokenizer(models.BPE({shown[token]: rank for token, rank in RANKS.items()}, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer().encode(text) == library.encode(text).ids


@given(st.text())
def test_decoding_gives_the_composed_text_back(text: str) -> None:
    import unicodedata

    text = text.encode("utf-8", "ignore").decode()
    assert tokenizer().decode(tokenizer().encode(text), skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(("most_digits", "words"), [(3, ["123", "45"]), (1, ["1", "2", "3", "4", "5"])])
def test_digits_are_grouped_as_the_model_was_trained(most_digits: int, words: list[str]) -> None:
    assert tokenizer(most_digits=most_digits)._words.findall("12345") == words


def test_special_tokens_are_matched_whole_and_numbered_after_the_vocabulary() -> None:
    ids = tokenizer().encode("the<|turn|>the")
    assert ids == [RANKS[b"the"], len(RANKS) + 2, RANKS[b"the"]]
    assert tokenizer().id_of("<|turn|>") == len(RANKS) + 2 and tokenizer().id_of("<|none|>") is None
    assert tokenizer().decode(ids) == "thethe"
    assert tokenizer().decode(ids, skip_special_tokens=False) == "the<|turn|>the"
    assert (tokenizer().pad_id, tokenizer().stop_ids) == (len(RANKS) + 1, (len(RANKS),))


def test_a_growing_answer_only_grows() -> None:
    ids = tokenizer().encode("中 the 中!")
    texts = [tokenizer().decode(ids[:end]) for end in range(len(ids) + 1)]
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False))
    assert texts[-1] == "中 the 中!"


def test_a_long_word_takes_no_quadratic_time() -> None:
    start = time.perf_counter()
    ids = merged_ids(b"a" * 200_001, RANKS)
    assert ids == [RANKS[b"aaaa"]] * 50_000 + [RANKS[b"a"]]
    assert time.perf_counter() - start < 5


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer().encode("a\ud800")


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="id 9999 is outside the vocabulary of 273"):
        tokenizer().decode([9999])


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in RANKS.items()))
    assert read_ranks(path) == RANKS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dGhl 0\nnot a line at all\n", "line 2: b'not a line at all' is not a base64 token"),
        (b"dGhl zero\n", "line 1"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocabulary.tiktoken"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_ranks(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="vocabulary.tiktoken cannot be read: No such file"):
        read_ranks(tmp_path / "vocabulary.tiktoken")


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({**RANKS, b"zz": 9999}, "ranks are not 0 to 270, each once"),
        (
            {token: rank for rank, token in enumerate(sorted(RANKS.keys() - {b"A"}))},
            "no token for 1 single bytes, first 0x41",
        ),
    ],
    ids=["gap", "byte missing"],
)
def test_a_vocabulary_with_holes_is_refused(ranks: dict[bytes, int], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        TiktokenTokenizer(ranks, most_digits=1, specials=["<p>"], stops=[], pad="<p>", where="here")
