"""Label one shard of a pool with one generation, without noise."""

from __future__ import annotations

from dataclasses import replace

from ml.config import LabelingConfig
from ml.tasks import LabelingTask
from ml.validation import build, to_dict
from workers.jobs import Made, Work
from workers.jobs.runtime import settle_runtime


def run(work: Work) -> Made:
    """Input: generation (folder), unlabeled (manifest), start, stop, labeling, runtime."""
    runtime = settle_runtime(work)
    from ml.prediction import label

    labeling = build(LabelingConfig, work.input["labeling"])
    if work.halve_micro_batch:
        labeling = replace(labeling, batch_size=max(1, labeling.batch_size // 2))
    output = work.directory / "shard.parquet"
    task = LabelingTask(
        generation=work.input["generation"],
        unlabeled=work.input["unlabeled"],
        start=work.input["start"],
        stop=work.input["stop"],
        labeling=labeling,
        runtime=runtime,
        output=str(output),
    )
    made = label(task, work.on_event, work.should_stop)
    # What the bits depend on beside the images and the network: whoever wants the same ones may take these over.
    return Made(files={output.name: output}, result=made | {"runtime": to_dict(runtime), "halved": work.halve_micro_batch})
