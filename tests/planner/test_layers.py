"""Who may import whom, read from the source of every file with `ast`; and that what is torch-free stays so."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("planner", "vlm", "runtime")
HEAVY = ("torch", "transformers", "accelerate", "pynvml")

ALLOWED_PLACES = {
    "networkx": {
        *("planner/graph.py", "planner/constraints.py", "planner/module_graph_file.py", "planner/solve"),
        *("runtime/traced_graph.py", "runtime/diagnosis/repair.py"),
    },
    "yaml": {"planner/textfile.py"},
    "rich": {
        *("planner/report.py", "planner/pages/terminal.py", "planner/pages/explanation.py"),
        *("planner/pages/sizing.py", "planner/pages/measured.py"),
        *("planner/cli", "runtime/progress.py"),
    },
    "pynvml": {"runtime/probe.py"},
    "ortools": {"planner/solve/cp_sat.py", "planner/solve/relaxation.py"},
}
"""Libraries that one file, or a folder, keeps to itself."""

TORCH_FREE_VLM = (
    *("vlm", "vlm.model", "vlm.planning", "vlm.checkpoint", "vlm.catalogue", "vlm.internlm_xcomposer2"),
    *("vlm.internlm_xcomposer2.facts", "vlm.internlm_xcomposer2.graph", "vlm.explaining"),
    *("vlm.largest", "vlm.recommending"),
)


@dataclass(frozen=True)
class Import:
    """One imported module (`a.b` for `from a import b` as well as `a`), where, and whether inside a function."""

    module: str
    path: str
    line: int
    late: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def sources(package: str) -> Iterator[tuple[str, ast.Module]]:
    """Path from the root and syntax tree of every file of a package."""
    for path in sorted((ROOT / package).rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports(package: str) -> list[Import]:
    return [found for path, tree in sources(package) for found in _imports(path, tree)]


def _imports(path: str, tree: ast.Module) -> Iterator[Import]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    late = {id(node) for outer in ast.walk(tree) if isinstance(outer, functions) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        for module in _modules(node, path):
            yield Import(module=module, path=path, line=getattr(node, "lineno", 0), late=id(node) in late)


def _modules(node: ast.AST, path: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = path.removesuffix(".py").split("/")[: -node.level] if node.level else []
        module = ".".join([*package, *([node.module] if node.module else [])])
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "import_module",
        "importlib.import_module",
        "__import__",
    ):
        name = node.args[0]
        return [ast.unparse(name).strip("f'\"")]
    return []


def inside(path: str, places: set[str]) -> bool:
    return any(path == place or path.startswith(place + "/") for place in places)


def offenders(found: list[Import]) -> list[str]:
    return [str(item) for item in found]


# -- the reader itself


def test_the_reader_sees_every_form_of_import() -> None:
    text = (
        "import a.b as c, d\nfrom e.f import g\nfrom . import h\nfrom ..i import j\n"
        "def k():\n    import l\nclass M:\n    import n\nimportlib.import_module('o.p')\nif True:\n    import q\n"
    )
    found = list(_imports("planner/cli/x.py", ast.parse(text)))
    assert {item.module for item in found} == {
        *("a.b", "d", "e.f.g", "planner.cli.h", "planner.i.j", "l", "n", "o.p", "q"),
    }
    assert [item.module for item in found if item.late] == ["l"]


def test_every_package_is_read() -> None:
    for package in PACKAGES:
        assert len(imports(package)) > 10


# -- who may know whom


def test_planner_outside_its_command_line_imports_nothing_from_vlm_or_runtime() -> None:
    found = [item for item in imports("planner") if item.top in ("vlm", "runtime")]
    assert offenders([item for item in found if not inside(item.path, {"planner/cli"})]) == []


def test_planner_imports_no_torch_no_transformers_and_no_driver_not_even_late() -> None:
    assert offenders([item for item in imports("planner") if item.top in HEAVY]) == []


def test_vlm_imports_nothing_from_runtime_and_nothing_of_the_command_line() -> None:
    found = [item for item in imports("vlm") if item.top == "runtime" or item.module.startswith("planner.cli")]
    assert offenders(found) == []


def test_runtime_imports_nothing_of_the_command_line() -> None:
    assert offenders([item for item in imports("runtime") if item.module.startswith("planner.cli")]) == []


def test_late_imports_in_planner_exist_only_in_the_command_line() -> None:
    found = [item for item in imports("planner") if item.late and not inside(item.path, {"planner/cli"})]
    assert offenders(found) == []


@pytest.mark.parametrize("library", ALLOWED_PLACES)
def test_a_library_stays_where_it_belongs(library: str) -> None:
    found = [item for package in PACKAGES for item in imports(package) if item.top == library]
    assert found, f"nothing imports {library}: drop the rule"
    assert offenders([item for item in found if not inside(item.path, ALLOWED_PLACES[library])]) == []


def test_inside_planner_values_do_not_import_what_reasons_on_them() -> None:
    """The order of the data flow: each file imports only files before it."""
    order = [
        *(
            "units",
            "errors",
            "paths",
            "polynomial",
            "textfile",
            "graph",
            "machine",
            "workload",
            "memory",
            "timing",
            "constraints",
            "placement_graph",
            "module_graph_file",
            "graph_export",
        ),
        *("problem", "solve", "shortfall", "plan", "alternatives", "report"),
        *("diagnosis", "pages", "cli"),
    ]
    rank = {f"planner.{name}": position for position, name in enumerate(order)}
    for item in imports("planner"):
        parts = item.path.removesuffix(".py").split("/")
        own, target = rank.get(".".join(parts[:2])), rank.get(".".join(item.module.split(".")[:2]))
        if own is not None and target is not None:
            assert target <= own, str(item)


# -- torch's private API


def private_torch_names(tree: ast.Module) -> list[str]:
    """Dotted names below torch with a segment that starts with one underscore; operators' own names are no API."""
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names += [module for node in ast.walk(tree) for module in _modules(node, "x.py")]
    dotted = [name.split(".") for name in names if name.startswith("torch.") and not name.startswith("torch.ops.")]
    return sorted({".".join(p) for p in dotted if any(s.startswith("_") and not s.startswith("__") for s in p)})


