"""The benchmark of all losses: what it measures, and that it refuses what computes something else."""

import copy

import pytest
import torch
from op_cases import NO_CPU

pytest.importorskip("pandas")

from benchmarks import losses, results, small
from benchmarks.mmrazor import versions
from fbkd_ops.losses.registry import LOSSES

ROWS = results.read(losses.RESULT).rows


def test_the_result_has_every_loss_and_row():
    measured = set(ROWS[["row", "loss", "threads"]].itertuples(index=False, name=None))
    assert measured == {(row.name, name, n) for row in losses.rows() for name in losses.KINDS for n in (1, 2)}
    assert len(losses.KINDS) == len(LOSSES) and len(losses.rows()) == 5


def test_no_loss_was_slower_than_plain_pytorch():
    """MGD is PyTorch's convolutions, whose times spread more than what is ours takes."""
    beside = ROWS[ROWS["peer"] == "reference"].set_index(["loss", "row", "threads"])["times_first"]
    assert len(beside) >= 50 and beside.drop("mgd").max() <= 1
    assert beside["mgd"].median() < 1.02


@NO_CPU
@pytest.mark.skipif("mmrazor" not in versions(), reason="MMRazor is not installed")
@pytest.mark.parametrize("name", losses.KINDS)
def test_peers(name):
    """Plain PyTorch computes the same; MMRazor's modules run on the same maps."""
    row = small.pyramid("", "mmrazor", 2, [(16, 16)] * 2, [(8, 8), (4, 4)])
    features, loss = row.features(torch.float32), losses.loss_of(name, row)
    others = losses.needed(loss, row)
    ours, plain = (
        float(losses.our_step(copy.deepcopy(loss), features, others, backend)()) for backend in ("auto", "reference")
    )
    assert ours == pytest.approx(plain, rel=1e-5) and ours > 0
    theirs = losses.their_step(name, row, features)
    assert (theirs is None) == (name in ("fgd", "score"))
    if name in ("pkd", "cwd"):  # MMRazor's weight is 1
        assert float(theirs()) == pytest.approx(ours / loss.weights[0], rel=1e-4)
    elif theirs:
        assert theirs().isfinite()


@NO_CPU
def test_a_brief_run_writes_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "SECONDS", 0.0)
    path, count = tmp_path / "losses.csv", torch.get_num_threads()
    words = ["--threads", "1", "--rows", "yolo n/s 160", "--losses", "fbkd", "fgd", "score", "--csv", str(path)]
    try:
        losses.main(words)
    finally:
        torch.set_num_threads(count)
    report = results.read(path)
    assert report.facts["environment"]["revision"] and (report.rows["ms"] > 0).all()
    assert list(report.rows["peer"]) == ["fbkd_ops", "reference"] * 3
