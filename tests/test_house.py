"""The rules of the house: which file may import which, and one definition of everything."""

import ast
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("main_", "submitit_", "hubconf", "tools")
DOWNSTREAM = ("DET", "SEG", "VideoConvMAE")


def tracked_files():
    """The project's Python files, relative to the root: all that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout: git knows which files are the project's")
    return sorted(Path(name) for name in listed.stdout.splitlines() if (ROOT / name).exists())


@pytest.fixture(scope="module")
def trees():
    """Path to syntax tree of each Python file outside of tests."""
    return {
        path: ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))
        for path in tracked_files()
        if path.parts[0] != "tests"
    }


def imported_modules(nodes):
    """Dotted names that import statements name; `from a import b` names a and a.b."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def starts_with(names, prefixes):
    return sorted(name for name in names if name.startswith(tuple(prefixes)))


def within(names, modules):
    """The names that are one of the modules, or lie in one."""
    return sorted(n for n in names if any(n == m or n.startswith(m + ".") for m in modules))


def files(trees, pattern):
    found = {path: tree for path, tree in trees.items() if path.match(pattern)}
    assert found, f"no file is called {pattern}"
    return found.items()


def test_util_imports_no_model_engine_or_main(trees):
    for path, tree in trees.items():
        if path.parts[0] != "util":
            continue
        names = imported_modules(ast.walk(tree))
        assert not starts_with(names, ("models_", "engine_", *PROGRAMS)), path
        assert not within(names, (*DOWNSTREAM, "benchmarks", "tests")), path


def test_a_model_file_knows_no_command_line_data_set_or_process(trees):
    torch_parts = ("torch.distributed", "torch.utils.data", "torchvision.datasets")
    util_parts = ("util.data", "util.demo", "util.run")
    foreign = ("argparse", *torch_parts, *util_parts, *DOWNSTREAM, "benchmarks", "tests")
    for path, tree in files(trees, "models_*.py"):
        names = imported_modules(ast.walk(tree))
        assert not within(names, foreign), path
        assert not starts_with(names, ("engine_", *PROGRAMS)), path


def test_an_engine_imports_no_main(trees):
    for path, tree in files(trees, "engine_*.py"):
        names = imported_modules(ast.walk(tree))
        assert not starts_with(names, PROGRAMS), path
        assert not within(names, (*DOWNSTREAM, "benchmarks", "tests")), path


def test_downstream_folders_do_not_import_each_other_or_the_mains(trees):
    for path, tree in trees.items():
        if path.parts[0] in DOWNSTREAM:
            names = imported_modules(ast.walk(tree))
            assert not within(names, set(DOWNSTREAM) - {path.parts[0]}), path
            assert not starts_with(names, PROGRAMS), path


def test_imports_are_absolute(trees):
    for path, tree in trees.items():
        # Among its own files LazyConfig takes a relative import for a fresh copy.
        if path.parts[:2] != ("DET", "configs"):
            imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
            assert all(node.level == 0 for node in imports), path


def test_every_file_says_what_it_is(trees):
    assert [str(path) for path, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_every_file_parses():
    for path in tracked_files():
        ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def test_every_class_has_one_definition(trees):
    places = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def dotted(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def resolved(name, known):
    """The module that a dotted name of `imported_modules` leads to; None for foreign ones."""
    parent = name.rpartition(".")[0]
    return name if name in known else parent if parent in known else None


def test_no_imports_in_circles_late_ones_counted(trees):
    known = {dotted(path) for path in trees}
    arrows = {}
    for path, tree in trees.items():
        targets = {resolved(name, known) for name in imported_modules(ast.walk(tree))}
        # That a package runs its own __init__ first is no import of the module's.
        arrows[dotted(path)] = targets - {None, dotted(path), dotted(path.parent / "__init__.py")}
    while leaves := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}
    assert arrows == {}


@pytest.mark.parametrize("program", ["main_pretrain.py", "-m tools.checkpoint"])
def test_a_foreign_util_on_the_path_does_not_shadow_ours(tmp_path, program):
    (tmp_path / "util").mkdir()
    (tmp_path / "util/__init__.py").touch()
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, *program.split(), "--help"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
