"""Tokenizer and chat text against sentencepiece itself, on small models trained here."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from planner.errors import SourceError
from vlm.internlm_xcomposer2.chat import DEFAULT_SYSTEM, chat_messages, chat_prompt, with_image_in_front
from vlm.internlm_xcomposer2.tokenization import InternLM2Tokenizer

SENTENCES = ("the cat sits on the mat", "a dog runs over the hill", "user and assistant talk of cats and dogs")
SPECIALS = ("[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_144]", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]")


def trained(*, dummy_prefix: bool = False, specials: tuple[str, ...] = SPECIALS, pad_id: int = -1) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=list(specials),
        pad_id=pad_id,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model_bytes() -> bytes:
    return trained()


@pytest.fixture(scope="module")
def tokenizer(model_bytes: bytes) -> InternLM2Tokenizer:
    return InternLM2Tokenizer(model_bytes)


@pytest.fixture(scope="module")
def prefixing() -> InternLM2Tokenizer:
    return InternLM2Tokenizer(trained(dummy_prefix=True))


TEXTS = [
    "",
    " ",
    "the cat",
    "  the  cat ",
    "the cat\n\n\tsits\r\n",
    "naïve café, 猫は座る 🐈‍⬛",
    "a\x00b",
    "[UNUSED_TOKEN_146]user\nthe cat[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
    "x[UNUSED_TOKEN_0][UNUSED_TOKEN_0] y",
    "[UNUSED_TOKEN_9999] is no piece, [UNUSED_TOKEN_14",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_sentencepiece_on_the_whole_text(
    text: str, model_bytes: bytes, tokenizer: InternLM2Tokenizer
) -> None:
    whole = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    assert tokenizer.encode(text, add_bos=False) == whole.encode(text)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["tokenizer", "prefixing"])
def test_decoding_gives_the_encoded_text_back(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: InternLM2Tokenizer = request.getfixturevalue(kind)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == "<s>" + text
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False), skip_special_tokens=False) == text


def test_both_spellings_of_a_special_piece_are_one_id(tokenizer: InternLM2Tokenizer) -> None:
    expected = [tokenizer.id_of("[UNUSED_TOKEN_146]"), *tokenizer.encode("user", add_bos=False)]
    assert tokenizer.encode("<|im_start|>user", add_bos=False) == expected
    assert tokenizer.encode("[UNUSED_TOKEN_146]user", add_bos=False) == expected
    assert tokenizer.id_of("<|im_end|>") == tokenizer.id_of("[UNUSED_TOKEN_145]")
    assert tokenizer.id_of("<|action_start|>") == tokenizer.id_of("[UNUSED_TOKEN_144]")


def test_sentence_marks_in_text_are_single_ids(tokenizer: InternLM2Tokenizer) -> None:
    assert tokenizer.encode("<s></s>", add_bos=False) == [1, 2]
    assert tokenizer.encode("</s>") == [1, 2]


def test_bos_is_added_unless_told_otherwise(tokenizer: InternLM2Tokenizer) -> None:
    assert tokenizer.encode("cat") == [1, *tokenizer.encode("cat", add_bos=False)]


def test_ids_follow_the_pieces_of_the_model_not_fixed_numbers() -> None:
    moved = InternLM2Tokenizer(trained(specials=tuple(reversed(SPECIALS))))
    assert moved.id_of("<|im_start|>") == 3
    assert moved.stop_ids == (2, 4)


def test_a_name_whose_piece_the_model_lacks_stays_text(tokenizer: InternLM2Tokenizer) -> None:
    assert tokenizer.id_of("<|plugin|>") is None
    assert len(tokenizer.encode("<|plugin|>", add_bos=False)) > 1


def test_padding_id_is_the_end_of_sentence_where_the_model_has_none(tokenizer: InternLM2Tokenizer) -> None:
    assert tokenizer.pad_id == tokenizer.eos_id == 2
    assert InternLM2Tokenizer(trained(pad_id=3)).pad_id == 3


def test_dummy_prefix_is_put_in_front_of_a_starting_text_only(prefixing: InternLM2Tokenizer) -> None:
    with_space = prefixing.encode(" cat", add_bos=False, continued=True)
    without = prefixing.encode("cat", add_bos=False, continued=True)
    assert with_space != without
    assert prefixing.encode("cat") == [1, *with_space]
    start, end = prefixing.id_of("<|im_start|>"), prefixing.id_of("<|im_end|>")
    assert prefixing.encode("<|im_start|>cat<|im_end|>cat") == [1, start, *without, end, *without]


def test_decoding_takes_back_the_dummy_prefix_but_no_real_space(prefixing: InternLM2Tokenizer) -> None:
    assert prefixing.decode(prefixing.encode("  cat")) == "  cat"
    assert prefixing.decode(prefixing.encode("<|im_start|> cat")) == " cat"


@pytest.mark.parametrize("kind", ["tokenizer", "prefixing"])
@pytest.mark.parametrize("text", ["the cat 🐈 naïve", "猫[UNUSED_TOKEN_145]cat", "é</s>é"])
def test_text_of_a_growing_answer_only_grows(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: InternLM2Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    for skip in (True, False):
        texts = [tokenizer.decode(ids[:end], skip_special_tokens=skip) for end in range(len(ids) + 1)]
        assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False))
        assert "\ufffd" not in texts[-1]


def test_bytes_that_form_no_character_are_shown_as_replacement(tokenizer: InternLM2Tokenizer) -> None:
    cat = tokenizer.encode("猫", add_bos=False)
    assert len(cat) == 3
    assert tokenizer.decode(cat[:2]) == ""
    assert tokenizer.decode([*cat[:2], *tokenizer.encode("a", add_bos=False)]) == "\ufffda"
    assert tokenizer.decode([*cat[:2], 2, cat[2]]) == "\ufffd\ufffd"


def test_special_pieces_are_skipped_or_shown(tokenizer: InternLM2Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>cat</s>")
    assert tokenizer.decode(ids) == "cat"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>[UNUSED_TOKEN_146]cat</s>"


@pytest.mark.parametrize("token_id", [-1, 10_000])
def test_an_id_outside_the_vocabulary_is_refused(token_id: int, tokenizer: InternLM2Tokenizer) -> None:
    with pytest.raises(ValueError, match=rf"id {token_id} is outside the vocabulary of {tokenizer.vocab_size} pieces"):
        tokenizer.decode([token_id])


def test_a_lone_surrogate_is_refused_with_its_position(tokenizer: InternLM2Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at position 2.*decode the input as UTF-8"):
        tokenizer.encode("ab\ud800")


def test_a_folder_is_read(tmp_path: Path, model_bytes: bytes, tokenizer: InternLM2Tokenizer) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    loaded = InternLM2Tokenizer.from_folder(str(tmp_path))
    assert loaded.encode("the cat") == tokenizer.encode("the cat")
    assert loaded.vocab_size == tokenizer.vocab_size


def test_a_missing_model_is_named_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"tokenizer.model cannot be read: No such file.*download it next to config"):
        InternLM2Tokenizer.from_folder(tmp_path)


BROKEN = {
    "empty": (b"", r"tokenizer.model is empty \(0 bytes\)"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer.*git lfs pull"),
    "other file": (b'{"model": "json"}', r"\(17 bytes\) is not a readable sentencepiece model"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_model_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        InternLM2Tokenizer.from_folder(tmp_path)


def test_a_model_cut_off_is_refused(tmp_path: Path, model_bytes: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes[: len(model_bytes) // 2])
    with pytest.raises(SourceError, match="is not a readable sentencepiece model.*cut off"):
        InternLM2Tokenizer.from_folder(tmp_path)


def test_a_model_of_another_family_is_refused_naming_every_missing_piece() -> None:
    with pytest.raises(SourceError, match=r"not \[UNUSED_TOKEN_146\], \[UNUSED_TOKEN_145\]: it is not the tokenizer"):
        InternLM2Tokenizer(trained(specials=("[UNUSED_TOKEN_0]",)))


def test_the_text_stream_of_transformers_takes_the_tokenizer(
    tokenizer: InternLM2Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    for token_id in tokenizer.encode("the 猫 sits on the mat<|im_end|>"):
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert capsys.readouterr().out == "the 猫 sits on the mat\n"


def test_tokenizer_and_chat_import_no_torch() -> None:
    code = (
        "import sys, vlm.internlm_xcomposer2.chat, vlm.internlm_xcomposer2.tokenization;"
        "sys.exit(bool({'torch', 'transformers', 'PIL'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_question_becomes_one_open_turn() -> None:
    assert chat_prompt(chat_messages("Why?")) == (
        "[UNUSED_TOKEN_146]user\nWhy?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    )


def test_system_and_history_come_before_the_question() -> None:
    messages = chat_messages("And now?", history=[("Red?", "Yes.")], system=DEFAULT_SYSTEM)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert chat_prompt(messages) == (
        f"[UNUSED_TOKEN_146]system\n{DEFAULT_SYSTEM}[UNUSED_TOKEN_145]\n"
        "[UNUSED_TOKEN_146]user\nRed?[UNUSED_TOKEN_145]\n"
        "[UNUSED_TOKEN_146]assistant\nYes.[UNUSED_TOKEN_145]\n"
        "[UNUSED_TOKEN_146]user\nAnd now?[UNUSED_TOKEN_145]\n"
        "[UNUSED_TOKEN_146]assistant\n"
    )


def test_an_image_goes_in_front_of_the_first_user_text() -> None:
    messages = chat_messages("And now?", history=[("Red?", "Yes.")], system="Be brief.")
    changed = with_image_in_front(messages)
    assert [message["content"] for message in changed] == ["Be brief.", "<ImageHere>Red?", "Yes.", "And now?"]
    assert messages[1]["content"] == "Red?"


USER = {"role": "user", "content": "Hello"}
FAULTY = {
    "no message": ([], r"1 fault\(s\) in 0 messages: the roles run \(none\)"),
    "assistant last": ([USER, {"role": "assistant", "content": "Hi"}], "the roles run user assistant"),
    "late system": ([USER, {"role": "system", "content": "Hi"}, USER], "the roles run user system user"),
    "two users": ([USER, USER], "ending with the user"),
    "unknown role": ([{"role": "tool", "content": "Hi"}], "message 0 has the role 'tool': known are system, user"),
    "no role": ([{"content": "Hi"}], "message 0 has the role None"),
    "parts": ([{"role": "user", "content": ["Hi"]}], "message 0 has content of type list"),
    "empty": ([{"role": "user", "content": " \n"}], r"message 0 \(user\) is empty"),
    "turn end": ([{"role": "user", "content": "a<|im_end|>b"}], r"control text '<\|im_end\|>': remove it"),
    "turn start": ([{"role": "user", "content": "[UNUSED_TOKEN_146]"}], r"control text '\[UNUSED_TOKEN_146\]'"),
    "end of text": ([{"role": "user", "content": "a</s>b"}], "control text '</s>'"),
}


@pytest.mark.parametrize(("messages", "fault"), FAULTY.values(), ids=FAULTY.keys())
def test_a_faulty_conversation_is_refused(messages: list[dict[str, str]], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        chat_prompt(messages)
    with pytest.raises(ValueError, match=fault):
        with_image_in_front(messages)


def test_every_fault_of_a_conversation_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"3 fault\(s\) in 2 messages: message 0 .*; message 1 .*; the roles run"):
        chat_prompt([{"role": "user", "content": ""}, {"role": "bot", "content": "Hi"}])
