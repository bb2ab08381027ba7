"""`plan-devices`: picks the command, turns exceptions into one paragraph and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from planner.errors import PlannerError, SourceError

COMMANDS = {
    "plan": "place a model's modules on GPUs (the default command)",
    "run": "load a model as planned, and let it answer",
    "launch": "run a plan with one process per stage, on one host or several",
    "check": "say what a device map will break, where and why, and repair it",
    "explain": "say where a model's bytes are, and what bounds it on a GPU",
    "convert": "turn a folder of pickled weights into safetensors",
    "measure": "run a plan here, and print what it takes beside what was predicted",
    "machine": "print the GPUs of this machine, or what --gpus means",
    "models": "list the models that are known by name",
}

TORCH_EXTRA = ("torch", "transformers", "accelerate", "huggingface_hub", "sentencepiece", "PIL")
"""What the `torch` extra installs: planning does without, by import name."""

_USAGE = """\
usage: plan-devices MODEL [--gpus SPEC | --machine FILE] [options]
       plan-devices COMMAND ...

Plans which GPU each module of a vision-language model goes to, before a weight is read. The plan is YAML on
stdout, the reasoning is on stderr. MODEL is a checkpoint folder, a name from `plan-devices models`, an id on the hub,
or a module-graph file.

commands:
{commands}

`plan-devices plan --help` lists the planning options. Exit codes: 0 ok; 1 does not fit, or the map is unsafe;
2 bad arguments; 3 model, checkpoint, machine or plan unreadable, unknown, hostile or mismatching, or torch missing;
130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    arguments = [_hyphenated(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except PlannerError as problem:
        if not problem.is_reported:
            print(f"plan-devices: {problem}", file=sys.stderr)
        return problem.exit_code
    except ModuleNotFoundError as problem:
        if problem.name not in TORCH_EXTRA:
            raise
        print(f"plan-devices: this needs {problem.name}: pip install 'plan-devices[torch]'", file=sys.stderr)
        return SourceError.exit_code
    except KeyboardInterrupt:
        print("plan-devices: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<9}{help_text}" for name, help_text in COMMANDS.items())
        print(_USAGE.format(commands=commands), end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"plan-devices {_version()}")
        return 0
    command, rest = (arguments[0], arguments[1:]) if arguments[0] in COMMANDS else ("plan", arguments)
    return int(import_module(f"planner.cli.{command}").run(rest))


def _version() -> str:
    try:
        return version("plan-devices")
    except PackageNotFoundError:
        return "(run from a source tree, not installed)"


def _hyphenated(argument: str) -> str:
    """`--max_model_len=9` as `--max-model-len=9`: users of other tools type underscores."""
    if not argument.startswith("--"):
        return argument
    name, separator, value = argument.partition("=")
    return name.replace("_", "-") + separator + value
