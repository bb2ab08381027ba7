"""`plan-devices explain` in a process of its own: figures on stdout, refusals on stderr, and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`plan-devices explain` with these arguments, which must exit with `code` and without a traceback."""
    return _python("-m", "planner", "explain", *arguments, code=code)


def _python(*arguments: str, code: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    return done


def test_the_terminal_answers_what_people_ask() -> None:
    done = run("glm-4v-9b", "--gpus", "a100-80g")
    assert done.stderr == ""
    text = " ".join(done.stdout.split())
    for part in (
        "glm-4v-9b: 13.91 B parameters, bfloat16, 25.90 GiB of weights",
        "40 decoder layers 8,158,433,280 15.20 58.7%",
        "attention 1,426,063,360",
        "KV cache: 40.0 KiB per position",
        "32 attention heads share 2 key-value heads: one each would take 16 times as much",
        "13,696 wide, 3.34 times the model's 4,096",
        "resized to 1120x1120 takes 1,602 positions",
        "int4 and vision",
        "Prefill is bound by arithmetic",
        "Decode is bound by kernel launches",
        "unpacked to 16 bits in memory before the product",
        "33.4 tokens/s in bfloat16, 28.7 in bitsandbytes int4",
    ):
        assert part in text, part


def test_without_a_gpu_there_is_no_speed_and_a_hint() -> None:
    text = run("internlm2-7b").stdout
    assert "bound by" not in text and "--gpus rtx4090" in text


def test_what_a_config_does_not_say_is_left_out() -> None:
    text = run("llava-1.5-7b-hf").stdout
    assert "the config does not give their sizes" in text and "Feed-forward: " not in text


def test_json_has_every_figure() -> None:
    content = json.loads(run("internlm2-20b", "--gpus", "rtx4090,a100-80g", "--json").stdout)
    assert content["format"] == "plan-devices-explanation/1"
    assert content["kv_bytes_per_position"] == 196_608
    assert content["layer"]["num_kv_heads"] == 8
    assert [bounds["device"] for bounds in content["bounds"]] == ["rtx4090", "a100-80g"]
    assert {bounds["fits_weights"] for bounds in content["bounds"]} == {False, True}


def test_a_machine_file_names_its_devices(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text("devices: [{kind: l4}, {kind: l4}, {memory: 8GiB, bandwidth: 100GB/s, flops: 1e13}]\n")
    content = json.loads(run("internlm2-7b", "--machine", str(path), "--json").stdout)
    assert [bounds["device"] for bounds in content["bounds"]] == ["l4", "cuda:2"]


REFUSALS = {
    "a size has no speed": (("internlm2-7b", "--gpus", "24GiB"), 2, "cuda:0 (24.00 GiB) has no speed"),
    "an unknown GPU": (("internlm2-7b", "--gpus", "rtx4091"), 2, "did you mean rtx4090"),
    "an unknown model": (("internlm2-8b",), 3, "Did you mean internlm2-"),
    "images for a language model": (("internlm2-7b", "--num-images", "2"), 2, "takes no images"),
    "no prompt": (("internlm2-7b", "--prompt-tokens", "0"), 2, "prompt_tokens is 0: it must be at least 1"),
    "no model": ((), 2, "the following arguments are required: MODEL"),
    "no machine file": (("internlm2-7b", "--machine", "nowhere.yaml"), 3, "nowhere.yaml cannot be read"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_says_what_is_wrong_and_prints_nothing(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run(*arguments, code=code)
    assert done.stdout == "" and message in " ".join(done.stderr.split())


def test_an_explanation_from_the_catalogue_imports_no_torch() -> None:
    script = (
        "import sys; from planner.cli.main import main; code = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'accelerate', 'pynvml', 'runtime') if m in sys.modules]); "
        "sys.exit(code)"
    )
    done = _python("-c", script, "explain", "qwen3-vl-8b-instruct", "--gpus", "rtx4090", code=0)
    assert done.stdout.splitlines()[-1] == "[]"
