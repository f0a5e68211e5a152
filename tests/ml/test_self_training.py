from __future__ import annotations

import pytest

from ml.config import Recipe
from ml.errors import RecipeError
from ml.recipes import build_recipe
from ml.self_training import GenerationRecord, IterationPlan, Stop, next_iteration


def history(*accuracies: float) -> list[GenerationRecord]:
    return [GenerationRecord(id=f"gen_{i}", validation_top1=accuracy, num_parameters=100) for i, accuracy in enumerate(accuracies)]


def recipe(**iterations: object) -> Recipe:
    return build_recipe("digits", {"students": [{"ratio": 1}, {"ratio": 2}], "iterations": {"count": 3, **iterations}})


def planned(result: IterationPlan | Stop) -> IterationPlan:
    assert isinstance(result, IterationPlan)
    return result


def test_each_student_is_the_next_teacher():
    assert [planned(next_iteration(history(*[0.5] * k), recipe())).teacher for k in (1, 2, 3)] == ["gen_0", "gen_1", "gen_2"]


def test_each_iteration_has_its_own_student_and_the_last_one_serves_the_rest():
    assert [planned(next_iteration(history(*[0.5] * k), recipe())).student.ratio for k in (1, 2, 3)] == [1, 2, 2]


def test_the_loop_stops_when_all_iterations_are_done():
    result = next_iteration(history(0.5, 0.6, 0.7, 0.8), recipe())

    assert isinstance(result, Stop)
    assert result.code == "iterations.done"


def test_wanting_more_goes_on_after_the_recipes_count():
    assert planned(next_iteration(history(0.5, 0.6, 0.7, 0.8), recipe(), wanted=4)).iteration == 4


def test_too_small_a_gain_on_validation_stops_the_loop():
    result = next_iteration(history(0.5, 0.505), recipe(min_validation_gain=0.01))

    assert isinstance(result, Stop)
    assert result.code == "validation.gain"


def test_generation_zero_has_nothing_to_gain_on():
    assert planned(next_iteration(history(0.5), recipe(min_validation_gain=0.01))).iteration == 1


def test_asking_for_one_iteration_overrides_the_stop_rule():
    result = next_iteration(history(0.5, 0.4), recipe(min_validation_gain=0.01), overrides={"ratio": 5})

    assert planned(result).student.ratio == 5


def test_a_named_teacher_labels_instead_of_the_newest():
    assert planned(next_iteration(history(0.5, 0.4), recipe(), teacher="gen_0")).teacher == "gen_0"


def test_a_teacher_worse_than_the_one_before_is_warned_about():
    assert planned(next_iteration(history(0.5, 0.4), recipe())).warnings


def test_a_wrong_override_is_refused_and_pointed_at():
    with pytest.raises(RecipeError) as refused:
        next_iteration(history(0.5), recipe(), overrides={"noise": {"dropout": 2}})

    assert refused.value.pointer == "/noise/dropout"


def test_without_generation_zero_there_is_nothing_to_plan():
    with pytest.raises(RecipeError):
        next_iteration([], recipe())
