"""Who may import whom: the layers of the design, checked against the import statements."""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent

HTTP, GPU, BOTH = "http", "gpu", "both"

# The lines of the house, top to bottom. A module imports from lines below its own; from its own
# line only within its package. Modules of the HTTP column do not know those of the GPU column, nor
# the other way round; BOTH may know and be known by either. A new module goes into the line that
# its imports and its importers leave it; a full name takes precedence over a pattern.
LINES: tuple[Mapping[str, tuple[str, ...]], ...] = (
    {
        BOTH: (
            "serve.launch",
            "serve.llm",
            "serve.runtime.rank",
            "serve.runtime.server",
            "serve.runtime.startup",
        ),
        HTTP: ("serve.runtime.shutdown",),
    },
    {HTTP: ("serve.api.*",), BOTH: ("serve.engine.worker",)},
    {
        HTTP: (
            "serve.dispatch.*",
            "serve.replica.*",
        ),
        GPU: (
            "serve.engine.runner",
            "serve.engine.executor",
            "serve.engine.loading",
            "serve.engine.rank_setup",
            "serve.engine.memory",
            "serve.engine.dummy_steps",
            "serve.engine.warm_up",
            "serve.engine.decode_graphs",
        ),
    },
    {
        HTTP: (
            "serve.tokenizer.*",
            "serve.dispatch.metrics",
        ),
        GPU: (),
    },
    {
        # Attention reads the batch's metadata, so it is one line above the forward batch.
        GPU: (
            "serve.model.layers",
            "serve.model.conv1d",
            "serve.model.rope",
            "serve.model.attention",
            "serve.model.flash_attention",
            "serve.model.kernels.ops",
            "serve.model.kernels.head_norms",
            "serve.model.kernels.triton_launch",
            "serve.model.kernels.triton_ops",
            "serve.model.kernels.triton_rope",
            "serve.model.kernels.triton_decode",
            "serve.model.decoder",
            "serve.model.llama",
            "serve.model.gemma",
            "serve.model.gpt2",
            "serve.model.internlm2",
            "serve.model.opt",
            "serve.model.phi3",
            "serve.model.registry",
            "serve.model.weights.load",
            "serve.model.weights.checkpoint",
            "serve.model.weights.staged_copies",
            "serve.model.gguf",
            "serve.model.weights.gguf",
            "serve.sampling.*",
            "serve.comm.kv_transfer",
            "serve.comm.transports",
            "serve.comm.triton_kv",
        ),
    },
    {
        BOTH: (
            "serve.comm.control",
            "serve.comm.framing",
        ),
        GPU: (
            "serve.kv.cache",
            "serve.model.forward_batch",
            "serve.comm.tensor_parallel",
            "serve.comm.symmetric",
            "serve.comm.process_groups",
        ),
    },
    {
        BOTH: (
            "serve.config.*",
            "serve.request",
            "serve.topology",
            "serve.protocol.*",
            "serve.dispatch.output",
            "serve.model_config.*",
        ),
        GPU: ("serve.device",),
    },
)

_NAMED = {name for columns in LINES for patterns in columns.values() for name in patterns}

# The bottom line is plain data and may be used freely within; it rests on these alone. The two
# modules that read checkpoints may use what reads them.
BOTTOM_PACKAGES = {"msgspec"}
BOTTOM_EXTRAS = {
    "serve.config.model_source": {"huggingface_hub"},
    "serve.model_config.gguf_header": {"gguf", "numpy"},
}

TORCH = {"torch", "triton", "flash_attn", "torchvision", "torchaudio"}
# Beside the HTTP column and the bottom line, these do without torch.
TORCH_FREE: tuple[str, ...] = ()
# Other packages that import torch as soon as they are imported.
BRINGS_TORCH = {"accelerate"}


@dataclass(frozen=True, slots=True)
class Module:
    """The imports of one module: ``inner`` are ours, ``outer`` the top names of all others.

    ``eager`` is the part of both that runs when the module is imported.
    """

    name: str
    inner: frozenset[str]
    outer: frozenset[str]
    eager: frozenset[str]


def read_tree(top: Path, package: str) -> dict[str, Module]:
    """Every module of ``package`` below ``top`` by its dotted name, without ``__init__`` files."""
    files = {
        ".".join(path.relative_to(top).with_suffix("").parts): path
        for path in sorted((top / package).rglob("*.py"))
        if path.name != "__init__.py"
    }
    return {name: read_module(name, path.read_text(), files) for name, path in files.items()}


def read_module(name: str, source: str, known: Iterable[str]) -> Module:
    """The imports in ``source``; ``known`` names the modules that are ours."""
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
            assert node.level == 0 and node.module, f"{name}: write imports absolutely"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [target if target in known else node.module for target in full]
        for target in targets:
            yield target if target.partition(".")[0] == package else target.partition(".")[0]


def place_of(name: str) -> tuple[int, str]:
    """The line of a module (0 is the top) and its column; ``KeyError`` if LINES lacks it."""
    found = [
        (line, column)
        for line, columns in enumerate(LINES)
        for column, patterns in columns.items()
        for pattern in patterns
        if fnmatch.fnmatchcase(name, pattern) and (pattern == name or name not in _NAMED)
    ]
    if len(found) != 1:
        raise KeyError(f"{name} has {len(found)} places in LINES of tests/test_layering.py")
    return found[0]


def find_offences(tree: Mapping[str, Module]) -> list[str]:
    """Every import that the layers forbid, as one line each."""
    return [
        f"{module.name} imports {target}: {reason}"
        for module in tree.values()
        for target in sorted(module.inner)
        if (reason := _objection(module.name, target))
    ]


