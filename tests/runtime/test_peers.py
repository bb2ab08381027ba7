"""Other people's rules as the benchmark applies them, and what its table says."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from planner.machine import Machine
from planner.workload import Workload
from vlm.model import find_model

ROOT = Path(__file__).parents[2]
PEERS: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "peers.py"))


def layers_by_device(rule: str, num_devices: int) -> list[int]:
    model = find_model("internlm-xcomposer2-vl-7b")
    graph = model.graph(model.resolved(Workload()))
    placed = PEERS[rule](graph, num_devices)
    counted = Counter(placed[group.id] for group in graph if group.role == "decoder_layer")
    return [counted[device] for device in range(num_devices)]


@pytest.mark.parametrize(
    ("num_devices", "layers"),
    [(2, [16, 16]), (3, [10, 13, 9]), (4, [7, 10, 10, 5]), (6, [4, 7, 7, 7, 7, 0]), (8, [2, 5, 5, 5, 5, 5, 5, 0])],
)
def test_xcomposers_rule_gives_the_published_layers(num_devices: int, layers: list[int]) -> None:
    assert layers_by_device("xcomposer_rule", num_devices) == layers


def test_internvls_rule_gives_the_first_gpu_half_a_share_and_the_last_layer() -> None:
    """32 layers on 4: ceil(32 / 3.5) = 10 each, half of it on the first, which gets the last layer besides."""
    assert layers_by_device("internvl_rule", 4) == [6, 10, 10, 6]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"model.layers.3": "cpu"}, "offloads to cpu"),
        ({"model.layers.3": 7}, "names GPU 7, which is not there"),
        ({"vision_proj": 1}, "fails: torch.cat of vision_proj and model.tok_embeddings"),
        ({"model.layers.3.attention": 1}, "cuts model.layers.3"),
    ],
    ids=["host", "no such GPU", "apart", "inside a group"],
)
def test_a_map_that_cannot_run_is_no_placement(changes: dict[str, Any], note: str) -> None:
    model = find_model("internlm-xcomposer2-vl-7b")
    graph = model.graph(model.resolved(Workload()))
    found = PEERS["stages_of"](graph, {"": 0, **changes}, Machine.parse("2x24GiB"))
    assert found == note


def tables() -> list[tuple[str, list[list[str]]]]:
    """Title and cells of every table but the summary."""
    text = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    found = []
    for part in text.split("\n## ")[1:]:
        rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
        found.append((part.partition("\n")[0], rows))
    return found


def number(cell: str) -> float | None:
    """The first number of a cell; None for a reason why there is none."""
    digits = re.match(r"[\d.,]*\d", cell)
    return float(digits[0].replace(",", "")) if digits else None


def better_than_ours() -> list[tuple[str, str, str]]:
    """Model, machine and planner of every row that the page says a peer is better on."""
    text = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    verdict = re.findall(r"^Better than ours: (.*)\.$", text, re.MULTILINE)[0]
    return [match for one in verdict.split("; ") for match in re.findall(r"^(\S+) on (\S+): (.+) in \w+$", one)]


@pytest.mark.parametrize("index", range(3), ids=["KV positions", "request", "slowest stage"])
def test_no_peer_is_better_but_where_the_page_says_so(index: int) -> None:
    title, (head, *rows) = tables()[index]
    said = {(model, machine) for model, machine, _ in better_than_ours()}
    more_is_better = title == "KV positions"
    assert head[2:4] == ["ours", "split vision"] and len(rows) > 200
    for row in rows:
        cells = [
            cell
            for name, cell in zip(head[4:], row[4:], strict=False)
            if name != "InternVL" or tuple(row[:2]) not in said
        ]
        ours, *peers = (number(cell) for cell in (row[3], *cells))
        best = (max if more_is_better else min)((peer for peer in peers if peer is not None), default=None)
        assert best is None or ours is not None and (ours >= best if more_is_better else ours <= best), row


def test_only_a_rule_that_goes_back_to_the_first_gpu_is_better_anywhere() -> None:
    text = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    better = better_than_ours()
    assert {planner for _, _, planner in better} == {"InternVL's rule"}
    pairs = re.findall(r"^Over (\d+) pairs", text, re.MULTILINE)[0]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"on {pairs} pairs of model and machine: one is better on {len(better)}" in readme


def test_the_table_lists_every_planner() -> None:
    summary = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8").partition("\n## ")[0]
    for planner in ("ours, balance", "transformers auto", "InternVL's rule", "XComposer2's rule"):
        assert re.search(rf"^\| {planner} \| \d+ \| [\d.]+ \|", summary, re.MULTILINE)
