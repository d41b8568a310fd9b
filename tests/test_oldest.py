"""No source has what the oldest supported releases of PyTorch and Triton cannot take; `make oldest` runs them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "fbkd_ops"
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
# Folders of what dynamo traces; the kernels are not among them.
COMPILED = ("", "autograd/", "non_local/", "ops/", "training/")
MUTATORS = {"append", "extend", "insert", "pop", "remove", "reverse", "sort", "clear"}


def trees(pattern):
    return [(path.relative_to(ROOT), ast.parse(path.read_text())) for path in sorted(PACKAGE.glob(pattern))]


def functions_in(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def is_kernel(function):
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def nested_targets(function):
    """Lines whose assignment unpacks a tuple within a tuple."""
    targets = [target for node in ast.walk(function) if isinstance(node, ast.Assign) for target in node.targets]
    sequences = [target for target in targets if isinstance(target, (ast.Tuple, ast.List))]
    return [t.lineno for t in sequences if any(isinstance(each, (ast.Tuple, ast.List, ast.Starred)) for each in t.elts)]


def changed_starred_targets(function):
    """Lines that change a list in place that a starred target of the same function has made."""
    starred = [node.value for node in ast.walk(function) if isinstance(node, ast.Starred)]
    names = {each.id for each in starred if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)}
    changed = []
    for node in ast.walk(function):
        calls_mutator = isinstance(node, ast.Attribute) and node.attr in MUTATORS
        if calls_mutator or isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            changed.append(node.value)
        elif isinstance(node, ast.AugAssign):
            changed.append(node.target)
    return [each.lineno for each in changed if isinstance(each, ast.Name) and each.id in names]


def properties_of_named_tuples(tree):
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    tuples = [each for each in classes if "NamedTuple" in [ast.unparse(base) for base in each.bases]]
    methods = [function for each in tuples for function in functions_in(each)]
    return [function.lineno for function in methods if "property" in map(ast.unparse, function.decorator_list)]


def findings(pattern, find, select=lambda function: True):
    """``file:line`` of what ``find`` reports of the functions of some files."""
    functions = [(path, each) for path, tree in trees(pattern) for each in functions_in(tree) if select(each)]
    assert functions
    return sorted({f"{path}:{line}" for path, function in functions for line in find(function)})


def parsed(source):
    (function,) = ast.parse(source).body
    return function


def test_kernels_unpack_one_level_of_a_tuple():
    """Triton 3.6 hashes the targets of an assignment, and a nested one is a list."""
    assert nested_targets(parsed("def f():\n    a, (b, c) = 1, (2, 3)")) == [2]
    assert not nested_targets(parsed("def f():\n    a, b = 1, 2"))
    assert not findings("kernels/*.py", nested_targets, is_kernel)


def test_starred_targets_are_left_as_they_are():
    """Dynamo of PyTorch 2.11 makes a tuple of a starred target, which is a list in Python."""
    for change in ("b.append(1)", "b[0] = 1", "b[:1] = [1]", "b += [1]"):
        assert changed_starred_targets(parsed(f"def f(x):\n    a, *b = x\n    {change}")) == [3]
    assert not changed_starred_targets(parsed("def f(x):\n    a, *b = x\n    b = [*b, 1]"))
    assert not [found for room in COMPILED for found in findings(f"{room}*.py", changed_starred_targets)]


def test_named_tuples_that_are_compiled_have_no_properties():
    """Dynamo of PyTorch 2.10 cannot read one. Kernels, pictures and reports are not compiled."""
    with_property = "class T(NamedTuple):\n    a: int\n    @property\n    def b(self):\n        return self.a"
    assert properties_of_named_tuples(ast.parse(with_property)) == [4]
    compiled = [tree for room in COMPILED for tree in trees(f"{room}*.py")]
    found = {path.name for path, tree in compiled if properties_of_named_tuples(tree)}
    assert found <= {"balance.py", "visualize.py"}


def test_macros_of_later_headers_have_a_fallback():
    """tensors.h defines what headers up to PyTorch 2.11 lack, after it has included them."""
    macro, header = "STABLE_TORCH_ERROR_CODE_CHECK", (ROOT / "csrc" / "tensors.h").read_text()
    fallback = header.index(f"#ifndef {macro}\n#define {macro}(call) TORCH_ERROR_CODE_CHECK(call)\n#endif")
    assert header.index("#include <torch/csrc/stable/macros.h>") < header.rindex("#include") < fallback
    files = [path for path in (ROOT / "csrc").rglob("*.*") if f"{macro}(" in path.read_text()]
    assert len(files) > 1
    for path in files:
        assert path.name == "tensors.h" or '/tensors.h"' in path.read_text(), path


def test_the_oldest_release_is_set_before_any_header_of_torch():
    """Headers of torch read TORCH_TARGET_VERSION, which stable_abi.h defines."""
    headers = ("stable_abi.h", "tensors.h", "launch.h")  # the second includes the first, the third the second
    files = [path for path in (ROOT / "csrc").rglob("*.*") if "#include <torch/csrc/stable/" in path.read_text()]
    assert len(files) > 10
    for path in files:
        text = path.read_text()
        included = re.findall(r'#include "(?:\.\./)*(.+)"', text[: text.index("#include <torch/")])
        assert any(header in included for header in headers), path


def test_one_oldest_release_everywhere():
    stated = {
        "pyproject.toml": r'"torch>=([\d.]+)"',
        "setup.py": r'^STABLE_ABI = "([\d.]+)"',
        "README.md": r"\(≥ ([\d.]+)\)",
        "scripts/oldest.sh": r"^environment ([\d.]+)\.0 ",
    }
    releases = {name: re.search(form, (ROOT / name).read_text(), re.MULTILINE)[1] for name, form in stated.items()}
    (release,) = set(releases.values())
    major, minor = map(int, release.split("."))
    assert f"TORCH_TARGET_VERSION 0x{major:02x}{minor:02x}000000000000" in (ROOT / "csrc" / "stable_abi.h").read_text()


def test_ci_runs_the_oldest_releases():
    assert {"make test", "make oldest"} <= set((ROOT / ".ci" / "run").read_text().splitlines())
