"""The shape of the package: its layers, its documentation, its examples, its sizes."""

import ast
import doctest
import graphlib
import importlib
import pathlib
import subprocess
import sys

import pytest

import lora_jax

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "lora_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
# Each part, and all that it may import of the others: everything stands above it.
BASE = {"names", "array_types", "config"}
MAY_IMPORT: dict[str, set[str]] = {
    "names": set(),
    "array_types": set(),
    "config_errors": set(),
    "config": {"names", "config_errors"},
    "ops": {"names", "array_types"},
    "tree": BASE | {"ops"},
    "parallel": BASE | {"ops", "tree"},
    "attention": BASE | {"ops", "parallel"},
    "nn": BASE | {"ops", "tree", "attention"},
    "train": BASE | {"ops", "tree", "parallel"},
    "files": BASE | {"tree", "parallel", "train"},
    "models": BASE | {"ops", "tree", "parallel", "attention", "nn", "files"},
    "interop": BASE | {"ops", "tree", "parallel", "nn", "files", "models"},
    "plan": BASE | {"tree", "parallel", "nn", "train", "models"},
}
LIBRARY = {*MAY_IMPORT}
MAY_IMPORT["nnx"] = LIBRARY
MAY_IMPORT["finetune"] = LIBRARY
MAY_IMPORT["cli"] = LIBRARY | {"finetune"}
OPTIONAL = (
    *("orbax", "safetensors", "tokenizers", "huggingface_hub", "yaml", "rich"),
    *("pydantic", "matplotlib", "sklearn", "gguf", "jinja2", "PIL"),
)
# What a part may import besides the standard library and what stands left of it.
FOREIGN = {
    "names": set(),
    "array_types": {"jaxtyping"},
    "config_errors": set(),
    "config": set(),
    "ops": {"jax", "numpy", "jaxtyping"},
    "attention": {"jax", "numpy", "jaxtyping"},
    "tree": {"jax", "numpy", "jaxtyping"},
    "nn": {"jax", "numpy", "jaxtyping", "flax"},
}

by_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
    """Returns the dotted names that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_parts(path: pathlib.Path) -> set[str]:
    return {n.split(".")[1] for n in imports(path) if n.startswith("lora_jax.")}


@by_module
def test_a_part_imports_only_what_stands_above_it(path):
    if path == PACKAGE / "__init__.py":
        return
    assert "lora_jax" not in imports(path), "import from the module that defines it"
    part = part_of(path)
    assert own_parts(path) - {part} <= MAY_IMPORT[part]


def test_the_parts_have_an_order():
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())
    found = {part_of(path) for path in MODULES} - {"__init__"}
    assert found == set(order)


@by_module
def test_the_lower_parts_know_few_libraries(path):
    allowed = FOREIGN.get(part_of(path))
    if allowed is None:
        return
    roots = {name.split(".")[0] for name in imports(path)}
    foreign = roots - set(sys.stdlib_module_names) - {"lora_jax"}
    assert foreign <= allowed


def test_importing_the_library_loads_no_optional_package():
    code = (  # Flax itself loads some of them
        "import sys, flax.linen, optax; before = set(sys.modules);"
        "from lora_jax import *;"
        f"print(sorted(set({OPTIONAL}) & (set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "[]"


def documented(tree: ast.Module):
    """Yields (dotted name, node) of a module and its public classes and functions."""
    yield "", tree
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, kinds) and not inner.name.startswith("_"):
                        yield f"{node.name}.{inner.name}", inner


@by_module
def test_every_public_name_is_documented(path):
    tree = ast.parse(path.read_text())
    bare = [name for name, node in documented(tree) if not ast.get_docstring(node)]
    assert bare == []


def test_every_export_is_documented():
    exports = {name: getattr(lora_jax, name) for name in lora_jax.__all__}
    assert [name for name, value in exports.items() if not value.__doc__] == []


@by_module
def test_the_examples_in_docstrings_run(path, tmp_path, monkeypatch):
    # By syntax, for decorated functions are invisible to doctest's own search.
    monkeypatch.chdir(tmp_path)
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(dotted.removesuffix(".__init__"))
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    for name, node in documented(ast.parse(path.read_text())):
        example = parser.get_doctest(
            ast.get_docstring(node) or "", dict(vars(module)), name, str(path), 0
        )
        if example.examples:
            report: list[str] = []
            failed = runner.run(example, out=report.append).failed
            assert not failed, "".join(report)


@by_module
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 400


def test_exports_stand_in_the_stub_alone():
    """`X as X`, one a line: readers and type checkers find each in one step."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    names = []
    for node in tree.body[1:]:
        assert isinstance(node, ast.ImportFrom), "the stub holds no logic"
        assert node.level == 1, "lazy_loader reads relative imports only"
        for alias in node.names:
            assert alias.asname == alias.name
            names.append(alias.name)
    assert sorted(names) == lora_jax.__all__
    assert len(names) == len(set(names))
    assert set(names) <= set(dir(lora_jax))
    assert not any(n.startswith("lora_jax") for n in imports(PACKAGE / "__init__.py"))


@pytest.mark.parametrize("name", lora_jax.__all__)
def test_an_export_is_the_object_of_its_module(name):
    value = getattr(lora_jax, name)
    assert value is getattr(lora_jax, name)
    home = getattr(value, "__module__", "lora_jax")
    assert home.startswith("lora_jax")


def test_a_name_that_is_not_exported_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No lora_jax attribute lora_dens"):
        _ = lora_jax.lora_dens  # pyright: ignore[reportAttributeAccessIssue]  # absent


def test_the_package_and_the_help_of_its_command_load_no_jax():
    code = (
        "import sys, contextlib, lora_jax.cli.main as cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['--help'])\n"
        "heavy = {'jax', 'flax', 'optax', 'numpy', 'orbax', 'rich', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "COMMAND" in done.stdout
    assert done.stderr.strip() == "[]"
