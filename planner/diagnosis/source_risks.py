"""Lines of model or user code that break a split model whatever its map: found in the syntax tree, never executed."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from os.path import isdir
from pathlib import Path

from planner.diagnosis.diagnosis import Finding, Hazard
from planner.errors import SourceError
from planner.textfile import read_text

_FACTORIES = frozenset(
    "arange empty eye from_numpy full linspace logspace ones rand randint randn randperm scalar_tensor tensor zeros "
    "BoolTensor FloatTensor HalfTensor IntTensor LongTensor Tensor".split()
)
"""Functions of torch that make a tensor on the current default device, the CPU, unless told otherwise."""

_MOVES = frozenset({"to", "cuda", "cpu", "type_as"})
_SETUP = frozenset({"__init__", "_init_weights", "post_init", "reset_parameters", "_reset_parameters", "extra_repr"})
"""Methods that run before weights are placed."""

_PARTS = frozenset(
    "language language_model llm llm_model lm text_model decoder language_decoder internlm_model".split()
)
"""What models call the language model inside them."""

SHOWN_CHARACTERS = 100
MAX_SOURCE_BYTES = 4 * 2**20
"""Ten times the largest model file of transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRisk:
    """A line of code that is risky under a map: `call` is quoted as written."""

    hazard: Hazard
    file: str
    line: int
    call: str
    reason: str
    fix: str

    @property
    def place(self) -> str:
        """`file:line: call`."""
        return f"{self.file}:{self.line}: {self.call}"


def scan_files(paths: Iterable[Path]) -> tuple[SourceRisk, ...]:
    """The risks in Python files, and in those right inside folders.

    Raises: SourceError for a file that cannot be read or is no Python.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.py")) if isdir(path) else [path])]
    return tuple(risk for file in files for risk in scan_source(_source(file), file.name))


def scan_source(text: str, file: str) -> tuple[SourceRisk, ...]:
    """The risks in one file's text.

    Raises: SourceError when it is no Python of this version, or nested too deeply to be anyone's.
    """
    try:
        with warnings.catch_warnings():
            # The parser warns of odd escapes in the file; that is its author's business.
            warnings.simplefilter("ignore")
            tree = ast.parse(text, filename=file)
        found = [
            SourceRisk(hazard=hazard, file=file, line=call.lineno, call=_quoted(call), reason=reason, fix=fix)
            for call, context in _calls(tree, _Context(names=_Names.of(tree)))
            for hazard, reason, fix in _judged(call, context)
        ]
    except (SyntaxError, ValueError) as problem:
        raise SourceError(f"source {file} is not Python: {problem}. Leave it out, or mend that line.") from problem
    except (RecursionError, MemoryError) as problem:
        raise SourceError(f"source {file} is nested too deeply to be read. Leave it out.") from problem
    return tuple(sorted(found, key=lambda risk: risk.line))


def source_findings(risks: Iterable[SourceRisk]) -> Iterator[Finding]:
    """One finding per kind of risk, with every line of it as evidence."""
    kinds: dict[tuple[Hazard, str, str], list[SourceRisk]] = {}
    for risk in risks:
        kinds.setdefault((risk.hazard, risk.reason, risk.fix), []).append(risk)
    for (hazard, reason, fix), same in kinds.items():
        yield Finding(
            severity="may fail",
            hazard=hazard,
            title=f"{reason}, on {len(same)} line{'s'[: len(same) != 1]}",
            evidence=tuple(risk.place for risk in same),
            fix=fix,
            place=same[0].place,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """What a file's names stand for: torch itself, functions of torch, and CUDA devices."""

    torch: frozenset[str]
    functions: Mapping[str, str]
    devices: frozenset[str]

    @classmethod
    def of(cls, tree: ast.Module) -> _Names:
        """The names that imports and assignments give, wherever in the file they stand."""
        torch, devices = {"torch"}, set()
        functions: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                torch |= {alias.asname or alias.name for alias in node.names if alias.name == "torch"}
            elif isinstance(node, ast.ImportFrom) and node.module == "torch":
                functions |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.Assign) and _is_cuda_literal(node.value):
                devices |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        return cls(torch=frozenset(torch), functions=functions, devices=frozenset(devices))

    def torch_function(self, call: ast.Call) -> str:
        """The function of torch that a call is of, by whatever name; empty for any other."""
        match call.func:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if module in self.torch:
                return name
            case ast.Name(id=name):
                return self.functions.get(name, "")
        return ""

    def without(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> _Names:
        """The same inside a function, whose parameters may be any device."""
        arguments = function.args
        own = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        return replace(self, devices=self.devices - own)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """Where a call stands: in a method of a class, among which names, and whether its result is moved at once."""

    names: _Names
    in_class: bool = False
    function: str = ""
    is_moved: bool = False


def _calls(node: ast.AST, context: _Context) -> Iterator[tuple[ast.Call, _Context]]:
    if isinstance(node, ast.ClassDef):
        context = replace(context, in_class=True, function="")
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        context = replace(context, function=node.name, names=context.names.without(node))
    if isinstance(node, ast.Call):
        yield node, context
        moved = isinstance(node.func, ast.Attribute) and node.func.attr in _MOVES
        yield from _calls(node.func, replace(context, is_moved=True) if moved else context)
        context = replace(context, is_moved=False) if context.is_moved else context
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            yield from _calls(argument, context)
        return
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, context)


