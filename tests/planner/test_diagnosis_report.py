"""Reports of a diagnosis and of a plan: everything found is in the terminal, in Markdown, in JSON and on the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from planner.diagnosis.diagnosis import (
    Block,
    Crossing,
    DeviceLoad,
    Diagnosis,
    Finding,
    MapCosts,
    Move,
    Repair,
    map_diff,
)
from planner.machine import Machine
from planner.memory import MemoryBreakdown
from planner.pages.html_page import diagnosis_page, plan_page
from planner.pages.markdown import diagnosis_markdown
from planner.pages.picture import picture
from planner.pages.terminal import diagnosis_report
from planner.units import GIB
from vlm.model import find_model
from vlm.planning import plan_for

MACHINE = Machine.parse("24GiB,8GiB")


def costs(title: str, *, second_gib: int = 9) -> MapCosts:
    peaks = [
        MemoryBreakdown(weights_bytes=10 * GIB, kv_cache_bytes=GIB),
        MemoryBreakdown(weights_bytes=second_gib * GIB),
    ]
    loads = [
        DeviceLoad(device=device.name, memory_bytes=device.memory_bytes, peak=peak, idle_prefill=0.5, idle_decode=None)
        for device, peak in zip(MACHINE.devices, peaks, strict=True)
    ]
    layers = [
        Block(module=f"model.layers.{i}", device=f"cuda:{i // 3}", num_bytes=3 * GIB, failed=i == 2) for i in range(6)
    ]
    crossing = Crossing(source="cuda:0", target="cuda:1", phase="decode", num_bytes=8192, num_copies=2)
    return MapCosts(title=title, loads=tuple(loads), blocks=tuple(layers), crossings=(crossing,), kv_positions=12345)


def diagnosis() -> Diagnosis:
    findings = (
        Finding(
            severity="will fail",
            hazard="merge",
            title="cat: operands on <cuda:0> & cuda:1",
            fix="Move the projector_.",
            evidence=("prefill, in the model: tensors of *projector*",),
            place="modeling.py:7 in forward: torch.cat([a, b])",
            modules=("projector",),
        ),
        Finding(severity="wasteful", hazard="oom", title="cuda:1 holds nothing", fix="Use it."),
    )
    before = {"projector": 1, "model": 0}
    repair = Repair(
        device_map={"projector": 0, "model": 0},
        moves=(Move(module="projector", source=1, target=0, num_bytes=2048),),
        proven=True,
    )
    return Diagnosis(
        model="Tiny",
        origin="map.json",
        device_map=before,
        findings=findings,
        runs=("prefill", "generate()"),
        notes=("a note",),
        repair=repair,
        machine=MACHINE,
        given=costs("this map"),
        ours=costs("our plan", second_gib=5),
    )


def in_terminal(shown: Diagnosis, width: int = 100) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(diagnosis_report(shown))
    return capture.get()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_report_fits_its_width_and_says_everything(width: int) -> None:
    text = in_terminal(diagnosis(), width)
    assert max(map(len, text.splitlines())) <= width
    joined = re.sub(r"\s+", " ", text)
    for said in (
        *("Tiny with map.json: 1 will fail, 1 wasteful", "Ran prefill, generate()", "cat: operands on", "[merge]"),
        *("modeling.py:7 in forward", "fix: Move the projector_.", "Smallest repair: move projector, 2.0 KiB"),
        *("proven by a run", "-projector: 1", "+projector: 0", "this map", "our plan", "12,345", "a note"),
    ):
        assert said in joined, said


def test_a_clean_diagnosis_says_so_and_nothing_else() -> None:
    clean = Diagnosis(model="Tiny", origin="auto", device_map={"": 0}, findings=(), runs=("prefill",))
    assert clean.safe
    assert in_terminal(clean).splitlines()[0] == "Tiny with auto: clean"
    assert "Smallest repair" not in in_terminal(clean)
    assert "clean" in diagnosis_page(clean)


def test_markdown_escapes_what_would_format_and_keeps_code_as_code() -> None:
    text = diagnosis_markdown(diagnosis())
    assert "operands on \\<cuda:0\\> & cuda:1" in text
    assert "- at `modeling.py:7 in forward: torch.cat([a, b])`" in text
    assert "```diff\n--- device_map\n+++ repaired\n" in text
    assert "| peak on cuda:0, of 24.00 GiB | 11.00 GiB | 11.00 GiB |" in text


def test_json_holds_findings_repair_and_costs() -> None:
    content = json.loads(json.dumps(diagnosis().to_dict()))
    assert content["safe"] is False
    assert content["findings"][0]["hazard"] == "merge"
    assert content["repair"]["moves"] == [{"module": "projector", "source": 1, "target": 0, "num_bytes": 2048}]
    assert content["costs"]["given"]["loads"][1]["peak_bytes"] == 9 * GIB


def test_the_diff_shows_what_changes_with_one_line_around() -> None:
    assert map_diff({"a": 0, "b": 0, "c": 1}, {"a": 0, "b": 1, "c": 1}).splitlines()[2:] == [
        *("@@ -1,3 +1,3 @@", " a: 0", "-b: 0", "+b: 1", " c: 1"),
    ]
    assert map_diff({"a": 0}, {"a": 0}) == ""


# -- the page


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order; nothing is fetched and nothing runs."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(name in ("src", "href") or name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_self_contained_and_says_everything() -> None:
    page = diagnosis_page(diagnosis())
    read = Balanced(page)
    assert read.open == []
    text = " ".join(read.text)
    for said in (
        "1 will fail, 1 wasteful",
        "cat: operands on <cuda:0> & cuda:1",
        "proven by a run",
        "12,345",
        "a note",
    ):
        assert said in text, said
    assert "url(http" not in page


def rectangles(costs_shown: MapCosts, of_class: str) -> list[float]:
    tree = ElementTree.fromstring(picture(costs_shown))
    return [float(r.attrib["height"]) for r in tree.iter("rect") if r.attrib.get("class", "").split()[0] == of_class]


def test_blocks_are_as_high_as_their_bytes_and_failures_are_marked() -> None:
    shown = costs("this map")
    blocks = rectangles(shown, "block")
    assert len(blocks) == 3  # layers 0-1, the failed layer 2, layers 3-5
    assert (blocks[0] + 1) / (blocks[1] + 1) == pytest.approx(2, rel=0.01)
    assert (blocks[2] + 1) / (blocks[1] + 1) == pytest.approx(3, rel=0.01)
    assert rectangles(shown, "failed") == [blocks[1]]
    assert 'class="limit"' in picture(shown)  # cuda:1 holds more than it has
    assert 'class="limit"' not in picture(costs("our plan", second_gib=5))


def test_copies_are_arrows_with_their_bytes() -> None:
    drawn = picture(costs("this map"))
    assert drawn.count('class="flow"') == 1
    assert "0 → 1: 8.0 KiB per token" in drawn


def test_hostile_names_stay_text() -> None:
    block = Block(module='</svg><script>alert("1")</script>', device="cuda:0", num_bytes=GIB)
    load = costs("x").loads[0]
    page = picture(MapCosts(title="<b>", loads=(load,), blocks=(block,), crossings=()))
    assert "<script>" not in page
    ElementTree.fromstring(page)


@pytest.mark.parametrize("spec", ["24GiB", "2x24GiB", "24GiB,12GiB,8GiB", "8x6GiB"])
def test_a_plan_has_a_page_with_every_device_and_all_its_weights(spec: str) -> None:
    model, machine = find_model("internlm-xcomposer2-vl-7b"), Machine.parse(spec)
    plan = plan_for(model, machine)
    page = plan_page(plan, model.graph(plan.workload))
    assert Balanced(page).open == []
    for device in machine.devices:
        assert '<text class="device" x=' in page and f">{device.name}</text>" in page
    assert "proven to run: with images" in page
    assert plan_page(plan, model.graph(plan.workload)) == page
