"""The study: arms that differ in one switch, paired runs, an interrupted study that goes on, and its statistics."""

import dataclasses
import functools

import pytest
import torch

for module in ("pandas", "pycocotools", "scipy", "sklearn", "torchvision"):
    pytest.importorskip(module)

import pandas as pd  # noqa: E402
from scipy import stats  # noqa: E402

from benchmarks import results  # noqa: E402
from benchmarks.plots import curves, draw  # noqa: E402
from benchmarks.study import __main__ as study  # noqa: E402
from benchmarks.study import cost, jobs, protocol, runs, tables  # noqa: E402
from benchmarks.study.protocol import ARMS, SETTINGS, STUDIES, Recipe, changed, recipe  # noqa: E402
from examples.demo.training import TrainingError  # noqa: E402
from fbkd_ops import Distiller, size_free_weights  # noqa: E402

SMALL = "batch_size=2 pictures=4 steps=4 teacher_pictures=4 teacher_steps=2 val_pictures=3"
CURVE = ["1", "2", "3", "4"]


@pytest.fixture(scope="module")
def small():
    setting = changed(SETTINGS["digits"], SMALL)
    data = runs.load(setting, None)
    return setting, data, runs.detector(setting, "teacher", data, runs.TEACHER_SEED).eval()


LOSSES = ["FBKD", *(loss.upper() for loss in protocol.OTHER_LOSSES)]
WITH_A_BASE = [arm for arm, (base, _) in ARMS.items() if base]


@pytest.mark.parametrize("arm", WITH_A_BASE)
def test_an_arm_differs_from_its_base_in_one_switch(arm):
    ours, base = (dataclasses.asdict(recipe(name)) for name in (arm, ARMS[arm][0]))
    assert sum(ours[switch] != base[switch] for switch in ours) == 1


@pytest.fixture(scope="module")
def build(small):
    return functools.cache(functools.partial(built, small))


@pytest.mark.parametrize("arm", WITH_A_BASE)
def test_what_is_built_for_an_arm_differs_from_its_base_in_one_thing(build, arm):
    ours, base = (build(name) for name in (arm, ARMS[arm][0]))
    assert sum(ours[thing] != base[thing] for thing in ours.keys() & base.keys()) == 1


def built(small, arm):
    """What a training is made of, read off the models; the proportions of the terms where all have a weight."""
    setting, data, teacher = small
    setting = dataclasses.replace(setting, steps=100)
    student, trained = runs.student_of(setting, arm, 0, data, teacher)
    start = {name: value.tolist() for name, value in student.state_dict().items()}
    found = {"steps": protocol.steps(setting, arm), "start": start, "pull": None}
    if trained is student:
        return found
    pull = "preset" if trained.share is None else trained.share.settings.target
    found |= {"pull": pull, "stop": trained.stop_step, "loss": type(trained.loss).__name__}
    found["share_steps"] = None if trained.share is None else trained.share.settings.steps
    if recipe(arm).loss != "fbkd":
        return found
    levels, terms = [level.settings for level in trained.loss.levels], weighted_terms(trained.loss)
    found["norm"] = {level.feature_norm for level in levels}
    weights = [(each.normalize, *(getattr(each, f"{term}_weight") for term in terms)) for each in levels]
    proportions = {"proportions": weights} if terms == protocol.TERMS else {}
    return found | {"terms": terms, **proportions}


def test_the_first_arm_is_a_plain_student():
    assert recipe(next(iter(ARMS))) == Recipe()


def test_parts_of_the_study_share_no_seed_and_name_what_there_is():
    seeds = {name: set(part.seeds) for name, part in STUDIES.items() if part.setting == "digits"}
    assert sum(map(len, seeds.values())) == len(set().union(*seeds.values()))
    for part in STUDIES.values():
        assert set(part.arms) <= set(ARMS)
        changed(SETTINGS[part.setting], part.changes)


def test_a_change_that_no_setting_has_is_refused():
    with pytest.raises(ValueError, match="no number of a setting is called step; there are image_size, .*steps"):
        changed(SETTINGS["digits"], "step=3")


