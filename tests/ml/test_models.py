"""Networks from names, tags, folders; what timm would do by itself and must not."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from ml.config import ImageConfig, NetworkConfig, NoiseConfig
from ml.errors import RecipeError, UnknownArchitecture, WeightsError
from ml.models import count_parameters, create_network, known_architectures, load_network, save_network
from ml.pixels import Preprocessing
from ml.recipes.architectures import architectures, check_architecture

SMALL = ImageConfig(size=32, small_images=True)


def build(architecture: str = "test_resnet", *, image: ImageConfig = SMALL, num_classes: int = 4, **fields: object) -> nn.Module:
    weights_dir = fields.pop("weights_dir", None)
    noise = fields.pop("noise", NoiseConfig())
    network = NetworkConfig(architecture=architecture, **fields)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return create_network(network, num_classes=num_classes, noise=noise, image=image, weights_dir=weights_dir)  # type: ignore[arg-type]


def save(network: nn.Module, folder: Path, class_names: tuple[str, ...] = ("a", "b", "c", "d")) -> Path:
    folder.mkdir()
    save_network(network, folder, class_names=class_names, preprocessing=Preprocessing.from_config(SMALL))
    return folder


def test_the_shipped_list_of_architectures_is_timms() -> None:
    assert sorted(architectures()) == known_architectures()


def test_an_unknown_architecture_is_answered_with_the_closest_names() -> None:
    with pytest.raises(UnknownArchitecture, match="efficientnet_b0") as caught:
        check_architecture("eficientnet_b0")

    assert "efficientnet_b0" in caught.value.details["suggestions"]


def test_a_tag_in_the_architecture_is_sent_to_where_it_belongs() -> None:
    with pytest.raises(UnknownArchitecture, match=r'"timm:resnet50\.a1_in1k"'):
        check_architecture("resnet50.a1_in1k")


def test_only_tensorflow_flavoured_efficientnets_get_the_papers_batch_norm() -> None:
    def batch_norms(architecture: str) -> set[tuple[float, float]]:
        network = build(architecture, image=ImageConfig(size=64))
        return {(m.momentum, m.eps) for m in network.modules() if isinstance(m, nn.BatchNorm2d)}

    assert batch_norms("tf_efficientnet_b0") == {(0.01, 1e-3)}
    assert batch_norms("efficientnet_b0") == {(0.1, 1e-5)}


def test_dropout_and_stochastic_depth_reach_the_network() -> None:
    network = build("tf_efficientnet_b0", image=ImageConfig(size=64), noise=NoiseConfig(dropout=0.4, stochastic_depth=0.2))

    rates = [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]
    assert network.drop_rate == 0.4
    # Linear from 0 at the first block; the blocks without a shortcut have none to drop.
    assert rates == sorted(rates)
    assert max(rates) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(("architecture", "size"), [("test_vit", 8), ("vit_tiny_patch16_224", 8)])
def test_an_impossible_image_size_is_a_recipe_error(architecture: str, size: int) -> None:
    with pytest.raises(RecipeError, match=f"{size} x {size}|cannot build"):
        build(architecture, image=ImageConfig(size=size, small_images=True))


def test_a_network_of_fixed_size_is_built_for_the_recipes_size() -> None:
    assert build("test_vit").eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_options_that_fit_are_passed_on_and_others_refused() -> None:
    assert count_parameters(build(options={"stem_width": 8})) != count_parameters(build())
    with pytest.raises(RecipeError, match="bananas"):
        build(options={"bananas": 3})
    with pytest.raises(RecipeError, match="checkpoint_path"):
        build(options={"checkpoint_path": "/etc/passwd"})


@pytest.mark.parametrize(
    "source", ["timm:test_resnet", "timm:test_resnet.no_such_tag", "timm:resnet10t.c3_in1k", "timm:test_resnet.r160_in1k"]
)
def test_weights_that_cannot_be_had_are_refused_within_seconds(source: str) -> None:
    started = time.monotonic()

    with pytest.raises(WeightsError):
        build(initial_weights=source)

    assert time.monotonic() - started < 5


def test_an_untagged_name_is_answered_with_the_tags_there_are() -> None:
    with pytest.raises(WeightsError, match=r"tf_efficientnet_b0\.ns_jft_in1k"):
        build("tf_efficientnet_b0", image=ImageConfig(size=64), initial_weights="timm:tf_efficientnet_b0")


def test_a_saved_network_comes_back_here_and_in_timm_to_the_bit(tmp_path: Path) -> None:
    network = build(noise=NoiseConfig(dropout=0.3), options={"stem_width": 8}).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(3, 3, 32, 32)
    folder = save(network, tmp_path / "saved")

    ours = load_network(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    expected = network.eval()(images)
    assert torch.equal(ours(images), expected)
    assert torch.equal(theirs(images), expected)
    assert theirs.pretrained_cfg["label_names"] == ["a", "b", "c", "d"]
    assert ours.drop_rate == 0


def test_a_local_folder_with_other_classes_gives_everything_but_the_head(tmp_path: Path) -> None:
    source = build()
    folder = save(source, tmp_path / "saved")

    network = build(num_classes=7, initial_weights=f"local-dir:{folder}")

    theirs, ours = source.state_dict(), network.state_dict()
    assert ours["fc.weight"].shape == (7, theirs["fc.weight"].shape[1])
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("fc."))


def test_a_local_folder_whose_weights_are_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = save(build(), tmp_path / "saved")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")

    with pytest.raises(WeightsError, match="leads out of its folder"):
        build(initial_weights=f"local-dir:{folder}")


def test_a_generation_warms_up_a_student_of_the_same_architecture_only(tmp_path: Path) -> None:
    torch.manual_seed(5)
    folder = str(save(timm.create_model("test_resnet", num_classes=4), tmp_path / "saved"))

    warm = build(initial_weights="teacher", weights_dir=folder)

    assert torch.equal(warm.state_dict()["fc.weight"], load_network(Path(folder)).state_dict()["fc.weight"])
    with pytest.raises(WeightsError, match="only equal architectures"):
        build("resnet10t", initial_weights="generation:g_1", weights_dir=folder)
    with pytest.raises(WeightsError, match="do not fit"):
        build(num_classes=5, initial_weights="teacher", weights_dir=folder)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    folder = save(build(), tmp_path / "saved")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))

    with pytest.raises(WeightsError, match=r"pytorch_model\.bin is not opened"):
        load_network(folder)

    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all"])
def test_damaged_safetensors_are_named_as_such(tmp_path: Path, damage: bytes) -> None:
    folder = save(build(), tmp_path / "saved")
    (folder / "model.safetensors").write_bytes(damage)

    with pytest.raises(WeightsError, match="damaged"):
        load_network(folder)


def test_a_config_that_describes_another_network_is_noticed(tmp_path: Path) -> None:
    folder = save(build(), tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "resnet10t"}))

    with pytest.raises(WeightsError, match="do not fit"):
        load_network(folder)