def test_private_names_of_torch_are_seen() -> None:
    text = "import torch._C\nfrom torch.utils import _pytree\ntorch.library._scoped(1)\n"
    public = "torch.ops.aten._to_copy\ntorch.__version__\nx._C\n"
    assert private_torch_names(ast.parse(text)) == ["torch._C", "torch.library._scoped", "torch.utils._pytree"]
    assert private_torch_names(ast.parse(public)) == []


def test_torchs_private_api_is_used_in_the_adapter_only() -> None:
    used = {path: names for p in PACKAGES for path, tree in sources(p) if (names := private_torch_names(tree))}
    assert set(used) <= {"runtime/virtual/adapter.py"}, used


# -- printing, globals, environment


def calls(package: str, *names: str) -> list[str]:
    return [
        f"{path}:{node.lineno} {ast.unparse(node.func)}"
        for path, tree in sources(package)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_prints_outside_the_command_line(package: str) -> None:
    assert [call for call in calls(package, "print") if not call.startswith("planner/cli/")] == []


def test_planner_and_vlm_read_no_environment_outside_the_command_line() -> None:
    for package in ("planner", "vlm"):
        reads = [
            f"{path}:{node.lineno}"
            for path, tree in sources(package)
            for node in ast.walk(tree)
            if not inside(path, {"planner/cli"})
            and isinstance(node, ast.Attribute)
            and ast.unparse(node) in ("os.environ", "os.getenv")
        ]
        assert reads == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_exception_is_caught_blindly_and_no_global_is_rebound(package: str) -> None:
    for path, tree in sources(package):
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Global), f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else ""
                assert caught not in ("", "Exception"), f"{path}:{node.lineno}"


# -- what an import brings along


def heavy_modules_after(*modules: str) -> str:
    """What of `HEAVY` a fresh process has loaded after importing these modules."""
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_torch_free_modules_of_vlm_bring_no_torch_along() -> None:
    assert heavy_modules_after(*TORCH_FREE_VLM) == "[]"


def test_no_module_of_planner_brings_torch_along() -> None:
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path, _ in sources("planner")]
    assert heavy_modules_after(*[name for name in names if name != "planner.__main__"]) == "[]"


def test_the_probe_brings_its_driver_binding_and_still_no_torch() -> None:
    assert heavy_modules_after("runtime.probe") == "['pynvml']"
