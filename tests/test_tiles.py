"""Tiles of the kernels with matrix products: the table, what is chosen from it, and the search that fills it."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton")

from fbkd_ops.kernels import tiles
from fbkd_ops.kernels.tiles import Blocks
from scripts.gpu import tune

KERNEL = SimpleNamespace(__name__="residual_products")


def test_every_kernel_has_a_default_for_every_operand():
    operands = {f"{size}{rest}" for size in (2, 4, 8) for rest in ("", " unaligned")}
    assert {name: set(entries) for name, entries in tiles.table()["default"].items()} == dict.fromkeys(
        tiles.table()["default"], operands
    )


def test_architectures_only_have_entries_that_the_default_has():
    default = tiles.table()["default"]
    for kernels in tiles.table().values():
        for kernel, entries in kernels.items():
            assert {operand.replace("tf32", "4") for operand in entries} <= default[kernel].keys()


def test_extents_are_powers_of_two():
    for kernels in tiles.table().values():
        for entries in kernels.values():
            for blocks in entries.values():
                assert all(value & (value - 1) == 0 for value in blocks[:4]) and blocks.num_stages >= 1


def test_a_gpu_gets_its_own_entry_and_the_default_where_it_has_none(monkeypatch):
    table = tiles.table()
    own, default = table["90"]["residual_products"]["2"], table["default"]["residual_products"]
    assert own != default["2"]
    asked = torch.empty(1), torch.bfloat16
    for gpu, aligned, expected in (
        ("90", True, own),
        ("90", False, default["2 unaligned"]),
        ("89", True, default["2"]),
        ("gfx942", True, default["2"]),
    ):
        monkeypatch.setattr(tiles, "architecture", lambda like, gpu=gpu: gpu)
        assert tiles.blocks_of(KERNEL, *asked, aligned) == expected


def test_tf32_has_tiles_of_its_own_where_the_table_does(monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda like: "90")
    own, default = (tiles.table()[name]["residual_products"] for name in ("90", "default"))
    assert own["tf32"] != default["4"] and "tf32 unaligned" not in own
    asked = KERNEL, torch.empty(1), torch.float32
    assert tiles.blocks_of(*asked, True) == default["4"]
    monkeypatch.setattr(tiles, "precision", lambda: "tf32")
    assert tiles.blocks_of(*asked, True) == own["tf32"]
    assert tiles.blocks_of(*asked, False) == default["4 unaligned"]
    assert tiles.blocks_of(KERNEL, torch.empty(1), torch.float64, True) == default["8"]


def test_interpreter_takes_the_default(monkeypatch):
    monkeypatch.setattr(tiles.triton.knobs.runtime, "interpret", True)
    assert tiles.architecture(torch.empty(1)) == "default"


def test_splits_fill_whole_waves_of_the_device(monkeypatch):
    assert tiles.most_programs(torch.empty(1)) % tiles.MULTIPROCESSORS == 0
    monkeypatch.setattr(tiles, "_multiprocessors", lambda device: 114)
    like = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert tiles.most_programs(like) == tiles.WAVES * 114


def test_neighbours_differ_in_one_number_within_the_limits():
    start = Blocks(256, 64, 32, 8, 1)
    found = list(tune.neighbours(start))
    assert {sum(a != b for a, b in zip(start, each, strict=True)) for each in found} == {1}
    assert Blocks(128, 64, 32, 8, 1) in found and Blocks(256, 64, 32, 8, 2) in found
    assert all(each.ROWS <= 256 and each.num_stages >= 1 for each in found)


def test_search_finds_the_fastest_tile_step_by_step():
    best = Blocks(32, 256, 64, 4, 2)

    def measured(blocks):
        return 1 + sum(abs(a - b) / b for a, b in zip(blocks, best, strict=True))

    assert tune.search(Blocks(128, 128, 64, 8, 3), measured) == best


def test_search_stays_where_the_gain_is_noise_and_where_nothing_else_runs():
    present, other = Blocks(64, 64, 32, 4, 3), Blocks(64, 64, 32, 8, 3)
    assert tune.search(present, lambda blocks: 0.99 if blocks == other else 1.0) == present
    assert tune.search(present, lambda blocks: 1.0 if blocks == present else float("inf")) == present


def test_entries_of_a_step_and_a_chosen_tile(monkeypatch):
    monkeypatch.setattr(tiles, "architecture", lambda like: "89")
    entry = tune.Entry("residual_products", "2")

    def step():
        return tiles.blocks_of(KERNEL, torch.empty(1), torch.bfloat16, True)

    assert tune.entries_of(step) == {entry: tiles.table()["default"]["residual_products"]["2"]}
    other = Blocks(16, 16, 16, 2, 1)
    with tune.chosen(entry, other):
        assert step() == other
    with tune.chosen(entry._replace(operand="4"), other):
        assert step() != other


def test_a_tuned_entry_is_written_where_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    path.write_text(tiles.TABLE.read_text())
    blocks = Blocks(64, 32, 16, 4, 2)
    tune.write(path, "89", {tune.Entry("residual_products", "2"): blocks})
    before, after = json.loads(tiles.TABLE.read_text()), json.loads(path.read_text())
    assert after.pop("89") == {"residual_products": {"2": list(blocks)}} and after == before
    assert path.read_text().startswith(tiles.TABLE.read_text()[:100])


def test_file_of_tiles_is_as_the_search_writes_it():
    assert tune.text_of(json.loads(tiles.TABLE.read_text())) == tiles.TABLE.read_text()


class Event:
    """A CUDA event at a time that the test sets."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.parametrize(
    "spills, error, expected",
    [
        (0, None, 5.0),
        (2, None, float("inf")),
        (0, RuntimeError("out of resource: shared memory"), float("inf")),
        (0, RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
    ids=["runs", "spills", "too large", "broken device"],
)
def test_time_is_that_of_the_kernels_own_launches(spills, error, expected, monkeypatch):
    def launch(kernel):
        if error:
            raise error
        Event.now += {"residual_products": 2.5, "add_splits": 100.0}[kernel.__name__]
        return SimpleNamespace(n_spills=spills)

    def step():
        for name in ("residual_products", "add_splits", "residual_products"):
            tune.pyramid._launch_once(SimpleNamespace(__name__=name))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tune.pyramid, "_launch_once", launch)
    if expected is None:
        with pytest.raises(RuntimeError, match="CUDA error"):
            tune.kernel_ms(step, "residual_products")
    else:
        assert tune.kernel_ms(step, "residual_products") == expected


def test_without_a_gpu_nothing_is_tuned(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main([])
    assert "there is no CUDA device" in capsys.readouterr().err