def test_time_matched_students_train_longer():
    setting = dataclasses.replace(SETTINGS["digits"], steps=100, time_factor=1.37)
    lengths = {arm: protocol.steps(setting, arm) for arm in ARMS if recipe(arm).pull is None}
    assert lengths == {"baseline": 100, "time_matched": 137, "doubled": 200, "inherit": 100}


def test_arms_of_a_seed_start_from_the_same_weights(small):
    setting, data, teacher = small
    plain, trained = runs.student_of(setting, "baseline", 3, data, teacher)
    assert trained is plain
    distilled, distiller = runs.student_of(setting, "share", 3, data, teacher)
    other, _ = runs.student_of(setting, "baseline", 4, data, teacher)
    assert isinstance(distiller, Distiller) and distiller.student is distilled
    states = [model.state_dict() for model in (plain, distilled, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_switches_reach_the_distiller(small):
    setting, data, teacher = small
    setting = dataclasses.replace(setting, steps=100)
    made = {arm: runs.student_of(setting, arm, 0, data, teacher)[1] for arm in ARMS if recipe(arm).pull is not None}
    presets = {arm for arm in ARMS if arm.endswith("preset")}
    assert {arm for arm, each in made.items() if each.share is None} == presets
    assert {arm: each.share.settings.target for arm, each in made.items() if each.share is not None} == {
        arm: 0.1 if arm == "weak" else protocol.SHARE for arm in made.keys() - presets
    }
    assert {arm for arm, each in made.items() if each.stop_step is not None} == {"stop"}
    assert made["stop"].stop_step == 90
    calibrated = {arm for arm, each in made.items() if each.share is not None and each.share.settings.steps is not None}
    assert calibrated == {"calibrated"} and made["calibrated"].share.settings.steps == 10
    assert {type(each.loss).__name__ for each in made.values()} == {f"{loss}Loss" for loss in LOSSES}
    for arm, each in made.items():
        assert type(each.loss).__name__ == f"{recipe(arm).loss.upper()}Loss"
    made = {arm: each for arm, each in made.items() if recipe(arm).loss == "fbkd"}
    assert {arm: weighted_terms(each.loss) for arm, each in made.items()} == {arm: recipe(arm).terms for arm in made}
    norms = {arm for arm, each in made.items() if each.loss.levels[0].settings.feature_norm == "channel"}
    assert norms == {"norm"}
    means = {arm for arm, each in made.items() if each.loss.levels[0].settings.normalize == "mean"}
    assert means == {arm for arm in made if recipe(arm).proportions == "size_free"} == made.keys() - {"preset", "share"}


def test_the_recipe_weighs_the_terms_as_the_preset_does_on_large_pictures(small):
    setting, data, teacher = small
    levels = runs.student_of(setting, protocol.RECIPE, 0, data, teacher)[1].loss.levels
    expected = size_free_weights(setting.preset, len(levels))
    for index, level in enumerate(levels):
        found = [getattr(level.settings, name) for name in expected]
        assert found == pytest.approx([weights[index] for weights in expected.values()])


def weighted_terms(loss):
    """The terms that have a weight in every level."""
    settings = [level.settings for level in loss.levels]
    return tuple(term for term in protocol.TERMS if all(getattr(each, f"{term}_weight") for each in settings))


def test_students_see_the_first_pictures_and_the_teacher_all(small, monkeypatch):
    setting, data, teacher = small
    seen = []
    monkeypatch.setattr(runs, "_trained", lambda *arguments: seen.append(arguments[3]))
    few = dataclasses.replace(setting, pictures=3)
    runs.train_student(few, "baseline", 0, data, teacher)
    runs.train_teacher(few, data)
    assert [len(images) for images in seen] == [3, 4]
    assert all(torch.equal(*pair) for pair in zip(seen[0].pixels, data.train.pixels[:3], strict=True))


def test_an_heir_starts_with_the_teachers_modules(small):
    setting, data, teacher = small
    heir, _ = runs.student_of(setting, "inherit", 0, data, teacher)
    for path in ("rpn", "roi_heads", "backbone.fpn.layer_blocks"):
        ours, theirs = (model.get_submodule(path).state_dict() for model in (heir, teacher))
        assert ours and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_interrupted_study_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "TEACHERS", tmp_path / "teachers")
    monkeypatch.setattr(study, "ProcessPoolExecutor", InThisProcess)
    part = protocol.Study("digits", ("baseline", "share"), range(1), SMALL)
    todo, output = jobs.jobs_of(part, None), tmp_path / "study.csv"
    study.finish(todo, 1, output)
    rows = results.read(output).rows.set_index("arm")
    assert {*rows.index} == {"teacher", "baseline", "share"}
    assert [point.split(":")[0] for point in rows.at["baseline", "curve"].split()] == CURVE
    assert InThisProcess.submitted == 3

    results.write(output, {}, [row for row in results.text_rows(output) if row["arm"] != "share"])
    study.finish(todo, 1, output)
    again = results.read(output).rows.set_index("arm")
    assert InThisProcess.submitted == 4  # the one that is missing
    pd.testing.assert_frame_equal(again.loc[["teacher", "baseline"]], rows.loc[["teacher", "baseline"]])
    assert again.at["share", "steps"] == rows.at["share", "steps"] == 4

    todo[0].teacher_path.unlink()  # as in a fresh clone: the teacher's line is there, its weights are not
    study.finish(todo, 1, output)
    assert InThisProcess.submitted == 5 and len(results.read(output).rows) == 3


class InThisProcess:
    """Runs a job where it is submitted."""

    submitted = 0

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, job):
        from concurrent.futures import Future

        InThisProcess.submitted += 1
        done = Future()
        done.set_result(function(job))
        return done


