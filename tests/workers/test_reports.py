"""What is kept of what an attempt says."""

from __future__ import annotations

from typing import Any

from workers.progress import Reports


def progress(**data: Any) -> dict[str, Any]:
    return {"type": "event", "kind": "progress", "data": data}


def test_a_look_at_validation_is_a_sign_of_life_but_not_the_jobs_progress() -> None:
    reports = Reports()
    reports.take(progress(done=50, total=100, unit="steps"))
    reports.heard_at = 0.0

    reports.take(progress(stage="evaluating", done=256, total=5000, unit="images"))

    assert reports.heard_at > 0
    assert reports.progress is not None
    assert (reports.progress["done"], reports.progress["unit"]) == (50, "steps")
    assert [data["unit"] for _, data in reports.items] == ["steps"]
