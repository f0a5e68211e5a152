from __future__ import annotations

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from ml.config import NoiseConfig, Recipe
from ml.errors import RecipeError, UnknownArchitecture
from ml.recipes import PRESETS, build_recipe, get_recipe
from ml.validation import build, from_json, to_dict, to_json


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str):
    recipe = get_recipe(name)

    assert from_json(Recipe, to_json(recipe)) == recipe


@pytest.mark.parametrize("name", PRESETS)
def test_pydantic_and_the_plain_checker_read_the_same_recipe(name: str):
    text = to_json(get_recipe(name))

    assert TypeAdapter(Recipe).validate_json(text, strict=True) == from_json(Recipe, text)


@pytest.mark.parametrize(
    ("overrides", "pointer"),
    [
        ({"sed": 1}, "/sed"),
        ({"seed": -1}, "/seed"),
        ({"seed": True}, "/seed"),
        ({"seed": 1.5}, "/seed"),
        ({"teacher": {"noise": {"dropout": 1.0}}}, "/teacher/noise/dropout"),
        ({"teacher": {"noise": {"dropout": float("nan")}}}, "/teacher/noise/dropout"),
        ({"students": [{"ratio": "three"}]}, "/students/0/ratio"),
        ({"students": []}, "/students"),
        ({"students": [{"network": {"architecture": "resnet5000"}}]}, "/students/0/network/architecture"),
        ({"teacher": {"network": {"initial_weights": "timm:tf_efficientnet_b0"}}}, "/teacher/network/initial_weights"),
        ({"teacher": {"training": {"epochs": 1, "steps": 1}}}, "/teacher/training/epochs"),
        ({"image": {"size": 0}}, "/image/size"),
        ({"image": {"std": [0.2, 0.2, 0.0]}}, "/image/std"),
        ({"image": {"std": [0.2, 0.2]}}, "/image/std"),
        ({"selection": {"cap_per_class": "biggest"}}, "/selection/cap_per_class"),
        ({"selection": {"min_confidence": 0.5, "max_confidence": 0.4}}, "/selection/max_confidence"),
    ],
)
def test_a_wrong_field_is_refused_and_pointed_at(overrides: dict[str, object], pointer: str):
    with pytest.raises(RecipeError) as refused:
        build_recipe("digits", overrides)

    assert refused.value.pointer == pointer


@pytest.mark.parametrize("text", ['{"seed": 1, "seed": 2}', '{"seed": NaN}', '{"seed": Infinity}', "{", '"digits"', "[" * 100_000])
def test_json_that_means_two_things_or_nothing_is_refused(text: str):
    with pytest.raises(RecipeError):
        from_json(Recipe, text)


def test_pydantic_refuses_what_the_plain_checker_refuses():
    data = to_dict(get_recipe("digits"))
    data["teacher"]["noise"]["dropout"] = 1.5

    with pytest.raises(ValidationError):
        TypeAdapter(Recipe).validate_json(json.dumps(data), strict=True)
    with pytest.raises(RecipeError):
        from_json(Recipe, json.dumps(data))


def test_an_override_changes_one_number_of_one_student():
    recipe = build_recipe("digits", {"students": [{}, {"ratio": 1}]})

    assert [student.ratio for student in recipe.students] == [3, 1]
    assert recipe.students[0] == get_recipe("digits").students[0]


def test_naming_epochs_drops_the_presets_steps():
    training = build_recipe("digits", {"teacher": {"training": {"epochs": 2}}}).teacher.training

    assert (training.epochs, training.steps) == (2, None)


def test_an_unknown_architecture_comes_with_the_closest_names():
    with pytest.raises(UnknownArchitecture, match="resnet50"):
        build_recipe(None, {"teacher": {"network": {"architecture": "resnet5O"}}})


def test_the_papers_table_is_complete():
    rows = {
        name: (
            recipe.image.size,
            recipe.students[0].noise.dropout,
            recipe.students[0].noise.randaugment_magnitude * (recipe.students[0].noise.randaugment_operations > 0),
            tuple(student.ratio for student in recipe.students),
            recipe.students[0].training.epochs,
        )
        for name, recipe in ((name, get_recipe(f"paper-{name}")) for name in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "l2"))
    }

    assert rows == {
        "b0": (224, 0.2, 0, (1,), 700),
        "b1": (240, 0.2, 0, (3,), 700),
        "b2": (260, 0.3, 6, (3,), 700),
        "b3": (300, 0.3, 12, (3,), 700),
        "b4": (380, 0.4, 15, (3,), 700),
        "b5": (456, 0.4, 18, (3,), 350),
        "b6": (528, 0.5, 24, (3,), 350),
        "b7": (600, 0.5, 27, (3,), 350),
        "l2": (475, 0.5, 27, (14, 14, 28), 350),
    }


def test_the_papers_learning_rate_scales_with_the_labeled_batch_alone():
    training = get_recipe("paper-b7").students[0].training

    scaled = training.optimizer.learning_rate * training.batch_size / (training.optimizer.reference_batch or 0)

    assert scaled == pytest.approx(0.128)


def test_every_knob_is_documented_in_the_schema():
    schema = TypeAdapter(Recipe).json_schema()

    bare = [
        f"{name}.{field}"
        for name, definition in {**schema["$defs"], "Recipe": schema}.items()
        for field, facts in definition.get("properties", {}).items()
        if "description" not in facts
    ]
    assert bare == []


def test_a_config_cannot_be_changed_after_it_was_checked():
    noise = NoiseConfig()

    with pytest.raises(AttributeError):
        noise.dropout = 2.0  # type: ignore[misc]
    assert noise == NoiseConfig()


def test_a_field_in_the_wrong_place_is_told_its_right_one() -> None:
    with pytest.raises(RecipeError, match="there is /teacher/training/batch_size and /students/0/training/batch_size"):
        build(Recipe, {"batch_size": 3})
    with pytest.raises(RecipeError, match=r"unknown field /teacher/batch_size; there is /teacher/training/batch_size$"):
        build(Recipe, {"teacher": {"batch_size": 3}})
