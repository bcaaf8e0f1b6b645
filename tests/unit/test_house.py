"""The rules of the house, proven from the source: who may import whom, and how large things may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nsa_sel

PACKAGE = Path(nsa_sel.__file__).parent
MOST_LINES, MOST_PARAMETERS = 300, 12
# A room may import those to its left, and what those may import.
ORDER = """
    errors config arguments modes < spans < routing reference
    errors < kernel < parts
    routing reference parts < training < dispatch < ops < api < __init__ < bench < __main__
    sharded < ops
    arguments ops config < recording < __init__
"""
BENCH_ORDER = """
    tables command_line < saved
    timer < parallel < tune plugin run_tests decide
    timer saved tables < suite < compare < threshold < report
    timer saved suite < resume
    compare resume suite < ranks < tune
    suite timer < methods < session tune checks
    session tune < compare < checks
    compare session tune precompile < continuous
    tune < precompile checks
    tune threshold < decide < checks < why
    timer command_line < cli
    compare resume suite < plugin < run_tests
"""


def modules(folder: Path) -> dict[str, Path]:
    """Return every module of a package by its dotted name below the package, which itself is `__init__`."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"] = path
    return found


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(folder: Path) -> dict[str, set[str]]:
    """Return for each module those of the package that it imports relatively, inside functions too."""
    known = modules(folder)
    return {name: set(_imported(name, path, known)) - {name} for name, path in known.items()}


def _imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    package = [] if name == "__init__" else name.split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*start, alias.name])
                yield inner if inner in known else ".".join(start) or "__init__"


def no_such_module(folder: Path) -> list[str]:
    """List the imports of modules that do not exist: inside a function nothing else would see them."""
    return sorted(
        f"{name} imports {other}" for name, into in imports(folder).items() for other in into - set(modules(folder))
    )


def circles(folder: Path) -> list[str]:
    """List the groups of modules that import one another."""
    known = set(modules(folder))
    arrows = {name: imported & known for name, imported in imports(folder).items()}
    reached = {}
    for name in arrows:
        seen, todo = set(), [name]
        while todo:
            new = arrows[todo.pop()] - seen
            seen |= new
            todo += new
        reached[name] = seen
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in reached if a in reached[a]}
    return sorted(" <-> ".join(sorted(group)) for group in groups)


def against_the_order(folder: Path) -> list[str]:
    """List the imports of a room that stands above, and the modules that have no room."""
    above, in_bench = _may_import(ORDER), _may_import(BENCH_ORDER)
    found = []
    for name, imported in imports(folder).items():
        rooms = name.split(".")
        if rooms[0] not in above or (rooms[0] == "bench" and len(rooms) > 1 and rooms[1] not in in_bench):
            found.append(f"{name} has no room")
            continue
        for other in sorted(imported):
            into = other.split(".")
            if into[0] != rooms[0]:
                allowed = into[0] in above[rooms[0]]
            else:
                allowed = rooms[0] != "bench" or into[1] == rooms[1] or into[1] in in_bench[rooms[1]]
            if not allowed:
                found.append(f"{name} imports {other}")
    return found


def _may_import(order: str) -> dict[str, set[str]]:
    below: dict[str, set[str]] = {}
    for line in order.strip().splitlines():
        ranks = [rank.split() for rank in line.split("<")]
        for rank in ranks:
            for room in rank:
                below.setdefault(room, set())
        for lower, upper in zip(ranks, ranks[1:], strict=False):
            for room in upper:
                below[room] |= set(lower)
    for _ in below:  # until what a room's lower rooms may import is its own too
        for rooms in below.values():
            rooms |= set().union(*(below[room] for room in rooms))
    return below


def not_relative(folder: Path) -> list[str]:
    """List imports of the package under its own name, by a string too, and imports of the tests."""
    own = re.compile(rf"{folder.name}(\.\w+)+")
    found = []
    for name, path in modules(folder).items():
        docstrings = {id(node.value) for node in ast.walk(tree(path)) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree(path)):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                named = [node.module or ""]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                named = [node.value] if own.fullmatch(node.value) else []
            for each in named:
                if each.split(".")[0] in (folder.name, "tests", "conftest"):
                    found.append(f"{name} names {each}")
    return found


def too_long(folder: Path) -> list[str]:
    """List the modules of more than 300 lines."""
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules(folder).items()}
    return [f"{name} has {n} lines" for name, n in lengths.items() if n > MOST_LINES]


def too_many_parameters(folder: Path) -> list[str]:
    """List the functions of more than 12 parameters that are no device code."""
    found = []
    for name, path in modules(folder).items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                a = node.args
                n = len([*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))])
                if n > MOST_PARAMETERS:
                    found.append(f"{name}.{node.name} has {n} parameters")
    return found