def test_a_difference_is_that_of_a_paired_t_test():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 9, generator=generator).tolist()
    rows = pd.DataFrame({"arm": ["a"] * 9 + ["b"] * 9, "seed": [*range(9), *range(9)], "ap": first + second})
    found, expected = tables.difference(rows, "a", "b"), stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.pairs == 9
    unpaired = tables.difference(rows[rows["seed"] != 3], "a", "b")
    assert unpaired.pairs == 8 and unpaired.mean != pytest.approx(found.mean)
    assert str(tables.difference(rows, "a", "c")) == "-"


COSTS = pd.DataFrame({"setting": "digits", "arm": ["baseline", "size_free"], "ms": [70, 105], "peak_mb": [800, 850]})


def runs_of(**scores):
    """Two runs an arm, as rows of the study's results."""
    rows = [
        {
            "setting": "digits",
            "changes": None,
            "arm": arm,
            "seed": seed,
            "steps": 10,
            "ap": ap,
            "curve": f"5:0.1 10:{ap}",
        }
        for arm, pair in scores.items()
        for seed, ap in enumerate(pair, start=100)
    ]
    return pd.DataFrame(rows)


def test_a_table_of_arms():
    rows = runs_of(size_free=[0.3, 0.4], share=[0.2, 0.2], baseline=[0.1, 0.3])
    *_, baseline, share, size_free = tables.arms_table(rows, COSTS).splitlines()
    assert baseline.startswith("| `baseline` | 2 | 10 | 70 | 800 | 0.200 |") and share.endswith(" |  |")
    assert "| 105 | 850 |" in share and "| 105 | 850 |" in size_free
    assert "| +0.150 [-0.485, +0.785] | - | - | `share`: +0.150 [-0.485, +0.785] |" in size_free


def test_rows_of_a_part_are_those_of_its_setting_seeds_and_numbers():
    rows = runs_of(baseline=[0.1, 0.3], teacher=[0.7, 0.7])
    strange = [rows.assign(setting="bccd"), rows.assign(changes="steps=3"), rows.assign(seed=99)]
    found = tables.rows_of(pd.concat([*strange, rows]), STUDIES["digits"])
    pd.testing.assert_frame_equal(found, rows[rows["arm"] == "baseline"])


