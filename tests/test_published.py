"""Published figures: the page says what it claims, rows are scored by the rules, and one is predicted anew."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from benchmarks.published import MEDIAN_ERROR, Predicted, Timed, complaints, in_their_unit, predicted
from benchmarks.published_rows import MemoryRow, SpeedRow, memory_rows, speed_rows
from planner.units import GIB
from vlm.cost_library import CostLibrary

PAGE = (Path(__file__).parents[1] / "docs" / "published.md").read_text(encoding="utf-8")
GB = 10**9
ROW = MemoryRow(table="t", what="w", published=10.0, model="m")


def cells(what: str, after: str) -> list[str]:
    """A row of the page, of the table with that heading."""
    part = PAGE.partition(f"## {after}\n")[2].partition("\n## ")[0]
    (line,) = (line for line in part.splitlines() if line.startswith(f"| {what} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_every_row_and_meets_what_predictions_are_held_to() -> None:
    errors = []
    for row in memory_rows():
        _, published, _, error, note = cells(row.what, row.table)
        assert (published == "out of memory") == (row.published is None)
        assert note == (row.unscored or row.note)
        if row.published is not None and not row.unscored:
            found = float(error.rstrip("%")) / 100
            errors.append(found)
            assert row.published * (1 + found) >= 0.95 * (row.published - row.step / 2)
    assert len(errors) > 25
    assert median(map(abs, errors)) < MEDIAN_ERROR
    assert f"{len(errors)} rows are scored" in PAGE


def test_the_page_has_int4_on_the_published_side_of_16_bits_in_every_row() -> None:
    found = {(row.table, row.what): cells(row.what, f"{row.table}") for row in speed_rows() if "TurboMind" in row.table}
    for (table, what), (_, published, speed, _, _) in found.items():
        if what.startswith("int4"):
            _, plain, plain_speed, _, _ = found[table, what.replace("int4", "float16")]
            assert (float(published) > float(plain)) == (float(speed) > float(plain_speed))
    assert len(found) == 12


def test_a_row_is_predicted_as_the_page_has_it() -> None:
    row = next(row for row in memory_rows() if row.what == "2,048 tokens")
    one = predicted(row, CostLibrary())
    assert one.used_bytes is not None
    assert cells(row.what, row.table)[2] == f"{one.used_bytes / GIB:.2f} GiB"


def test_a_table_is_in_gib_only_where_gb_would_be_impossible() -> None:
    possible = Predicted(row=ROW, used_bytes=10 * GB, least_bytes=9 * GB)
    impossible = Predicted(row=ROW, used_bytes=10 * GIB, least_bytes=int(10.2 * GB))
    assert [one.unit for one in in_their_unit([possible])] == [GB]
    assert [one.unit for one in in_their_unit([possible, impossible])] == [GIB, GIB]


@pytest.mark.parametrize(
    ("used_bytes", "row", "message"),
    [
        (9 * GB, ROW, "10.0% under"),
        (12 * GB, ROW, "the median error is 20.0%"),
        (None, ROW, "runs, and was predicted not to fit"),
    ],
)
def test_predictions_that_are_not_good_enough_are_named(used_bytes: int | None, row: MemoryRow, message: str) -> None:
    good = Predicted(row=ROW, used_bytes=10 * GB, least_bytes=0)
    rows = [Predicted(row=row, used_bytes=used_bytes, least_bytes=0)] + ([good] if used_bytes != 12 * GB else [])
    assert any(re.search(message, line) for line in complaints(rows, []))


def test_out_of_memory_must_be_predicted_and_unscored_rows_need_not() -> None:
    good = Predicted(row=ROW, used_bytes=10 * GB, least_bytes=0)
    died = Predicted(row=replace(ROW, published=None), used_bytes=GB, least_bytes=0)
    unscored = Predicted(row=replace(ROW, unscored="why"), used_bytes=GB, least_bytes=0)
    assert ["was predicted to fit" in line for line in complaints([good, died], [])] == [True]
    assert list(complaints([good, unscored], [])) == []


def test_whole_gigabytes_may_have_been_rounded_up() -> None:
    one = Predicted(row=replace(ROW, published=8, step=1), used_bytes=int(7.5 * GB), least_bytes=0)
    assert one.error == pytest.approx(-0.0625)
    assert one.shortfall == 0


def test_a_wrong_order_of_precisions_is_named() -> None:
    row = SpeedRow(table="t", what="float16", published=100, model="m", implementation="ours", workload={})
    packed = replace(row, what="int4", published=120)
    good = Predicted(row=ROW, used_bytes=10 * GB, least_bytes=0)
    right = [Timed(row=row, tokens_per_s=50), Timed(row=packed, tokens_per_s=51)]
    wrong = [Timed(row=row, tokens_per_s=50), Timed(row=packed, tokens_per_s=49)]
    assert list(complaints([good], right)) == []
    assert list(complaints([good], wrong)) == ["t, int4: on the wrong side of float16"]
