"""Data distillation: the teacher's guess is the mean over its views, and how many of them agree is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ml import pseudo_labels
from ml.averaging import AveragedViews, is_plain, views_of
from ml.config import LabelingConfig, ViewsConfig
from ml.errors import RecipeError
from ml.models import load_generation
from ml.prediction import label
from tests.ml import builders_images as images
from tests.ml.builders_generations import build_generation
from tests.ml.test_layouts import build_task

MANY = ViewsConfig(flip=True, zooms=(1.0, 0.75), corners=True)


def build_batch() -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def build_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()


def test_a_guess_is_the_mean_of_what_the_network_says_of_each_view() -> None:
    network, batch = build_network(), build_batch()

    with torch.no_grad():
        found = AveragedViews(network, MANY, temperature=2.0)(batch)
        each = torch.stack([torch.softmax(network(view) / 2.0, -1) for view in views_of(batch, MANY)])

    torch.testing.assert_close(found[:, :4].exp(), each.mean(0))
    expected = [(each[:, m].argmax(-1) == each.mean(0)[m].argmax()).float().mean().item() for m in range(3)]
    assert found[:, 4].tolist() == pytest.approx(expected)


def test_views_are_the_whole_and_its_parts_each_with_its_mirror_image() -> None:
    batch = build_batch()

    views = views_of(batch, MANY)

    assert len(views) == 2 * (1 + 5)
    assert {view.shape for view in views} == {batch.shape}
    assert torch.equal(views[0], batch)
    for plain, mirrored in zip(views[::2], views[1::2], strict=True):
        assert torch.equal(mirrored, plain.flip(-1))
    # A part keeps the colors of its place: the corner at the top left is about the mean of its six by six pixels.
    torch.testing.assert_close(views[4].mean((-1, -2)), batch[..., :6, :6].mean((-1, -2)), atol=0.05, rtol=0)


def test_one_view_that_is_whole_is_the_weak_view() -> None:
    batch = build_batch()

    assert is_plain(ViewsConfig())
    assert not is_plain(ViewsConfig(zooms=(0.9,)))
    assert not is_plain(ViewsConfig(flip=True))
    [only] = views_of(batch, ViewsConfig(corners=True))
    assert torch.equal(only, batch)


def test_a_shard_keeps_the_mean_and_the_agreement(tmp_path: Path) -> None:
    build_generation(tmp_path / "generation")
    images.write_flat_folder(tmp_path / "pool", 5)
    (tmp_path / "pool" / "broken.png").write_bytes(b"no image")
    task = build_task(tmp_path, str(tmp_path / "pool"), labeling=LabelingConfig(views=MANY))

    summary = label(task)

    table = pseudo_labels.read_shard(task.output)
    assert summary["facts"]["views"] == {"flip": True, "zooms": [1.0, 0.75], "corners": True}
    assert [value is None for value in table["agreement"].to_pylist()] == [status != "ok" for status in table["status"].to_pylist()]
    agreement = np.array([value for value in table["agreement"].to_pylist() if value is not None])
    assert ((agreement >= 1 / 12 - 1e-3) & (agreement <= 1)).all()
    assert label(task)["skipped"]
    generation = load_generation(tmp_path / "generation", torch.device("cpu"))
    assert pseudo_labels.dense_probs(table, len(generation.class_names)).shape[1] == len(generation.class_names)


def test_a_shard_of_one_view_has_no_agreement(tmp_path: Path) -> None:
    build_generation(tmp_path / "generation")
    images.write_flat_folder(tmp_path / "pool", 2)
    task = build_task(tmp_path, str(tmp_path / "pool"))

    label(task)

    assert "agreement" not in pseudo_labels.read_shard(task.output).column_names


@pytest.mark.parametrize(("zooms", "message"), [((), "zooms"), ((0.1,), "0.1 must be"), ((2.0,), "2.0 must be")])
def test_views_that_cannot_be_are_refused(zooms: tuple[float, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        ViewsConfig(zooms=zooms)
