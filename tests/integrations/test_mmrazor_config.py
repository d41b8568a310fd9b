"""MMRazor's FBKD config with FBKDOpsLoss in place of its connectors and losses."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from helpers import randomise
from openmmlab import (
    batch,
    import_mmcv_ops,
    mmrazor_for_distillation,
    register_samples,
    retinanet,
    snapshot,
    training,
    unchanged,
)
from process_state import kept

from fbkd_ops.weights.mmrazor import load_checkpoint

for module in ("mmrazor", "mmdet", "mmengine", "mmcv"):
    pytest.importorskip(module)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "frameworks" / "mmrazor_config.py"
PREFIX = "distiller.distill_losses.loss_fbkd."
WIDTH = 32
SIZE = 128  # the finest level's map has to be as large as its pooling


@pytest.fixture(scope="module", autouse=True)
def models():
    """MMRazor's registry."""
    import_mmcv_ops()
    import mmdet.models  # noqa: F401
    from mmengine.registry import init_default_scope

    register_samples()
    with kept(), mmrazor_for_distillation() as registry:
        import fbkd_ops.integrations.mmrazor_loss  # noqa: F401

        init_default_scope("mmrazor")
        yield registry
    init_default_scope("mmdet")


@pytest.fixture(autouse=True)
def whole_checkpoints(monkeypatch):
    """MMEngine 0.10.7 loads what it saved with the default of torch before 2.6."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


@pytest.fixture(autouse=True)
def without_pkg_resources(monkeypatch):
    """MMEngine finds packages by what setuptools 81 and later no longer has."""
    from mmengine.config import config

    def folder(package):
        return str(Path(importlib.util.find_spec(package).origin).parent)

    monkeypatch.setattr(config, "is_installed", lambda package: True)
    monkeypatch.setattr(config, "get_installed_path", folder)


def shrunk(config) -> dict:
    """The config's model with tiny detectors and as narrow a loss or connectors; the rest is as it was."""
    model = config.model.to_dict()
    model |= dict(
        architecture=retinanet(18, WIDTH, start_level=0),
        teacher=retinanet(34, WIDTH, start_level=0),
        teacher_ckpt=None,
    )
    distiller = model["distiller"]
    for connector in (distiller["connectors"] or {}).values():
        connector["in_channels"] = WIDTH
    for loss in distiller["distill_losses"].values():
        if loss["type"] == "FBKDOpsLoss":
            loss["student_channels"] = WIDTH
    return model


def configs() -> tuple[dict, dict]:
    """The models of MMRazor's config and of the example, which is based on it."""
    from mmengine.config import Config

    (base,) = re.findall(r'_base_ = \["(.+)"\]', EXAMPLE.read_text())
    theirs, _ = Config._get_cfg_path(base, str(EXAMPLE))
    return tuple(shrunk(Config.fromfile(path)) for path in (theirs, EXAMPLE))


def students_gradients(algorithm) -> dict[str, torch.Tensor]:
    parameters = algorithm.architecture.named_parameters()
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def test_the_loss_is_that_of_the_connectors_in_a_checkpoint(models):
    their_config, our_config = configs()
    theirs, ours = models.build(their_config), models.build(our_config)
    theirs.init_weights()
    randomise(theirs.distiller)
    state = copy.deepcopy(theirs.state_dict())
    ours.load_state_dict({key: value for key, value in state.items() if not key.startswith("distiller.")}, strict=False)
    load_checkpoint(ours.distiller.distill_losses["loss_fbkd"].loss, dict(state_dict=state, meta={}))
    data = batch(theirs, SIZE)
    theirs.train()
    ours.train()
    their_losses, our_losses = theirs(**data, mode="loss"), ours(**data, mode="loss")
    expected = sum(value for name, value in their_losses.items() if name.startswith("distill."))
    terms = our_losses["distill.loss_fbkd"]
    assert len(terms) == 4 and all(term > 0 for term in terms)
    torch.testing.assert_close(sum(terms), expected)
    totals = [algorithm.parse_losses(losses)[0] for algorithm, losses in ((theirs, their_losses), (ours, our_losses))]
    torch.testing.assert_close(*totals)
    for total in totals:
        total.backward()
    torch.testing.assert_close(students_gradients(ours), students_gradients(theirs), rtol=1e-3, atol=1e-5)


def test_the_example_trains(models, tmp_path):
    from mmengine.runner import Runner

    model = models.build(configs()[1])
    model.init_weights()
    loss = randomise(model.distiller.distill_losses["loss_fbkd"])
    before = snapshot(model)
    Runner(model=model, default_scope="mmrazor", **training(tmp_path, size=SIZE)).train()
    assert not unchanged(model.architecture, below(before, "architecture."))
    assert not unchanged(loss, below(before, PREFIX))
    teacher = below(before, "teacher.")
    assert all(torch.equal(parameter, teacher[name]) for name, parameter in model.teacher.named_parameters())
    saved = torch.load(tmp_path / "epoch_2.pth", weights_only=False)["state_dict"]
    restored = models.build(configs()[1])
    restored.load_state_dict(saved)
    assert all(torch.equal(value, restored.state_dict()[key]) for key, value in loss.state_dict(prefix=PREFIX).items())


def test_the_maps_may_be_a_dict():
    from fbkd_ops.integrations.mmrazor_loss import FBKDOpsLoss

    loss = randomise(FBKDOpsLoss(student_channels=4, num_levels=2))
    student, teacher = (list(torch.randn(3, 1, 4, 32, 32)) for _ in range(2))
    expected = loss(student, tuple(teacher))
    assert len(expected) == 4
    named = [dict(zip(("p2", "p3", "p4"), maps, strict=True)) for maps in (student, teacher)]
    torch.testing.assert_close(loss(*named), expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match="student_features must be a list, tuple or dict .* got Tensor"):
        loss(student[0], teacher)


def below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
