"""Code that no map mends: found in the syntax tree with file, line and quoted call, and nothing else flagged."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner import SourceError
from planner.diagnosis.source_risks import MAX_SOURCE_BYTES, scan_files, scan_source, source_findings

RISKY = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.arange(10)

    def forward(self, x):
        mask = torch.zeros(x.shape[0]).cuda()
        positions = torch.arange(x.shape[1])
        y = x.to("cuda:0") + torch.ones(3, device="cuda")
        z = x.to(torch.device("cuda", 1)) + torch.full((2,), 1.0, device=f"cuda:{self.rank}")
        return self.language_model.generate(inputs_embeds=y + z + positions)

def chat(model, inputs):
    return model.generate(**inputs.to("cuda"))
"""

HARMLESS = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(4))

    def forward(self, x):
        scale = torch.tensor(0.5) * torch.tensor(-1) + torch.tensor(float("inf"))
        steps = torch.arange(x.shape[1], device=x.device)
        mask = torch.ones(x.shape).to(x.device)
        like = torch.zeros_like(x) + torch.arange(3).type_as(x)
        if x.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.synchronize()
        return x.to(self.head.weight.device) * scale + steps + mask + like.to(x.dtype)

    def generate(self, **inputs):
        return self.generation.generate(**inputs)

def build(model, **options):
    table = torch.zeros(3, **options)
    return torch.arange(4), table
"""


RENAMED = """
import torch as t
from torch import arange as count, zeros
DEVICE = "cuda" if t.cuda.is_available() else "cpu"

class Model:
    def forward(self, x):
        made = zeros(3), count(4), t.ones(5), t.LongTensor([1])
        return x.to(DEVICE), x.to(0), made

    def moved(self, x, DEVICE):
        return x.to(DEVICE), zeros(3).to(x.device), t.tensor(-0.5 * 3), self.zeros(3)
"""


def test_names_that_stand_for_torch_its_functions_and_devices_are_followed() -> None:
    found = [(risk.line, risk.call) for risk in scan_source(RENAMED, "model.py")]
    made = ["zeros(3)", "count(4)", "t.ones(5)", "t.LongTensor([1])"]
    assert found == [*((8, call) for call in made), (9, "x.to(DEVICE)"), (9, "x.to(0)")]


def test_every_risky_line_is_quoted_with_its_number() -> None:
    found = {(risk.line, risk.hazard, risk.call) for risk in scan_source(RISKY, "model.py")}
    assert found == {
        (11, "hardcuda", "torch.zeros(x.shape[0]).cuda()"),
        (12, "hardcuda", "torch.arange(x.shape[1])"),
        (13, "hardcuda", "x.to('cuda:0')"),
        (13, "hardcuda", "torch.ones(3, device='cuda')"),
        (14, "hardcuda", "x.to(torch.device('cuda', 1))"),
        (14, "hardcuda", "torch.full((2,), 1.0, device=f'cuda:{self.rank}')"),
        (15, "genio", "self.language_model.generate(inputs_embeds=y + z + positions)"),
        (18, "hardcuda", "inputs.to('cuda')"),
    }


def test_code_that_follows_its_inputs_is_not_flagged() -> None:
    assert scan_source(HARMLESS, "model.py") == ()


def test_risks_of_one_kind_are_one_finding_that_may_fail() -> None:
    findings = list(source_findings(scan_source(RISKY, "model.py")))
    assert {finding.severity for finding in findings} == {"may fail"}
    written = next(finding for finding in findings if finding.title.startswith("a device is written out"))
    assert written.title.endswith("on 5 lines")
    assert "model.py:13: x.to('cuda:0')" in written.evidence


def test_files_and_folders_are_read_and_never_run(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text("raise SystemExit(3)\nx.cuda()\n")
    (tmp_path / "weights.bin").write_bytes(b"\x00")
    assert [risk.place for risk in scan_files([tmp_path])] == ["modeling.py:2: x.cuda()"]
    assert len(scan_files([tmp_path / "modeling.py", tmp_path])) == 2


@pytest.mark.parametrize("text", ["def f(:\n", "\x00", "x = " + "(" * 3000 + ")" * 3000])
def test_what_is_no_python_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="source model.py is not Python"):
        scan_source(text, "model.py")


@pytest.mark.parametrize("text", ["x = " + "-" * 100_000 + "1", "x = a" + ".b()" * 1500 + ".cuda()"])
def test_what_is_nested_too_deeply_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="source model.py is nested too deeply"):
        scan_source(text, "model.py")


def test_a_file_that_is_too_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text("#" * (MAX_SOURCE_BYTES + 1))
    with pytest.raises(SourceError, match=f"has {MAX_SOURCE_BYTES + 1} characters: at most {MAX_SOURCE_BYTES}"):
        scan_files([tmp_path])


def test_odd_escapes_in_the_file_raise_no_warning() -> None:
    assert scan_source(r"pattern = '\d'; x.cuda()", "model.py")[0].call == "x.cuda()"


def test_long_calls_are_cut() -> None:
    call = f"x.cuda({', '.join(['argument'] * 40)})"
    quoted = scan_source(call, "model.py")[0].call
    assert len(quoted) == 100
    assert quoted.endswith("...")
