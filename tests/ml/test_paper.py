"""The paper's recipe, built and stepped: its own optimizer, schedule, average and noise on a network of its own size."""

from __future__ import annotations

from pathlib import Path

import torch

from ml.events import Event, never
from ml.recipes import build_recipe
from ml.training import Training
from ml.training_inputs import gather
from tests.ml.builders_training import teacher_task, write_digits


def test_paper_b0_is_built_and_makes_two_steps(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "data")
    small = {"steps": 2, "epochs": None, "batch_size": 8, "evaluate_every_steps": 2}
    recipe = build_recipe("paper-b0", {"image": {"size": 64}, "teacher": {"training": small}})
    events: list[Event] = []
    task = teacher_task(data, recipe)
    training = Training(task, gather(task), tmp_path / "work", events.append, never)
    before = {name: weight.clone() for name, weight in training.learner.network.state_dict().items()}

    training.run()

    assert training.num_parameters > 4_000_000
    assert type(training.learner.optimizer).__name__ == "RMSpropTF"
    moved = [name for name, weight in training.learner.network.named_parameters() if not torch.equal(weight, before[name])]
    assert len(moved) > 0.9 * len(list(training.learner.network.parameters()))
    assert [event.data["step"] for event in events if event.kind == "metric" and "validation_top1" in event.data] == [2]
