"""The tree is what it says: imports point one way, start-up is lean, files short."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
LEVEL = {
    "names": 0,
    "array_types": 0,
    "config": 0,
    "ops": 1,
    "nn": 2,
    "tree": 2,
    "train": 3,
    "models": 3,
    "io": 3,
    "cli": 4,
}
MODULES = [
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )
    for file in FILES
]


def part(module: str) -> str:
    return module.split(".")[1]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@pytest.mark.parametrize(
    ("file", "module"), list(zip(FILES, MODULES, strict=True)), ids=MODULES
)
def test_imports_point_one_way(file, module):
    if module == "lora_jax":
        return  # the public names of every part
    for other in imports(file):
        if other.startswith("lora_jax."):
            assert LEVEL[part(other)] <= LEVEL[part(module)], f"{module} -> {other}"
    if part(module) == "ops":
        assert not any(other.startswith("flax") for other in imports(file))


def test_importing_the_library_pulls_in_no_optional_package():
    optional = ("orbax", "safetensors", "tokenizers", "pydantic", "matplotlib")
    code = f"import sys, lora_jax; print([m for m in {optional} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES, ids=MODULES)
def test_files_stay_short(file):
    assert len(file.read_text().splitlines()) <= 400


def test_every_public_name_is_documented():
    import lora_jax

    names = [name for name in vars(lora_jax) if not name.startswith("_")]
    objects = {name: getattr(lora_jax, name) for name in names}
    bare = [name for name, value in objects.items() if not value.__doc__]
    assert not bare


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0
