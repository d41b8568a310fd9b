"""The list of `make mutants` fits the sources, and its runner goes on where it was interrupted."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "setup.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from scripts.gpu.processes import Done  # noqa: E402
from scripts.mutants import __main__ as mutants  # noqa: E402
from scripts.mutants.mutation import Mutation, Selection  # noqa: E402
from scripts.mutants.results import Result, Results, summary  # noqa: E402
from scripts.mutants.sources import Sources  # noqa: E402

MUTATIONS = [mutation for group in mutants.GROUPS.values() for mutation in group]
LEAST = {"autograd and algebra": 15, "Triton": 10, "CUDA": 10, "C++": 15}
TESTS = Selection(("test_answer.py",), "answer")
FAULT = Mutation("fault", "src/fbkd_ops/answer.py", TESTS, "42", "41")
OTHER = Mutation("other", "src/fbkd_ops/answer.py", TESTS, "answer =", "answer = -")


def test_every_group_has_its_mutations_and_every_name_is_one_mutations():
    assert {name: min(len(group), LEAST[name]) for name, group in mutants.GROUPS.items()} == LEAST
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_fits_the_sources(mutation):
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.text) == 1 and mutation.replacement != mutation.text
    if mutation.file.endswith(".py"):
        ast.parse(source.replace(mutation.text, mutation.replacement))


@pytest.mark.parametrize(
    "tests", dict.fromkeys(mutation.tests for mutation in MUTATIONS), ids=lambda tests: tests.keyword
)
def test_selected_tests_are_there(tests):
    text = "".join((ROOT / path).read_text() for path in ["tests/op_cases.py", *tests.paths()])
    words = set(re.findall(r"\w+", tests.keyword)) - {"and", "or", "not"}
    assert [word for word in words if word not in text] == []


class FakeSources(Sources):
    """Sources whose tests want the answer to be 42, and are counted."""

    def __init__(self, root, folder, works=True):
        super().__init__(root, folder)
        self.works, self.runs = works, []

    def build(self):
        return "" if self.works else "the build failed"

    def test(self, tests):
        self.runs.append((self.folder / FAULT.file).read_text())
        fails = "41" in self.runs[-1]
        output = "FAILED tests/test_answer.py::test_answer" if fails else "1 passed"
        return Done(["pytest"], output, int(fails))


@pytest.fixture
def tree(tmp_path):
    for path, text in ((FAULT.file, "answer = 42\n"), ("tests/test_answer.py", "def test_answer(): pass\n")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def run(tree, mutations, **options):
    """Results by name, and what each run of the tests found in the mutated file."""
    sources = FakeSources(tree, tree / "build/source", **options)
    sources.refresh()
    found = mutants.run(mutations, sources, Results(tree / "build/results.json", sources.digest()))
    assert (tree / FAULT.file).read_text().startswith("answer = ")
    return found, sources.runs


def test_results_and_mutated_copies(tree):
    found, runs = run(tree, [FAULT, OTHER])
    assert runs == ["answer = 42\n", "answer = 41\n", "answer = - 42\n"]
    assert [found[name].outcome for name in ("fault", "other")] == ["caught", "survived"]
    assert found["fault"].detail == "tests/test_answer.py::test_answer"
    assert (tree / "build/source" / FAULT.file).read_text() == "answer = 42\n"


def test_an_interrupted_run_goes_on(tree):
    run(tree, [FAULT])
    found, runs = run(tree, [FAULT, OTHER])
    assert runs == ["answer = - 42\n"] and {"fault", "other"} <= set(found)


@pytest.mark.parametrize("file", [FAULT.file, "tests/test_answer.py"])
def test_what_was_changed_is_tested_again(tree, file):
    run(tree, [FAULT])
    with (tree / file).open("a") as changed:
        changed.write("# changed\n")
    _, runs = run(tree, [FAULT])
    assert "41" in runs[-1]
    assert run(tree, [FAULT])[1] == []


def test_a_mutation_without_tests_that_pass_is_broken(tree):
    (tree / FAULT.file).write_text("answer = 41\n")
    found, _ = run(tree, [OTHER])
    assert found["other"].outcome == "broken" and "without the mutation" in found["other"].detail
    assert run(tree, [FAULT], works=False)[0]["fault"].outcome == "broken"


def test_what_was_broken_is_tested_again(tree):
    run(tree, [FAULT], works=False)
    assert run(tree, [FAULT])[0]["fault"].outcome == "caught"


@pytest.mark.parametrize(
    "status, output, outcome",
    [
        (1, "FAILED tests/test_answer.py::test_answer - assert", "caught"),
        (-11, "", "caught"),
        (0, "3 passed, 1 skipped in 0.1s", "survived"),
        (0, "4 skipped in 0.1s", "broken"),
        (5, "12 deselected in 0.1s", "broken"),
        (2, "ERROR tests/test_answer.py - SyntaxError", "broken"),
    ],
)
def test_verdict(status, output, outcome):
    assert mutants.verdict(Done([], output, status))[0] == outcome


def test_tests_without_an_end_catch_a_fault():
    assert mutants.verdict(Done([], "", -9, timed_out=True)) == ("caught", "the tests do not end")


@pytest.mark.parametrize(
    "caught, survived, broken, reasons, good",
    [
        (20, 0, 0, {}, True),
        (19, 1, 0, {19: "equal numbers"}, True),
        (19, 1, 0, {}, False),
        (18, 2, 0, {18: "equal numbers", 19: "slower only"}, False),
        (19, 0, 1, {}, False),
    ],
)
def test_summary(caught, survived, broken, reasons, good):
    mutations = [Mutation(f"m{index}", "", TESTS, "", "", reasons.get(index)) for index in range(20)]
    outcomes = ["caught"] * caught + ["survived"] * survived + ["broken"] * broken
    lines, is_good = summary(mutations, {f"m{index}": Result(each, "", 0.0) for index, each in enumerate(outcomes)})
    assert is_good == good
    counts = f"{survived} survived, {broken} broken"
    assert lines[-1] == f"mutants: {caught} of 20 caught ({5 * caught:.1f} %), {counts}"
    assert all(any(reason in line for line in lines) for reason in reasons.values())


def test_the_copy_follows_the_tree_and_keeps_what_is_compiled(tree):
    sources = Sources(tree, tree / "build/source")
    sources.refresh()
    library, copy = sources.folder / "src/fbkd_ops/_C.so", sources.folder / FAULT.file
    library.write_text("compiled")
    before = copy.stat().st_mtime_ns
    sources.refresh()
    assert copy.stat().st_mtime_ns == before
    (tree / FAULT.file).rename(tree / "src/fbkd_ops/question.py")
    sources.refresh()
    assert sorted(path.name for path in copy.parent.iterdir()) == ["_C.so", "question.py"]


def test_a_mutation_that_does_not_fit_is_an_error(tree):
    (tree / FAULT.file).write_text("answer = 42 + 42\n")
    with pytest.raises(ValueError, match="must have '42' once, but has it 2 times"):
        FAULT.apply(tree)


def test_command_line(capsys):
    assert mutants.main(["--list", "--only", "python.roots"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "python.roots.half  src/fbkd_ops/autograd/weighted_roots.py"
    with pytest.raises(SystemExit):
        mutants.main(["--only", "nothing"])
    assert "no mutation is named 'nothing'" in capsys.readouterr().err
