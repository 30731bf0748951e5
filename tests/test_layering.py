"""Layers: which folder of serve/ may import which, checked against the import statements."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@dataclass(frozen=True, slots=True)
class Row:
    """One folder of ``serve/``, or one module at its top.

    ``imports`` names the rows below that it may import. Without ``torch`` none of its imports may
    lead to torch, directly or through other modules. ``packages`` are the packages outside the
    standard library that it may import; None means any.
    """

    name: str
    imports: str
    torch: bool = False
    packages: frozenset[str] | None = None


def _only(*packages: str) -> frozenset[str]:
    return frozenset(packages)


# Top to bottom. A row imports only rows below it, so no two rows can import each other.
ROWS = (
    Row("launch", "runtime config topology", torch=True),
    Row("llm", "runtime api dispatch config topology request", torch=True),
    Row("runtime", "api engine config dispatch replica comm tokenizer protocol topology device",
        torch=True),
    Row("api", "config dispatch tokenizer request"),
    Row("engine", "config replica sampling model kv comm model_config protocol topology request",
        torch=True),
    Row("config", "dispatch replica model_config topology request",
        packages=_only("msgspec", "huggingface_hub")),
    Row("dispatch", "protocol topology request"),
    Row("replica", "tokenizer protocol model_config topology request"),
    Row("tokenizer", "protocol model_config request"),
    Row("sampling", "protocol device request", torch=True),
    Row("model", "kv comm model_config protocol", torch=True),
    Row("kv", "model_config", torch=True),
    Row("comm", "protocol topology device", torch=True),
    Row("protocol", "model_config request", packages=_only("msgspec")),
    Row("model_config", "", packages=_only("gguf", "numpy")),
    Row("device", "", torch=True),
    Row("topology", "", packages=_only()),
    Row("request", "", packages=_only("msgspec")),
)  # fmt: skip

TORCH = {"torch", "triton", "flash_attn", "torchvision", "torchaudio"}
# Other packages that import torch when they are imported.
BRINGS_TORCH = {"accelerate"}


@dataclass(frozen=True, slots=True)
class Module:
    """The imports of one module: our modules in ``inner``, other packages' top names in ``outer``.

    ``eager`` holds the imports of both kinds that run when the module is imported.
    """

    name: str
    inner: frozenset[str]
    outer: frozenset[str]
    eager: frozenset[str]


def read_tree(top: Path, package: str) -> dict[str, Module]:
    """Read every module of ``package`` below ``top`` by dotted name, except ``__init__`` files."""
    files = {
        ".".join(path.relative_to(top).with_suffix("").parts): path
        for path in sorted((top / package).rglob("*.py"))
        if path.name != "__init__.py"
    }
    return {name: read_module(name, path.read_text(), files) for name, path in files.items()}


def read_module(name: str, source: str, known: Iterable[str]) -> Module:
    """Read the imports in ``source``; ``known`` names our modules."""
    package = name.partition(".")[0]
    tree = ast.parse(source)
    every = frozenset(_imports(name, ast.walk(tree), set(known)))
    eager = frozenset(_imports(name, _run_at_import(tree), set(known)))
    inner = frozenset(target for target in every if target.partition(".")[0] == package)
    return Module(name, inner, every - inner, eager)


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _run_at_import(child)


def _imports(name: str, nodes: Iterable[ast.AST], known: set[str]) -> Iterator[str]:
    package = name.partition(".")[0]
    for node in nodes:
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write imports absolutely"
            assert node.module is not None
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [target if target in known else node.module for target in full]
        for target in targets:
            yield target if target.partition(".")[0] == package else target.partition(".")[0]


def row_of(name: str, rows: Sequence[Row] = ROWS) -> Row:
    """Return the row of a module. Raises ``KeyError`` if ``rows`` has none for its folder."""
    folder = name.split(".")[1]
    for row in rows:
        if row.name == folder:
            return row
    raise KeyError(f"serve/{folder} has no row in ROWS of tests/test_layering.py")


def find_forbidden(tree: Mapping[str, Module], rows: Sequence[Row] = ROWS) -> list[str]:
    """List every import that the rows forbid, one line each."""
    forbidden = []
    for module in tree.values():
        row = row_of(module.name, rows)
        for target in sorted(module.inner):
            if target not in tree:
                forbidden.append(f"{module.name} imports {target}, which is not a module")
            elif row_of(target, rows).name not in (row.name, *row.imports.split()):
                forbidden.append(f"{module.name} imports {target}, which its row does not allow")
        foreign = module.outer - set(sys.stdlib_module_names)
        if row.packages is not None and foreign - row.packages:
            forbidden.append(f"{module.name} imports {sorted(foreign - row.packages)}")
    return forbidden


def find_torch(tree: Mapping[str, Module], start: str, *, eager: bool) -> list[str] | None:
    """Find a chain of imports from ``start`` to torch, or return None."""
    chains = {start: [start]}
    queue = [start]
    for name in queue:
        if name in TORCH | BRINGS_TORCH:
            return chains[name]
        if name not in tree:
            continue
        module = tree[name]
        for target in sorted(module.eager if eager else module.inner | module.outer):
            if target not in chains:
                chains[target] = [*chains[name], target]
                queue.append(target)
    return None


def find_cycle(tree: Mapping[str, Module]) -> list[str] | None:
    """Find a cycle of imports, or return None."""
    finished: set[str] = set()

    def visit(name: str, chain: list[str]) -> list[str] | None:
        if name in chain:
            return [*chain[chain.index(name) :], name]
        if name in finished or name not in tree:
            return None
        for target in sorted(tree[name].inner):
            cycle = visit(target, [*chain, name])
            if cycle:
                return cycle
        finished.add(name)
        return None

    return next((cycle for name in tree if (cycle := visit(name, []))), None)


@pytest.fixture(scope="module")
def tree() -> dict[str, Module]:
    return read_tree(ROOT, "serve")


def test_every_folder_has_one_row_and_every_row_a_folder(tree: dict[str, Module]) -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert {row_of(name).name for name in tree} == set(names)


def test_rows_allow_only_rows_below_them() -> None:
    for index, row in enumerate(ROWS):
        below = {other.name for other in ROWS[index + 1 :]}
        assert set(row.imports.split()) <= below, row.name


def test_rows_allow_nothing_unused(tree: dict[str, Module]) -> None:
    used: dict[str, set[str]] = {row.name: set() for row in ROWS}
    for module in tree.values():
        row = row_of(module.name).name
        used[row] |= {row_of(target).name for target in module.inner} - {row}
    assert used == {row.name: set(row.imports.split()) for row in ROWS}


def test_imports_are_allowed(tree: dict[str, Module]) -> None:
    forbidden = find_forbidden(tree)
    assert not forbidden, "\n".join(forbidden)


def test_imports_have_no_cycles(tree: dict[str, Module]) -> None:
    cycle = find_cycle(tree)
    assert not cycle, " -> ".join(cycle or ())


def test_only_rows_that_allow_torch_import_it(tree: dict[str, Module]) -> None:
    for name in tree:
        chain = None if row_of(name).torch else find_torch(tree, name, eager=False)
        assert chain is None, " -> ".join(chain or ())


def test_importing_launch_does_not_import_torch(tree: dict[str, Module]) -> None:
    """``serve.launch`` checks its options before it imports torch."""
    chain = find_torch(tree, "serve.launch", eager=True)
    assert chain is None, " -> ".join(chain or ())


def test_init_files_import_nothing() -> None:
    for path in sorted((ROOT / "serve").rglob("__init__.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)], path


def test_every_folder_is_a_package() -> None:
    for path in sorted((ROOT / "serve").rglob("*.py")):
        assert (path.parent / "__init__.py").is_file(), path.parent


# --- the checks themselves ----------------------------------------------------------------------


def _tree_of(**sources: str) -> dict[str, Module]:
    names = {name.replace("__", "."): source for name, source in sources.items()}
    return {name: read_module(name, source, names) for name, source in names.items()}


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("serve__replica__scheduler", "import serve.engine.runner", "row does not allow"),
        ("serve__replica__scheduler", "def f():\n from serve.engine import runner", "row does not"),
        ("serve__dispatch__policies", "from serve.model.llama import L", "row does not allow"),
        ("serve__engine__worker", "from serve.engine import nothing", "not a module"),
        ("serve__topology", "import msgspec", "msgspec"),
    ],
)
def test_forbidden_imports_are_reported(name: str, source: str, reason: str) -> None:
    others = {"serve__engine__runner": "", "serve__model__llama": ""}
    forbidden = find_forbidden(_tree_of(**{**others, name: source}))
    assert len(forbidden) == 1
    assert reason in forbidden[0]


def test_allowed_imports_are_not_reported() -> None:
    tree = _tree_of(
        serve__engine__worker="import serve.model.llama", serve__model__llama="import torch"
    )
    assert not find_forbidden(tree)


def test_cycles_are_found() -> None:
    tree = _tree_of(serve__a="import serve.b", serve__b="def f():\n import serve.a", serve__c="")
    assert find_cycle(tree) == ["serve.a", "serve.b", "serve.a"]
    assert find_cycle(_tree_of(serve__a="import serve.b", serve__b="")) is None


def test_torch_is_found_through_other_modules() -> None:
    tree = _tree_of(serve__a="from serve import b", serve__b="def f():\n import torch.nn")
    assert find_torch(tree, "serve.a", eager=False) == ["serve.a", "serve.b", "torch"]
    assert find_torch(tree, "serve.a", eager=True) is None


def test_a_folder_without_a_row_is_named() -> None:
    with pytest.raises(KeyError, match=r"serve/new has no row in ROWS"):
        row_of("serve.new.module")