def _objection(name: str, target: str) -> str | None:
    line, column = place_of(name)
    try:
        target_line, target_column = place_of(target)
    except KeyError:
        return "it is no module of ours, or one without a place"
    if target_line < line:
        return "upwards"
    same_package = name.rpartition(".")[0] == target.rpartition(".")[0]
    if target_line == line != len(LINES) - 1 and not same_package:
        return "sideways, into another package"
    if {column, target_column} == {HTTP, GPU}:
        return f"from the {column} column into the {target_column} column"
    return None


def reach(tree: Mapping[str, Module], start: str, *, eager: bool) -> dict[str, list[str]]:
    """All that ``start`` imports, directly or through our modules, each with a way to it."""
    ways = {start: [start]}
    queue = [start]
    for name in queue:
        if name not in tree:
            continue
        module = tree[name]
        for target in sorted(module.eager if eager else module.inner | module.outer):
            if target not in ways:
                ways[target] = [*ways[name], target]
                queue.append(target)
    return ways


def find_cycle(tree: Mapping[str, Module]) -> list[str] | None:
    """One cycle of imports, or None."""
    finished: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in finished or name not in tree:
            return None
        for target in sorted(tree[name].inner):
            cycle = visit(target, [*way, name])
            if cycle:
                return cycle
        finished.add(name)
        return None

    return next((cycle for name in tree if (cycle := visit(name, []))), None)


@pytest.fixture(scope="module")
def tree() -> dict[str, Module]:
    return read_tree(TOP, "serve")


def test_every_module_has_a_place(tree: dict[str, Module]) -> None:
    for name in tree:
        place_of(name)


def test_imports_point_down(tree: dict[str, Module]) -> None:
    offences = find_offences(tree)
    assert not offences, "\n".join(offences)


def test_no_cycles(tree: dict[str, Module]) -> None:
    cycle = find_cycle(tree)
    assert not cycle, " -> ".join(cycle or ())


def test_http_column_and_plain_data_import_no_torch(tree: dict[str, Module]) -> None:
    bottom = len(LINES) - 1
    for name in tree:
        line, column = place_of(name)
        if column == HTTP or (line, column) == (bottom, BOTH) or name in TORCH_FREE:
            ways = reach(tree, name, eager=False)
            found = [" -> ".join(ways[target]) for target in ways if target in TORCH | BRINGS_TORCH]
            assert not found, "\n".join(found)


def test_launch_checks_options_before_torch(tree: dict[str, Module]) -> None:
    if "serve.launch" in tree:
        ways = reach(tree, "serve.launch", eager=True)
        found = [" -> ".join(ways[target]) for target in ways if target in TORCH | BRINGS_TORCH]
        assert not found, "\n".join(found)


def test_bottom_line_rests_on_the_standard_library(tree: dict[str, Module]) -> None:
    import sys

    for module in tree.values():
        if place_of(module.name) == (len(LINES) - 1, BOTH):
            allowed = BOTTOM_PACKAGES | BOTTOM_EXTRAS.get(module.name, set())
            foreign = module.outer - set(sys.stdlib_module_names) - allowed
            assert not foreign, f"{module.name} imports {sorted(foreign)}"


def test_package_files_import_nothing() -> None:
    for path in sorted((TOP / "serve").rglob("__init__.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)], path


def test_every_folder_is_a_package() -> None:
    for path in sorted((TOP / "serve").rglob("*.py")):
        assert (path.parent / "__init__.py").is_file(), path.parent


# --- the checks themselves ----------------------------------------------------------------------


def _tree_of(**sources: str) -> dict[str, Module]:
    names = {name.replace("__", "."): source for name, source in sources.items()}
    return {name: read_module(name, source, names) for name, source in names.items()}


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("serve__replica__scheduler", "import serve.replica.replica", "upwards"),
        ("serve__replica__scheduler", "def f():\n from serve.engine import replica", "upwards"),
        ("serve__dispatch__policies", "from serve.replica.replica import R", "sideways"),
        ("serve__api__app", "from serve.model.llama import L", "from the http column"),
        ("serve__engine__runner", "import serve.tokenizer.tokenizer", "from the gpu column"),
        ("serve__engine__runner", "from serve.engine import nothing", "no module of ours"),
    ],
)
def test_offences_are_found(name: str, source: str, reason: str) -> None:
    others = {
        "serve__replica__replica": "",
        "serve__model__llama": "",
        "serve__tokenizer__tokenizer": "",
    }
    offences = find_offences(_tree_of(**{**others, name: source}))
    assert len(offences) == 1 and reason in offences[0]


def test_cycles_are_found() -> None:
    tree = _tree_of(serve__a="import serve.b", serve__b="def f():\n import serve.a", serve__c="")
    assert find_cycle(tree) == ["serve.a", "serve.b", "serve.a"]
    assert find_cycle(_tree_of(serve__a="import serve.b", serve__b="")) is None


def test_torch_is_found_through_others() -> None:
    tree = _tree_of(serve__a="from serve import b", serve__b="def f():\n import torch.nn")
    assert reach(tree, "serve.a", eager=False)["torch"] == ["serve.a", "serve.b", "torch"]
    assert "torch" not in reach(tree, "serve.a", eager=True)


def test_a_module_without_a_place_is_named() -> None:
    with pytest.raises(KeyError, match=r"serve\.new .*LINES of tests/test_layering\.py"):
        place_of("serve.new")