def test_a_table_of_shares():
    rows = runs_of(size_free=[0.3, 0.4], baseline=[0.1, 0.3])
    rows["share_p10"], rows["share_p50"], rows["share_p90"] = [0.3, 0.2, *[None] * 2], [0.5, 0.6, *[None] * 2], 0.9
    *_, line = tables.share_table(rows).splitlines()
    assert line == "| digits | 64 | `size_free` | 2 | 0.5 | 0.55 (0.50 to 0.60) | 0.20 | 0.90 |"


def test_the_claim_is_a_row_beside_the_baselines():
    rows = runs_of(size_free=[0.3, 0.4], baseline=[0.1, 0.3], time_matched=[0.2, 0.3], inherit=[0.9, 0.9])
    *_, line = tables.headline(rows).splitlines()
    assert line == "| digits | 2 of 8 so far | 0.350 | +0.150 [-0.485, +0.785] | +0.100 [+0.100, +0.100] |  |"
    assert "digits" not in tables.headline(runs_of(baseline=[0.1, 0.3]))
    whole = tables.headline(runs_of(size_free=[0.3, 0.4] * 4, baseline=[0.1, 0.3] * 4))
    assert "| digits | 8 | 0.350 | +0.150 [" in whole


def test_the_teacher_of_a_part_is_the_one_of_its_numbers():
    rows = runs_of(teacher=[0.7])
    strange = runs_of(teacher=[0.2]).assign(changes=STUDIES["quick"].changes)
    scores = [tables.teacher_score(pd.concat([strange, rows]), STUDIES[name]) for name in ("digits", "quick")]
    assert scores == ["0.700", "0.200"]


def test_curves_are_over_the_time_of_a_plain_student():
    found = curves(runs_of(size_free=[0.3, 0.4], baseline=[0.1, 0.3], weak=[0.2, 0.2])).set_index(["arm", "place"])
    factor = SETTINGS["digits"].time_factor
    assert found.loc[("baseline", 1), "time"].tolist() == [10, 10]
    assert found.loc[("size_free", 1), "time"].tolist() == [10 * factor] * 2
    assert found.loc[("size_free", 1), "ap"].tolist() == [0.3, 0.4] and "weak" not in found.index


def test_a_picture_of_the_curves(tmp_path):
    rows = runs_of(size_free=[0.3, 0.4], baseline=[0.1, 0.3], teacher=[0.7, 0.7])
    assert draw(results.Report({}, rows), tmp_path, "study", ["curves"]) == ["study-curves.png"]


def test_arms_without_a_cost_of_their_own_have_that_of_another_one():
    assert set(cost.MEASURED) | set(protocol.COSTS_LIKE) == set(ARMS)
    assert set(protocol.COSTS_LIKE.values()) <= set(cost.MEASURED)


def test_costs_are_of_a_step(monkeypatch):
    monkeypatch.setattr(cost, "STEPS", 1)
    found = cost.milliseconds("digits", ["baseline", "share"], rounds=1)
    assert found.keys() == {"baseline", "share"} and min(found.values()) > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["bccd"], "bccd needs --data"),
        (["digits", "--data", "folder"], "the other parts take none"),
        (["digits", "--seeds", "7-3"], "expected FIRST-LAST with FIRST <= LAST, got '7-3'"),
    ],
)
def test_wrong_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        study.main(arguments)
    assert message in capsys.readouterr().err


def test_a_training_that_diverges_counts_with_nothing(monkeypatch):
    def diverge(*_):
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(runs, "train_student", diverge)
    job = jobs.Job("digits", SMALL, "share", 0, None)
    assert jobs._outcome(job, None, None).ap == 0


def test_students_of_two_teachers_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "TEACHERS", tmp_path)
    job = jobs.Job("digits", SMALL, jobs.TEACHER, 0, None)
    torch.save({"weight": torch.ones(2)}, job.teacher_path)
    row = {"setting": "digits", "changes": SMALL, "teacher": jobs.digest_of(job.teacher_path)}
    jobs.check_teacher(job, [row, {**row, "changes": "", "teacher": "another"}])
    torch.save({"weight": torch.zeros(2)}, job.teacher_path)
    with pytest.raises(ValueError, match="the table has runs with"):
        jobs.check_teacher(job, [row])