def _judged(call: ast.Call, context: _Context) -> Iterator[tuple[Hazard, str, str]]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    torch_function = context.names.torch_function(call)
    if name == "cuda" and not torch_function:
        yield (
            "hardcuda",
            ".cuda() moves to the current GPU, whatever the map says",
            "Drop it for modules and inputs, which hooks move; for a tensor write .to(other.device).",
        )
    if _names_cuda(call, name, context.names):
        yield (
            "hardcuda",
            "a device is written out",
            "Take it from what the tensor meets: device=x.device.",
        )
    forward_like = context.in_class and context.function not in _SETUP
    if forward_like and not context.is_moved and _makes_on_default_device(call, torch_function):
        yield (
            "hardcuda",
            "a tensor is made without a device, so on the CPU",
            "Pass device=x.device, or .to(x.device) it.",
        )
    if name == "generate" and _is_part(call.func):
        yield (
            "genio",
            "generate() is called on a part of the model, past the hooks of the whole",
            "Keep that part's head on the device of its token embedding, or call the whole model's generate().",
        )


def _source(path: Path) -> str:
    text = read_text(path, "source", SourceError)
    if len(text) > MAX_SOURCE_BYTES:
        raise SourceError(
            f"source {path} has {len(text)} characters: at most {MAX_SOURCE_BYTES} are read. Leave it out."
        )
    return text


def _names_cuda(call: ast.Call, name: str, names: _Names) -> bool:
    """`x.to("cuda")`, `x.to(0)`, `zeros(3, device="cuda:0")`, or a name for such a device.

    Not a comparison, nor a plain `torch.device("cuda")` in a default.
    """
    written = [keyword.value for keyword in call.keywords if keyword.arg == "device"]
    written += call.args[:1] if name == "to" else []
    return any(
        _is_index(v) or _is_cuda_literal(v) or isinstance(v, ast.Name) and v.id in names.devices for v in written
    )


def _is_index(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


def _is_cuda_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.IfExp):
        return _is_cuda_literal(node.body) or _is_cuda_literal(node.orelse)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.partition(":")[0] == "cuda"
    if isinstance(node, ast.JoinedStr) and node.values:
        return _is_cuda_literal(node.values[0]) or _starts_with_cuda(node.values[0])
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.device", "device"):
        return bool(node.args) and _is_cuda_literal(node.args[0])
    return False


def _starts_with_cuda(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda:")


def _makes_on_default_device(call: ast.Call, name: str) -> bool:
    if name not in _FACTORIES:
        return False
    if any(keyword.arg in ("device", None) for keyword in call.keywords):
        return False
    # A number alone stays on the CPU as a scalar, which every kernel takes.
    return not (name in ("tensor", "scalar_tensor") and call.args and _is_number(call.args[0]))


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        return _is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return _is_number(node.left) and _is_number(node.right)
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("float", "int", "len")
    return isinstance(node, ast.Constant) and not isinstance(node.value, str)


def _is_part(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Attribute)
        and function.value.attr in _PARTS
    )


def _quoted(call: ast.Call) -> str:
    text = " ".join(ast.unparse(call).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
