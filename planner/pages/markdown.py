"""A diagnosis as Markdown, to paste into an issue or a chat."""

from __future__ import annotations

from collections.abc import Iterator

from planner.diagnosis.diagnosis import Diagnosis, Finding, MapCosts
from planner.graph import PHASES
from planner.pages.terminal import repair_summary, room
from planner.units import format_bytes

MAX_EVIDENCE = 8


def diagnosis_markdown(diagnosis: Diagnosis) -> str:
    """The whole report; the longer parts are folded."""
    return "\n".join(_lines(diagnosis)) + "\n"


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    yield f"### `{diagnosis.model}` with `{diagnosis.origin}`: {diagnosis.verdict}"
    yield ""
    yield f"Ran {', '.join(diagnosis.runs)} on virtual GPUs under accelerate's hooks."
    for finding in diagnosis.findings:
        yield ""
        yield from _finding(finding)
    if diagnosis.repair is not None:
        proof = "proven by a run" if diagnosis.repair.proven else "still not clean"
        yield from ("", f"**Smallest repair** ({proof}): {repair_summary(diagnosis.repair)}", "")
        yield from ("```diff", diagnosis.diff, "```")
    costs = [costs for costs in (diagnosis.given, diagnosis.ours) if costs is not None]
    if costs:
        yield ""
        yield from _cost_table(costs)
    yield from ("", "<details><summary>The device map</summary>", "", "```yaml")
    yield from (f"{module or repr('')}: {place}" for module, place in diagnosis.device_map.items())
    yield from ("```", "", "</details>")
    for note in diagnosis.notes:
        yield from ("", note)


def _finding(finding: Finding) -> Iterator[str]:
    yield f"**{finding.severity}** · `{finding.hazard}` · {_escaped(finding.title)}"
    yield ""
    if finding.place:
        yield f"- at `{finding.place}`"
    shown = [line for line in finding.evidence if line != finding.place]
    yield from (f"- {_escaped(line)}" for line in shown[:MAX_EVIDENCE])
    if len(shown) > MAX_EVIDENCE:
        yield f"- and {len(shown) - MAX_EVIDENCE} more"
    yield f"- fix: {_escaped(finding.fix)}"


def _cost_table(costs: list[MapCosts]) -> Iterator[str]:
    yield f"| | {' | '.join(one.title for one in costs)} |"
    yield "|---|" + "---:|" * len(costs)
    for index, load in enumerate(costs[0].loads):
        peaks = (format_bytes(one.loads[index].peak.total_bytes) for one in costs)
        yield f"| peak on {load.device}, of {format_bytes(load.memory_bytes or 0)} | {' | '.join(peaks)} |"
    for phase, name in zip(PHASES[1:], ("prompt", "token"), strict=True):
        copied = (format_bytes(one.crossing_bytes(phase)) for one in costs)
        yield f"| copied between GPUs per {name} | {' | '.join(copied)} |"
    yield f"| room for KV positions per sequence | {' | '.join(map(room, costs))} |"


def _escaped(text: str) -> str:
    """Text whose underscores, stars and angle brackets mean themselves."""
    for character in "\\`*_<>|":
        text = text.replace(character, f"\\{character}")
    return text
