"""Files read with suspicion and written whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from planner.errors import MachineError, SourceError
from planner.textfile import MAX_BYTES, dump_mapping, parse_mapping, read_mapping, write_atomically


def test_yaml_and_json_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("devices:\n- memory: 24GiB\n")
    (tmp_path / "a.json").write_text('{"devices": [{"memory": "24GiB"}]}')
    contents = [read_mapping(tmp_path / name, "file", SourceError) for name in ("a.yaml", "a.json")]
    assert contents[0] == contents[1] == {"devices": [{"memory": "24GiB"}]}


REFUSED = {
    "a list": ("- 1", "holds list, not a mapping of keys to values"),
    "a word": ("hello", "holds str, not a mapping"),
    "nothing": ("", "holds NoneType, not a mapping"),
    "a comment": ("# nothing else", "holds NoneType, not a mapping"),
    "a key twice": ("a: 1\na: 2", "'a' is given twice"),
    "a key twice in JSON": ('{"a": 1, "a": 2}', "'a' is given twice"),
    "a key twice deep inside": ("a:\n- b:\n    c: 1\n    c: 1", "'c' is given twice"),
    "the same number twice": ("1: a\n0x1: b", "1 is given twice"),
    "an open bracket": ("a: [1", "is not valid YAML"),
    "a tab as indentation": ("a:\n\tb: 1", "is not valid YAML"),
    "a control character": ("a: \0", "is not valid YAML"),
    "two documents": ("a: 1\n---\nb: 1", "expected a single document"),
    "a Python object": ("a: !!python/object/apply:os.system [id]", "is not valid YAML"),
    "a merge key": ("a: {<<: {b: 1}}", "is not valid YAML"),
    "an impossible date": ("a: 2001-99-99", "month must be in 1..12"),
    "a number of 5000 digits": (f"a: {'9' * 5000}", "is not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_honest_mapping_is_refused(text: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_mapping(text, "plan x.yaml", SourceError)
    assert str(caught.value).startswith("plan x.yaml ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refusal_names_the_line() -> None:
    with pytest.raises(SourceError, match="line 3, column 1"):
        parse_mapping("a: 1\nb: 2\na: 3", "f", SourceError)


@pytest.mark.parametrize("error", [SourceError, MachineError])
def test_the_caller_chooses_the_exception(error: type[SourceError] | type[MachineError], tmp_path: Path) -> None:
    with pytest.raises(error, match="cannot be read: No such file or directory"):
        read_mapping(tmp_path / "absent.yaml", "machine file", error)


def test_a_missing_file_a_folder_and_bytes_that_are_no_text_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    reasons = {"absent": "cannot be read: No such file", "": "cannot be read: Is a directory", "binary": "is not text"}
    for name, reason in reasons.items():
        with pytest.raises(SourceError) as caught:
            read_mapping(tmp_path / name, "plan", SourceError)
        assert f"plan {tmp_path / name} {reason}" in str(caught.value)


def test_a_file_of_the_largest_size_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("a: 1\n#" + " " * (MAX_BYTES - 6))
    assert read_mapping(path, "plan", SourceError) == {"a": 1}
    path.write_text("a: 1\n#" + " " * (MAX_BYTES - 5))
    with pytest.raises(SourceError, match=f"is {MAX_BYTES + 1} bytes: at most {MAX_BYTES} are read"):
        read_mapping(path, "plan", SourceError)


WRITTEN: dict[str, dict[str, Any]] = {
    "empty": {},
    "order kept": {"b": 1, "a": 2},
    "nested": {"a": [{"b": None, "c": [1, 2.5, True, "x"]}]},
    "integer keys": {"memory": {0: 1, 1: 2}},
    "text that looks like something else": {"a": "1", "b": "yes", "c": "null", "d": "2001-01-01", "e": "- x", "f": ""},
    "letters of any alphabet": {"ä": "多模态"},
    "longer than a line": {"a": "word " * 100},
}


@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN)
def test_what_is_dumped_is_parsed_back(content: dict[str, Any]) -> None:
    text = dump_mapping(content)
    assert parse_mapping(text, "f", SourceError) == content
    assert list(parse_mapping(text, "f", SourceError)) == list(content)


def test_a_list_used_twice_is_written_twice_and_not_as_an_alias() -> None:
    shared = [1, 2]
    assert dump_mapping({"a": shared, "b": shared}) == "a:\n- 1\n- 2\nb:\n- 1\n- 2\n"


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old " * 1000)
    write_atomically(path, "new: 1\n")
    assert path.read_text() == "new: 1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old: 1\n")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new: 1\n" * 10_000 + "\ud800")
    assert path.read_text() == "old: 1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_target_that_cannot_be_replaced_leaves_no_litter(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", "new: 1\n")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_new_file_has_the_permissions_that_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "plan.yaml", "a: 1\n")
    assert (tmp_path / "plan.yaml").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    """As a device would: `-o` of one that a file replaced would take it away from everyone."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
