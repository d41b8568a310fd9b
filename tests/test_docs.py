"""The examples in docstrings and README run, and generated documentation is up to date."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_mmrazor import Block, StudentConnector, TeacherConnector

import fbkd_ops

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    "functional",
    "loss",
    "non_local.block",
    "training.distiller",
    "training.data_parallel",
    "training.feature_tap",
    "training.student_attributes",
    "backends",
    "visualize",
    "weights.mmrazor",
    "weights.non_local",
]


class FiveLevels(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Conv2d(3, 256, 1)

    def forward(self, images):
        x = self.project(images)
        return {str(level): torch.nn.functional.avg_pool2d(x, 2**level) for level in range(5)}


class Pyramid(torch.nn.Module):
    """A detector with five levels of 256 channels, as the examples assume one."""

    def __init__(self):
        super().__init__()
        self.backbone = FiveLevels()

    def forward(self, images, targets=None):
        return {"loss_box": (self.backbone(images)["0"].mean() - targets).square()}


IMAGES, TARGETS = torch.randn(2, 3, 32, 32), torch.tensor(1.0)


def connectors() -> dict:
    """MMRazor's default four levels of 256 channels."""
    made = {}
    for level, (inner, stride) in enumerate([(64, 8), (64, 4), (128, 2), (128, 2)]):
        made[f"loss_s{level}_sfeat"] = StudentConnector(256, inner=inner, maxpool_stride=stride)
        made[f"loss_s{level}_tfeat"] = TeacherConnector(256, inner=inner, maxpool_stride=stride)
    return made


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    torchvision = pytest.importorskip("torchvision")
    module = importlib.import_module(f"fbkd_ops.{name}")
    names = dict(
        vars(module),
        torch=torch,
        torchvision=torchvision,
        fbkd_ops=fbkd_ops,
        FBKDLoss=fbkd_ops.FBKDLoss,
        student=Pyramid(),
        teacher=Pyramid(),
        images=IMAGES,
        targets=TARGETS,
        connectors=connectors(),
        mmcv_block=Block(256, 128, maxpool_stride=1),
        x=IMAGES,
    )
    tests = doctest.DocTestFinder().find(module, f"fbkd_ops.{name}", globs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0


def test_public_names_have_an_example():
    """Every public function and class of the API shows how it is called."""
    public = [getattr(fbkd_ops.functional, name) for name in fbkd_ops.functional.__all__]
    public += [getattr(fbkd_ops.visualize, name) for name in fbkd_ops.visualize.__all__]
    public += [fbkd_ops.FBKDLoss, fbkd_ops.NonLocalBlock2d, fbkd_ops.use_backend]
    public += [fbkd_ops.Distiller, fbkd_ops.FeatureTap, fbkd_ops.Layer, fbkd_ops.training.data_parallel.data_parallel]
    missing = [item.__name__ for item in public if "Example" not in (item.__doc__ or "")]
    assert not missing


def test_generated_documentation_is_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "docs" / "render.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


EXAMPLES = sorted(path for path in (ROOT / "examples" / "frameworks").glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_framework_examples_are_short_tested_and_in_the_readme(path):
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    assert len(lines) <= 30
    test = f"tests/integrations/test_{path.name}"
    assert path.stem in (ROOT / test).read_text()
    rows = [row for row in (ROOT / "README.md").read_text().splitlines() if f"(examples/frameworks/{path.name})" in row]
    assert len(rows) == 1
    assert f"| {len(lines)} |" in rows[0] and f"({test})" in rows[0]


def test_the_readmes_training_loop_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    teacher = Pyramid()
    torch.save(teacher.state_dict(), "teacher.pth")
    names = dict(torch=torch, student=Pyramid(), teacher=teacher, device="cpu", loader=[(IMAGES, TARGETS)] * 2)
    exec(code, names)
    assert set(torch.load("student.pth")) == set(teacher.state_dict())


def test_the_training_guide_runs(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL):
        exec(code, names)
    assert len(names["features"]) == 3 and names["training.distiller"].step == 1
    assert set(torch.load("student.pth")) == set(names["student"].state_dict())


def test_tests_that_the_documentation_names_exist():
    names = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for page in (ROOT / "docs").glob("*.md"):
        others = {"test_", "test_step"}  # a pattern, and MMEngine's method
        named = set(re.findall(r"\btest_\w+", page.read_text())) - others
        assert named <= names | files, f"{page.name} names {', '.join(sorted(named - names - files))}"


def test_links_in_the_documentation_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
