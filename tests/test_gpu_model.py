"""The model of a GPU's time: what it reads of compiled code, the times it makes of that, the committed prediction."""

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

pytest.importorskip("triton")
pytest.importorskip("pandas")

import pandas as pd

from benchmarks import code_report, gpu_model, gpu_model_step, results
from benchmarks.gpu_model_machine import CONSTANTS
from benchmarks.gpu_model_sass import Block, machine_code
from benchmarks.gpu_model_step import SmallOp, Step, cuda_kernels
from benchmarks.gpu_model_tables import model_tables
from benchmarks.gpu_model_ttir import Pointer, evaluate, triton_code
from benchmarks.inputs import Case
from fbkd_ops import backends
from fbkd_ops.kernels import pyramid

ROOT = Path(__file__).resolve().parents[1]

RESULTS = ROOT / "benchmarks" / "results"
REPORTS = [RESULTS / name for name in ("gpu-model.csv", "gpu-model-before.csv")]

SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x0 */
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   DEPBAR.LE SB0, 0x1 ;
        /*0050*/                   LDSM.16.M88.4 R8, [R9] ;
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4].tnspA, R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   HGMMA.64x64x8.F32.TF32 R24, R56, gdesc[UR40], RZ, !UPT ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;
        /*00a0*/               @P1 BRA 0x80 ;
        /*00b0*/               @P2 BRA 0x20 ;
        /*00c0*/                   STG.E desc[UR4][R2.64], R24 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   IMAD R1, R1, R1, R1 ;
        /*00f0*/                   BRA 0xf0;
        /*0100*/                   NOP;
