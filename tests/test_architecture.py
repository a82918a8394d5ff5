"""Who may import whom (docs/design.md), and what must not be in the code at all."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fastft", "autotune", "bench", "reports")

# A part imports itself and parts further down only.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("commands", "demo"),  # the demo runs verbs, and is one
    ("doctor", "console"),
    ("api",),
    ("hf_training", "trainer", "chat_templates"),
    ("training",),
    ("measure",),
    ("engine", "planning"),
    ("defaults",),
    ("plans",),
    ("backends", "adapters", "memory", "plan_store"),
    ("models",),
    ("kernels", "data"),
    ("config", "notebook_arguments"),
    ("plan", "record", "hardware", "siblings", "processes", "cache"),
    ("files",),
    ("errors", "units"),
)
LEVEL = {part: len(LAYERS) - depth for depth, parts in enumerate(LAYERS) for part in parts}
LEAVES = {"plan", "record", "errors", "files", "hardware", "config"}
VERBS = {"cli", "commands", "demo"}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether that happens when the file is imported."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                assert child.module is not None
                yield child.module, at_import
                # `from fastft import x` may name a module.
                yield from ((f"{child.module}.{alias.name}", at_import) for alias in child.names)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, False)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from walk(ast.Module(body=child.orelse, type_ignores=[]), at_import)
            else:
                yield from walk(child, at_import)

    yield from walk(TREES[path], True)


def test_the_table_names_every_part():
    parts = {
        path.stem for path in (ROOT / "fastft").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "fastft")], ids=dotted)
def test_a_part_of_fastft_imports_what_lies_below(path):
    part = dotted(path).split(".")[1] if dotted(path) != "fastft" else None
    for module, at_import in imports(path):
        package, *inner = module.split(".")
        if package in PACKAGES[1:]:
            assert part in VERBS, f"only a verb may import a sibling: {module}"
            assert not at_import, f"a sibling is imported inside the function that needs it: {module}"
        elif package == "fastft" and inner and inner[0] in LEVEL:
            if part is None:
                assert not at_import, f"`import fastft` must stay free: {module}"
            elif inner[0] != part:
                below = LEVEL[inner[0]] < LEVEL[part] or {part, inner[0]} == {"commands", "demo"}
                assert below, f"{part} must not import {module}"
                assert part not in LEAVES or inner[0] in LEAVES, f"{part} is a leaf: {module}"


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("autotune", {"fastft", "autotune"}),
        ("bench", {"fastft", "autotune", "bench"}),
        ("reports", {"fastft.record", "fastft.plan", "fastft.errors", "fastft.files", "reports"}),
    ],
)
def test_a_sibling_imports_what_it_may(package, allowed):
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == package:
            for module, _ in imports(path):
                if module.split(".")[0] in PACKAGES:
                    assert any(module == name or module.startswith(f"{name}.") for name in allowed), f"{path}: {module}"
                assert package != "reports" or module.split(".")[0] != "torch", f"{path} imports torch"


def test_nothing_imports_in_a_circle():
    names = {dotted(path): path for path in SOURCES}
    edges = {
        name: {module for module, at_import in imports(path) if at_import and module in names and module != name}
        for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in names:
        visit(name, ())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fastft", ("torch", "transformers", "pydantic")),
        ("fastft.cli", ("torch", "transformers", "peft")),
        ("fastft.plan_store, fastft.hardware, fastft.record, fastft.planning", ("torch", "transformers", "peft")),
        ("reports", ("torch", "transformers", "peft")),
        ("autotune.search", ("torch", "transformers", "peft")),
    ],
)
def test_imports_stay_light(module, absent):
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_what_must_not_be_in_the_code(path):
    for module, _ in imports(path):
        assert module.split(".")[0] not in {
            "pickle",
            "dill",
            "cloudpickle",
            "marshal",
            "shelve",
            "requests",
            "httpx",
        }, module
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"torch.load", "torch.save", "eval", "exec", "os.system", "__import__"}, called
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                assert (keyword.arg, value) not in {
                    ("trust_remote_code", True), ("weights_only", False), ("shell", True), ("allow_pickle", True),
                }, ast.unparse(node)  # fmt: skip


def test_remote_code_is_off_by_default():
    for path in SOURCES:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args]
                defaults = [None] * (len(arguments) - len(node.args.defaults)) + node.args.defaults
                pairs = [
                    *zip(arguments, defaults, strict=True),
                    *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
                ]
                for argument, default in pairs:
                    if argument.arg == "trust_remote_code" and default is not None:
                        assert ast.unparse(default) == "False", f"{path}: {node.name}"


def test_no_module_is_too_long_to_read():
    long = {dotted(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 500}
    assert not long


def test_the_public_names_are_the_ones_that_load():
    import fastft

    tree = TREES[ROOT / "fastft" / "__init__.py"]
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    for_type_checkers = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert for_type_checkers == fastft._PUBLIC
    assert set(fastft.__all__) == {*fastft._PUBLIC, "__version__"}
    assert fastft.__all__ == sorted(fastft.__all__)


def test_modules_with_all_define_it_truly():
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and dotted(path) != "fastft":
                names = ast.literal_eval(node.value)
                defined = {
                    alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names
                }
                defined |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
                defined |= {ast.unparse(t) for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
                assert set(names) <= defined, dotted(path)
                assert len(set(names)) == len(names), dotted(path)


def test_the_version_stands_in_one_place_twice():
    import fastft

    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{fastft.__version__}"' in project


def test_every_fused_kernel_has_its_truth_its_test_and_its_bench():
    for fused in (ROOT / "fastft" / "kernels").glob("*/triton.py"):
        operation = fused.parent.name
        assert fused.with_name("reference.py").exists()
        assert (ROOT / "tests" / "kernels" / f"test_{operation}.py").exists()
        assert (ROOT / "bench" / "kernels" / f"test_{operation}.py").exists()


def test_the_seams_of_the_design_are_where_it_says():
    text = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \| `([^`|]+)` \|", text, flags=re.MULTILINE)
    assert len(rows) > 10
    for names, where in rows:
        path = ROOT / where
        assert path.exists(), where
        files = [path] if path.is_file() else sorted(path.glob("*.py"))
        source = "\n".join(file.read_text() for file in files)
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:def|class) {name}\b|^{name}\b.*=", source, flags=re.MULTILINE), f"{name} in {where}"