def verbs_elsewhere(folder: Path) -> list[str]:
    """List the modules of bench that define a `main` and are neither a verb's command, the command line nor a check."""
    found = []
    for name, path in modules(folder).items():
        mains = [n for n in tree(path).body if isinstance(n, ast.FunctionDef) and n.name == "main"]
        room = name.split(".")
        if mains and room[0] == "bench" and room[-1] not in ("command", "cli") and room[1] != "checks":
            found.append(f"{name} has a main")
    return found


def issue_numbers(folder: Path) -> list[str]:
    """List the lines that cite an issue by its number."""
    return [
        f"{name}: {line.strip()}"
        for name, path in modules(folder).items()
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\bissues? #?\d", line, re.IGNORECASE)
    ]


Rule = Callable[[Path], list[str]]
RULES: tuple[Rule, ...] = (
    no_such_module,
    circles,
    against_the_order,
    not_relative,
    too_long,
    too_many_parameters,
    verbs_elsewhere,
    issue_numbers,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule):
    assert rule(PACKAGE) == []


# --- each rule sees a breach that is planted in a small house ---

KERNEL = "import triton\n\n\n@triton.jit\ndef _sel_fwd({}):\n    pass\n"
HOUSE = {
    "__init__.py": "from .api import run\n",
    "errors.py": '"""Named nsa_sel.errors outside."""\n',
    "spans.py": "",
    "kernel/__init__.py": "",
    "kernel/launch.py": "from ..errors import Failed\nfrom . import forward\n" + "\n" * 298,  # as long as it may be
    "kernel/forward.py": KERNEL.format(", ".join(f"x{i}" for i in range(40))),
    "dispatch.py": "def run(q):\n    from .kernel import launch\n    return launch\n",
    "ops.py": "from . import dispatch\n",
    "api.py": "from .ops import dispatch\n",
    "bench/__init__.py": "",
    "bench/cli.py": "from .. import run\nfrom ..spans import clamp\n\n\ndef main():\n    pass\n",
    "bench/suite/__init__.py": "",
    "bench/suite/cases.py": "",
    "bench/threshold/__init__.py": "",
    "bench/threshold/command.py": "from ..suite import cases\n\n\ndef main():\n    pass\n",
}


def house(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "nsa_sel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "nsa_sel"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_small_house_keeps_the_rule(rule: Rule, tmp_path: Path):
    assert rule(house(tmp_path, HOUSE)) == []


@pytest.mark.parametrize(
    ("rule", "name", "text", "breach"),
    [
        (no_such_module, "bench/cli.py", "def f():\n    from ..kernels import launch\n", "bench.cli imports kernels"),
        (circles, "ops.py", "from . import dispatch\ndef f():\n    from .api import g\n", "api <-> ops"),
        (circles, "kernel/forward.py", "from .launch import Plan\n", "kernel.forward <-> kernel.launch"),
        (against_the_order, "kernel/forward.py", "from ..spans import clamp\n", "kernel.forward imports spans"),
        (against_the_order, "dispatch.py", "from . import api\n", "dispatch imports api"),
        (against_the_order, "spans.py", "from .bench.suite import cases\n", "spans imports bench.suite.cases"),
        (against_the_order, "errors.py", "from . import run\n", "errors imports __init__"),
        (
            against_the_order,
            "bench/suite/cases.py",
            "def f():\n    from ..threshold import command\n",
            "bench.suite.cases imports bench.threshold.command",
        ),
        (against_the_order, "tuning.py", "", "tuning has no room"),
        (against_the_order, "bench/extra.py", "", "bench.extra has no room"),
        (not_relative, "bench/cli.py", "from nsa_sel.spans import clamp\n", "bench.cli names nsa_sel.spans"),
        (not_relative, "bench/cli.py", "import nsa_sel\n", "bench.cli names nsa_sel"),
        (not_relative, "bench/cli.py", 'COMMAND = ["-m", "nsa_sel.bench.cli"]\n', "bench.cli names nsa_sel.bench.cli"),
        (not_relative, "api.py", "def f():\n    import tests.unit\n", "api names tests.unit"),
        (too_long, "spans.py", "\n" * 301, "spans has 301 lines"),
        (too_many_parameters, "api.py", "def f(a, b, c, d, e, f, g, /, h, i, *j, k, l, **m): pass\n", "api.f has 13"),
        (verbs_elsewhere, "bench/suite/cases.py", "def main(): pass\n", "bench.suite.cases has a main"),
        (issue_numbers, "api.py", "# Source: issue 12, the API.\n", "api: # Source: issue 12, the API."),
    ],
)
def test_a_breach_is_seen(rule: Rule, name: str, text: str, breach: str, tmp_path: Path):
    found = rule(house(tmp_path, {**HOUSE, name: text}))
    assert len(found) == 1 and found[0].startswith(breach), found