"""

ARGUMENTS = """
%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x.0"(#loc)), %y: !tt.ptr<f32> loc("y"(#loc)), %n: i32 loc("n"(#loc))
"""
TTIR = """
module {
  tt.func public @kernel(ARGUMENTS) attributes {noinline = false} {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c3 = arith.constant 3 : i32 loc(#loc1)
    %c16 = arith.constant 16 : i32 loc(#loc1)
    %no = arith.constant dense<false> : tensor<32x64xi1> loc(#loc1)
    %zero = arith.constant dense<0.000000e+00> : tensor<64xf32> loc(#loc1)
    %p = tt.get_program_id x : i32 loc(#loc2)
    %at = tt.splat %x : !tt.ptr<bf16> -> tensor<32x64x!tt.ptr<bf16>> loc("at"(#loc3))
    %big = arith.cmpi sge, %p, %c3 : i32 loc(#loc2)
    scf.if %big {
      %sum:2 = scf.for %k = %c0 to %n step %c16 iter_args(%a = %zero, %b = %c0) -> (tensor<64xf32>, i32)  : i32 {
        %v = tt.load %at, %no : tensor<32x64x!tt.ptr<bf16>> loc(#loc4)
        %w = tt.load %at : tensor<32x64x!tt.ptr<bf16>> loc(#loc4)
        %s = "tt.reduce"(%w) <{axis = 0 : i32}> ({
        ^bb0(%left: bf16 loc("l"(#loc)), %right: bf16 loc("r"(#loc))):
          %add = arith.addf %left, %right : bf16 loc(#loc5)
          tt.reduce.return %add : bf16 loc(#loc5)
        }) : (tensor<32x64xbf16>) -> tensor<64xbf16> loc(#loc5)
        %next = arith.addi %b, %c16 : i32 loc(#loc5)
        scf.yield %a, %next : tensor<64xf32>, i32 loc(#loc5)
      } loc(#loc5)
      %out = tt.splat %y : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#loc6)
      tt.store %out, %sum#0 : tensor<64x!tt.ptr<f32>> loc(#loc6)
    } loc(#loc6)
    %end = scf.while (%d = %c3) : (i32) -> i32 {
      %more = arith.cmpi slt, %d, %n : i32 loc(#loc7)
      scf.condition(%more) %d : i32 loc(#loc7)
    } do {
    ^bb0(%e: i32 loc("e"(#loc))):
      %twice = arith.addi %e, %e : i32 loc(#loc7)
      scf.yield %twice : i32 loc(#loc7)
    } loc(#loc7)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
""".replace("ARGUMENTS", ARGUMENTS.strip())


def test_machine_code_is_split_into_the_blocks_of_its_loops():
    kernel, outer, inner = machine_code(SASS, warps=8).blocks
    assert (kernel.instructions, outer.instructions, inner.instructions) == (4, 7, 3)
    assert (kernel.loads, kernel.barriers, kernel.product_waits) == (1, 1, 0)
    assert (outer.copies, outer.groups, outer.pending, outer.product_waits) == (1, 1, 1, 1)
    assert kernel.wavefronts == 8 * 4 + 8 * 1  # a load of 16 bytes a lane, a store of 4


def test_products_are_counted_by_type_and_shape():
    _, outer, inner = machine_code(SASS, warps=8).blocks
    assert outer.flops == {"BF16": 2 * 2 * 64 * 32 * 16}  # two warpgroups
    assert inner.flops == {"TF32": 2 * 2 * 64 * 64 * 8, "BF16": 8 * 2 * 16 * 8 * 16}
    # Both operands in shared memory, and copies of 16 bytes a lane and four matrices beside them; then one operand.
    assert outer.wavefronts == 2 * (64 + 32) * 16 * 2 / 128 + 8 * 4 + 8 * 4
    assert inner.wavefronts == 2 * 64 * 8 * 4 / 128


def test_loops_and_bytes_follow_from_the_arguments():
    code = triton_code(TTIR, threads=128)
    arguments = {"x.0": Pointer("x.0"), "y": Pointer("y"), "n": 100}
    done = evaluate(code, arguments, program=3)
    assert done.passes[1] == 7  # 0, 16, .. 96
    assert done.tensors == {("x.0", "load"): 7 * 32 * 64 * 2, ("y", "store"): 64 * 4}  # not what a mask leaves out
    assert done.bytes == [64 * 4, 7 * 32 * 64 * 2, 0]
    assert done.passes[2] == (7 + 6) / 2  # 3, 6, .. 192: seven conditions and six sums, two operations a pass


def test_a_program_that_leaves_a_branch_out_does_less():
    code = triton_code(TTIR, threads=128)
    arguments = {"x.0": Pointer("x.0"), "y": Pointer("y"), "n": 100}
    done = evaluate(code, arguments, program=2)
    assert done.passes[1] == 0 and 0 < done.passes[0] < 1 and not done.tensors


CARRIED = """
  tt.func public @kernel(%n: i32 loc("n"(#loc)), %m: i32 loc("m"(#loc))) attributes {noinline = false} {
    %zero = arith.constant 0 : i32 loc(#loc)
    %one = arith.constant 1 : i32 loc(#loc)
    %sum = scf.for %k = %zero to %n step %one iter_args(%a = %m) -> (i32)  : i32 {
      %next = arith.addi %a, %one : i32 loc(#loc)
      scf.yield %next : i32 loc(#loc)
    } loc(#loc)
    scf.for %k = %zero to %sum step %one  : i32 {
      %next = arith.addi %k, %one : i32 loc(#loc)
      scf.yield loc(#loc)
    } loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
"""


def test_what_a_loop_hands_on_is_known_after_no_pass_or_one():
    code = triton_code(CARRIED, threads=32)
    assert evaluate(code, {"n": 0, "m": 4}, program=0).passes[1:] == [0, 4]
    assert evaluate(code, {"n": 1, "m": 4}, program=0).passes[1:] == [1, 5]
    with pytest.raises(ValueError, match="bounds of a loop"):
        evaluate(code, {"n": 2, "m": 4}, program=0)


def test_a_loop_whose_bounds_are_not_known_is_refused():
    with pytest.raises(ValueError, match="bounds of a loop"):
        evaluate(triton_code(TTIR, threads=128), {"x.0": Pointer("x.0"), "n": None}, program=3)


def test_a_missing_constant_is_refused():
    with pytest.raises(KeyError, match="no constant 'E4M3'"):
        gpu_model.product_cycles(Block(flops=Counter(E4M3=1)))


def test_a_multiprocessor_runs_what_its_registers_memory_and_warps_allow():
    def at_once(registers, shared, warps):
        return gpu_model.Kernel([], True, None, registers, shared, warps).programs_at_once

    assert at_once(127, 48 * 1024, 4) == 4  # 512 registers a thread
    assert at_once(129, 48 * 1024, 4) == 3
    assert at_once(32, 48 * 1024, 4) == 4  # 227 KB
    assert at_once(32, 0, 4) == 16  # 64 warps
    assert at_once(255, 0, 8) == 1


def test_programs_run_in_waves():
    assert gpu_model.scheduled([1.0], 132, 132) == 1
    assert gpu_model.scheduled([1.0], 133, 132) == 2
    assert gpu_model.scheduled([3.0, 1.0], 4, 2) == 4  # 3 + 1 beside 3 + 1
    assert gpu_model.scheduled([1.0], 100_000, 10) == pytest.approx(10_000, rel=1e-3)


def test_programs_that_share_a_multiprocessor_overlap():
    costs = gpu_model.Costs(100.0, {"issue": 40.0, "L2": 10.0})
    assert costs.together(1) == 100
    assert costs.together(2) == (100 + 140) / 2  # at best as one, at worst behind one another
    assert costs.together(10) == (400 + 460) / 2


def test_waits_stand_between_products_that_are_not_pipelined():
    products = Counter(BF16=10_000_000.0)
    cycles = gpu_model.product_cycles(Block(flops=products))
    pipelined = gpu_model.pass_alone(Block(flops=products, instructions=100), 4, 500.0)
    waiting = gpu_model.pass_alone(Block(flops=products, instructions=100, product_waits=1), 4, 500.0)
    assert pipelined == cycles
    assert waiting == cycles + 100 * gpu_model.constant("instruction") + gpu_model.constant("product_wait")


@pytest.mark.parametrize("pending, expected", [(2, 500.0), (1, 600.0), (0, 600.0), (None, 600.0)])
def test_copies_are_waited_for_unless_they_have_a_pass_to_arrive(pending, expected):
    instructions = round(100 / gpu_model.constant("instruction"))
    block = Block(instructions=instructions, copies=4, groups=2, pending=pending)
    assert gpu_model.pass_alone(block, 4, 500.0) == pytest.approx(expected, abs=1)


def test_unrolled_loops_are_dealt_out_by_size():
    blocks = gpu_model._shared_out([Block(instructions=300, flops=Counter(BF16=60.0))], [10.0, 20.0])
    assert [block.instructions for block in blocks] == [100, 200]
    assert [block.flops["BF16"] for block in blocks] == pytest.approx([20, 40])


def test_each_tensor_comes_once_from_memory():
    launch = SimpleNamespace(programs=8, tensors={"a": (1, 100), "b": (1, 100), "c": (2, 1000)})
    program = SimpleNamespace(tensors=Counter({("a", "load"): 50, ("b", "load"): 50, ("c", "store"): 10}))
    assert gpu_model.dram_bytes(launch, [program]) == 100 + 80


def test_the_host_is_charged_for_ops_views_nodes_and_launches():
    step = Step(ops={"forward": [SmallOp("mul", 0, 0)], "backward": [SmallOp("add", 0, 0)] * 2}, views=3, nodes=5)
    parts = zip((3, 3, 5), ("host_op", "host_view", "host_node"), strict=True)
    assert gpu_model.host_us(step) == sum(count * gpu_model.constant(name) for count, name in parts)


def test_a_step_is_captured_as_on_a_gpu():
    """Without compiling: kernels' names alone are noted."""
    launched, case, resolve = [], Case((2, 32, 32, 40), "bfloat16", strides=(4, 2)), backends.resolve

    @contextlib.contextmanager
    def noted(_):
        with mock.patch.object(pyramid, "_launch_once", lambda kernel, *_: launched.append(kernel.__name__)):
            yield

    with mock.patch.object(gpu_model_step, "launches_noted", noted):
        step = gpu_model_step.captured_step(case)
    assert backends.resolve is resolve
    assert {"adapted_sums", "residual_sums", "weight_gradients"} <= set(launched)
    kernels = [launch.kernel for launch in step.launches]  # of the CUDA library
    assert kernels[:2] == ["attention_pool_sums", "attention_pool_finish"]  # both sides in one launch
    maps = case.pixels * 32 * 2
    means = 2 * 4 * (case.pixels + 2 * len(case.shapes) * 32)
    assert (step.launches[0].bytes, step.launches[1].bytes) == (2 * (maps + means), 4 * means)
    names = [{op.name for op in ops} for ops in step.ops.values()]
    assert all(names) and not any("view" in name or "empty" in name for name in set.union(*names))
    assert step.nodes > 0 and step.views > 0


def test_kernels_of_a_cuda_op_are_read_from_its_launcher():
    assert cuda_kernels("attention_pool_forward") == ["attention_pool_sums", "attention_pool_finish"]
    assert cuda_kernels("no_such_op") == []


@pytest.mark.skipif(not code_report.cuobjdump_path(), reason="there is no triton that has cuobjdump")
def test_kernels_of_the_cuda_library_show_what_they_take():
    if not code_report.cuda_libraries(90):
        pytest.skip("the CUDA library has no code for sm_90")
    kernel = gpu_model.cuda_resources()["attention_pool_sums"]
    assert kernel.warps == 8 and 32 <= kernel.registers <= 64 and kernel.programs_at_once == 4


@pytest.fixture(scope="module")
def products():
    """What the model makes of a matrix product of 1024x1024, in three precisions, compiled by another process."""
    if code_report.cuobjdump_path() is None:
        pytest.skip("there is no triton that has cuobjdump")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests" / "gpu_model_worker.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


TILES = 8 * 9 // 2  # of 128x128, up to the diagonal
FLOPS = TILES * 2 * 128 * 128 * 1024


def test_flops_and_bytes_of_a_product_are_exact(products):
    rounded = {
        name: {kind: row[f"{kind}_gflop"] * 1e9 for kind in ("BF16", "TF32") if f"{kind}_gflop" in row}
        for name, row in products.items()
    }
    assert rounded["bf16"] == {"BF16": pytest.approx(FLOPS, abs=1e6)}
    assert rounded["tf32"] == {"TF32": pytest.approx(FLOPS, abs=1e6)}
    assert rounded["tf32x3"] == {"TF32": pytest.approx(3 * FLOPS, abs=1e6)}
    for name, width in {"bf16": 2, "tf32": 4, "tf32x3": 4}.items():
        moved = TILES * (2 * 128 * 1024 * width + 128 * 128 * 4)
        assert products[name]["l2_gb"] * 1e9 == pytest.approx(moved, abs=1e5)
    assert all(row["matched"] for row in products.values())


def test_precision_changes_the_prediction_by_itself(products):
    """Three TF32 products at half the rate take six times what one of bfloat16 takes."""
    cycles = {name: row["tensor_cycles"] for name, row in products.items()}
    assert cycles["tf32x3"] == pytest.approx(6 * cycles["bf16"])
    assert cycles["tf32"] == pytest.approx(2 * cycles["bf16"])
    times = {name: row["predicted_us"] for name, row in products.items()}
    assert times["bf16"] < times["tf32"] < times["tf32x3"]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_rows_of_a_committed_prediction_sum(path):
    facts, rows = results.read(path)
    losses = ["FBKDLoss", *gpu_model.OTHERS] if "loss" in rows else ["FBKDLoss"]  # the earlier result is of one
    rows = rows if "loss" in rows else rows.assign(loss="FBKDLoss")
    expected = [(loss, *case) for loss in losses for case in gpu_model.CASES]
    steps = [{"loss": "FBKDLoss"} | step for step in facts["steps"]]
    assert [(step["loss"], step["images"], step["dtype"]) for step in steps] == expected
    assert facts["constants"] == {name: each.value for name, each in CONSTANTS.items()}
    assert (rows["predicted_us"] > rows["floor_us"]).all()
    for step in steps:
        launches = rows[
            (rows[["loss", "images", "dtype"]] == [step["loss"], step["images"], step["dtype"]]).all(axis=1)
        ]
        assert launches["predicted_us"].sum() == pytest.approx(step["fused_us"], abs=0.1)
        assert step["fused_us"] + step["small_us"] == pytest.approx(step["gpu_us"], abs=0.2)
        assert step["eager_us"] == max(step["gpu_us"], step["host_us"])
        assert step["gpu_us"] > step["roofline_us"]


def test_tables_show_before_and_after():
    report, before = (results.read(path) for path in REPORTS)
    gone = before.rows.iloc[:1].assign(kernel="gone", predicted_us=5000.0)
    before.facts["steps"][0]["host_us"] = 99000.0
    text = model_tables(report, before._replace(rows=pd.concat([before.rows, gone])))
    assert "| 5.00 → – |" in text and "99.0 → " in text
    assert "→" not in model_tables(report, report)
