"""Anyone's device map: every spelling that means a device is understood, everything else refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner import Machine, PlanMismatchError, SourceError
from planner.diagnosis.map_file import MAX_ENTRIES, given_map, read_map_file, refuse_unknown_devices
from planner.textfile import MAX_BYTES


def written(folder: Path, content: Any, name: str = "map.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("value", "place"),
    [(0, 0), (1, 1), ("1", 1), ("cuda:1", 1), ("cuda", 0), ("vgpu:3", 3), ("cpu", "cpu"), ("disk", "disk"), (127, 127)],
)
def test_a_device_is_understood_in_every_spelling(value: Any, place: int | str) -> None:
    assert given_map({"model": value}).placement == {"model": place}


@pytest.mark.parametrize("value", [True, -1, 1.0, None, [0], {"a": 0}, "gpu0", "cuda:-1", "cuda:x", 128, 10**400, ""])
def test_what_is_no_device_is_refused_by_name(value: Any) -> None:
    with pytest.raises(PlanMismatchError, match="says 'model': .*A device is a GPU's index of 0 to 127"):
        given_map({"model": value})


def test_json_and_yaml_files_hold_the_same_map(tmp_path: Path) -> None:
    entries = {"model.visual": 0, "lm_head": "cuda:1", "": "cpu"}
    for path in (written(tmp_path, entries), written(tmp_path, yaml.dump(entries), "map.yaml")):
        given = read_map_file(path)
        assert given.placement == {"model.visual": 0, "lm_head": 1, "": "cpu"}
        assert given.written["lm_head"] == "cuda:1"
        assert set(given.gpus) == {0, 1}
        assert given.offloaded == {"": "cpu"}


def test_json_indented_with_tabs_is_read(tmp_path: Path) -> None:
    assert read_map_file(written(tmp_path, '{\n\t"model": 0\n}')).placement == {"model": 0}


def test_a_plan_of_ours_is_read_as_its_map(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "2x24.yaml"
    assert read_map_file(golden).placement["vit"] == 0
    wrapped = written(tmp_path, {"format": "plan-devices/1", "device_map": {"model": 1}})
    assert read_map_file(wrapped).placement == {"model": 1}


def test_a_map_written_the_wrong_way_round_is_told_so() -> None:
    with pytest.raises(PlanMismatchError, match=r"key 0: .*It looks reversed: write model.visual: 0"):
        given_map({0: "model.visual"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty. Write module: device, such as model.visual: 0"),
        ("[]", "holds list"),
        ("just text", "holds str"),
        ("{}", "has no entries"),
        ('{"a": 0, "a": 1}', "'a' is given twice"),
        ("a: 0\na: 1\n", "'a' is given twice"),
        ("a: &x 0\nb: *x\n", "alias"),
        ("a: !!python/object:os.system 0\n", "tag"),
        ('{"a": ' * 3000 + "0" + "}" * 3000, "nested deeper|recursion|not valid"),
        ("{a: 0", "neither JSON nor YAML"),
        ('{"model": 0,', "neither JSON nor YAML: Expecting property name"),
        ('{"device_map": {}}', "device_map, has no entries"),
        ('{"device_map": "auto"}', "device_map, is 'auto': a map says a device for each module"),
        ('{"model": {"visual": 0}}', "A map is flat: write model.visual: DEVICE"),
        ('{"0": "model"}', "It looks reversed: write 'model': 0"),
        ('{"\\u001b[31mred": 0}', r"key '\\x1b\[31mred': no module's name holds control characters"),
        ('{"a": "cuda:\u0661"}', "A device is a GPU's index"),
        ('{"a": NaN}', "says 'a': nan. A device is"),
    ],
)
def test_a_file_that_is_no_map_is_refused_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        read_map_file(written(tmp_path, text))


def test_a_line_is_named_without_the_parsers_own_words(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"'a' is given twice at line 2, column 1$"):
        read_map_file(written(tmp_path, "a: 0\na: 1\n"))


def test_a_module_may_be_called_device_map(tmp_path: Path) -> None:
    assert read_map_file(written(tmp_path, {"device_map": 1})).placement == {"device_map": 1}


def test_the_root_is_shown_by_its_quotes() -> None:
    with pytest.raises(PlanMismatchError, match="says '': 9; this machine"):
        refuse_unknown_devices(given_map({"": "cuda:9"}), Machine.parse("2x24GiB"))


def test_the_finest_entry_says_where_a_module_is() -> None:
    given = given_map({"model": 0, "model.layers.1": "cpu"})
    assert [given.place(name) for name in ("model.layers.1.mlp", "model.layers.10", "head")] == ["cpu", 0, None]


def test_weights_are_fetched_for_their_modules_time_only_where_something_else_computes() -> None:
    assert set(given_map({"a": 0, "b": "cpu", "c": "disk"}).fetched) == {"b", "c"}
    assert set(given_map({"b": "cpu", "c": "disk"}).fetched) == {"c"}


def test_a_huge_file_an_endless_one_and_none_are_refused(tmp_path: Path) -> None:
    huge = tmp_path / "huge.json"
    with huge.open("wb") as stream:
        stream.truncate(100 * 2**20)
    with pytest.raises(SourceError, match=f"at most {MAX_BYTES} are read"):
        read_map_file(huge)
    with pytest.raises(SourceError, match="has no end"):
        read_map_file(Path("/dev/zero"))
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        read_map_file(tmp_path / "none.json")


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(PlanMismatchError, match=f"has {MAX_ENTRIES + 1} entries"):
        given_map({f"layers.{index}": 0 for index in range(MAX_ENTRIES + 1)})


def test_gpus_that_the_machine_lacks_are_refused_by_entry() -> None:
    given = given_map({"model": 0, "norm": 3, "head": "cuda:4", "far": 5, "farther": 6})
    with pytest.raises(PlanMismatchError, match=r"norm: 3, head: 4, far: 5 and 1 more; this machine has the GPUs 0, 1"):
        refuse_unknown_devices(given, Machine.parse("2x24GiB"))
    refuse_unknown_devices(given_map({"model": 1, "head": "cpu"}), Machine.parse("2x24GiB"))
