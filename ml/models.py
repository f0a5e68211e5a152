"""Networks: built, warm-started, loaded, saved. The only module that opens timm's model side.

A *generation's folder* is timm's `local-dir` layout (config.json + model.safetensors) with preprocessing, class names and
temperature beside it; `timm.create_model("local-dir:FOLDER", pretrained=True)` opens it without this project.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Without it an absent weight costs 46 s of retries. Set before the hub's client is imported, which timm does.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import huggingface_hub.constants
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.drop import DropPath
from timm.models import save_for_hf
from torch import Tensor, nn

from ml.config import ImageConfig, NetworkConfig, NoiseConfig
from ml.errors import DiskFull, RecipeError, WeightsError
from ml.files import FULL
from ml.pixels import Preprocessing
from ml.recipes.architectures import check_architecture

if os.environ["HF_HUB_OFFLINE"] not in ("0", ""):
    # Somebody may have imported the hub's client before, and it looks at its environment only then.
    huggingface_hub.constants.HF_HUB_OFFLINE = True

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# Options that timm would take and that are not the recipe's to give: they load files, or are other fields.
_RESERVED = frozenset(
    (
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "cache_dir"),
        *("scriptable", "exportable", "no_jit", "num_classes", "in_chans", "features_only", "out_indices", "pruned"),
        *("drop_rate", "drop_path_rate", "img_size", "device", "dtype"),
    )
)
# What timm's constructors raise on arguments or image sizes that do not fit; none of them has a class of its own.
_CONSTRUCTION = (TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError, NotImplementedError, ArithmeticError)


class LoadedGeneration(NamedTuple):
    """A generation in memory, ready to label: eval mode, nothing requires a gradient."""

    network: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    temperature: float


def known_architectures() -> list[str]:
    """Every network name of the installed timm, sorted."""
    return sorted(timm.list_models())


def count_parameters(network: nn.Module) -> int:
    """Learned numbers; running statistics are not."""
    return sum(parameter.numel() for parameter in network.parameters())


def undecayed_parameters(network: nn.Module) -> set[str]:
    """Names of parameters that the architecture itself wants no weight decay on."""
    return set(network.no_weight_decay()) if hasattr(network, "no_weight_decay") else set()  # type: ignore[operator]


def skipped_branches(network: nn.Module) -> dict[str, float]:
    """Name and rate of each layer of stochastic depth that skips its branch at all."""
    found = {name: module.drop_prob for name, module in network.named_modules() if isinstance(module, DropPath)}
    return {name: float(rate) for name, rate in found.items() if rate}


def create_network(
    network: NetworkConfig, *, num_classes: int, noise: NoiseConfig, image: ImageConfig, weights_dir: str | None = None
) -> nn.Module:
    """Build the network on the CPU, with its model noise, from scratch or from its initial weights.

    The random part comes from torch's global generator: seed it before. `weights_dir` is the folder that `teacher` or
    `generation:ID` was resolved to. Raises UnknownArchitecture, RecipeError (options or image size that do not fit) or WeightsError.
    """
    check_architecture(network.architecture)
    arguments = _arguments(network, num_classes=num_classes, noise=noise, image=image)
    _check_sizes(network.architecture, arguments, image)
    source = network.initial_weights
    if source is None:
        return timm.create_model(network.architecture, **arguments)
    if source.startswith("timm:"):
        return _pretrained(network.architecture, source.removeprefix("timm:"), arguments)
    built = timm.create_model(network.architecture, **arguments)
    if source.startswith("local-dir:"):
        folder = Path(source.removeprefix("local-dir:"))
        check_links(folder)
        load_weights(built, folder, architecture=network.architecture, new_head=True)
    elif source == "teacher" or source.startswith("generation:"):
        if weights_dir is None:
            raise WeightsError(f"initial weights {source!r} were not resolved to a folder", initial_weights=source)
        load_weights(built, Path(weights_dir), architecture=network.architecture, new_head=False)
    else:
        message = f"initial_weights {source!r} must be timm:NAME.TAG, local-dir:PATH, generation:ID or teacher"
        raise RecipeError(message, pointer="/initial_weights")
    return built


def _arguments(network: NetworkConfig, *, num_classes: int, noise: NoiseConfig, image: ImageConfig) -> dict[str, Any]:
    """What timm.create_model is called with."""
    refused = sorted(_RESERVED & set(network.options))
    if refused:
        message = f"options may not hold {', '.join(refused)}: the recipe has fields of its own for what may be set"
        raise RecipeError(message, pointer=f"/options/{refused[0]}")
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if network.architecture.startswith("tf_efficientnet"):
        # The paper's batch norm. timm sets TensorFlow's epsilon for this family but leaves PyTorch's momentum of 0.1.
        arguments |= {"bn_momentum": 0.01, "bn_eps": 1e-3}
    if noise.dropout:
        arguments["drop_rate"] = noise.dropout
    if noise.stochastic_depth:
        arguments["drop_path_rate"] = noise.stochastic_depth
    pretrained = timm.get_pretrained_cfg(network.architecture)
    if pretrained is not None and pretrained.fixed_input_size:
        arguments["img_size"] = image.size
    return arguments | network.options


def _check_sizes(architecture: str, arguments: dict[str, Any], image: ImageConfig) -> None:
    """Build a twin without memory and show it one batch of each size; RecipeError when it cannot be built or refuses the size."""
    try:
        with torch.device("meta"):
            twin = timm.create_model(architecture, **arguments).eval()
    except _CONSTRUCTION as error:
        raise RecipeError(f"timm cannot build {architecture} with {arguments}: {error}", pointer="/options") from error
    for size in sorted({image.size, image.evaluation_size or image.size}):
        try:
            with torch.inference_mode():
                twin(torch.empty(2, 3, size, size, device="meta"))
        except _CONSTRUCTION as error:
            message = (
                f"{architecture} cannot take images of {size} x {size} pixels: {str(error).splitlines()[0] if str(error) else error!r}"
            )
            raise RecipeError(message, pointer="/image/size", size=size) from error


def _pretrained(architecture: str, name: str, arguments: dict[str, Any]) -> nn.Module:
    """The network with timm's weights of an explicit tag; only the head is new when the classes are not those of the tag."""
    plain, _, tag = name.partition(".")
    if not tag:
        message = f'"timm:{name}" has no tag, and timm\'s default of one name may have been trained on anything: choose one of '
        raise WeightsError(message + ", ".join(timm.list_pretrained(f"{plain}.*")), initial_weights=name)
    if plain != architecture:
        raise WeightsError(f"weights of {plain} do not fit the architecture {architecture}", initial_weights=name)
    if name not in timm.list_pretrained(f"{plain}.*"):
        known = ", ".join(timm.list_pretrained(f"{plain}.*")) or "none"
        raise WeightsError(f"timm has no weights {name!r}; for this architecture it has: {known}", initial_weights=name)
    _refuse_download(name)
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        message = (
            f"the weights {name} are not on this machine and could not be downloaded. Set HF_HUB_OFFLINE=0 where the hub can be reached, "
            f"or put the files into a folder and use local-dir:PATH ({type(error).__name__})"
        )
        raise WeightsError(message, initial_weights=name) from error


def _refuse_download(name: str) -> None:
    """Raise at once for weights that timm would fetch from a plain address while downloads are off: it would try for long."""
    entry = timm.get_pretrained_cfg(name)
    if os.environ["HF_HUB_OFFLINE"] in ("0", "") or entry is None or entry.hf_hub_id or not entry.url:
        return
    if not (Path(torch.hub.get_dir()) / "checkpoints" / str(entry.url).rpartition("/")[2]).exists():
        raise WeightsError(f"the weights {name} are not on this machine and downloads are off (HF_HUB_OFFLINE=1)", initial_weights=name)


def load_weights(network: nn.Module, folder: Path, *, architecture: str, new_head: bool) -> None:
    """Copy the weights of timm's folder `folder` into `network`; WeightsError unless every tensor fits.

    `new_head` keeps the network's own classifier where the folder's is for other classes.
    """
    config = read_config(folder)
    if config.get("architecture") != architecture:
        message = f"{folder} holds {config.get('architecture')}, the recipe asks for {architecture}: only equal architectures share weights"
        raise WeightsError(message, folder=str(folder))
    tensors = read_tensors(folder)
    own = network.state_dict()
    if new_head:
        head = _head_prefixes(network)
        foreign = {key for key in tensors if key.startswith(head) and key in own and own[key].shape != tensors[key].shape}
        tensors |= {key: own[key] for key in foreign}
    wrong = sorted(set(own) ^ set(tensors)) or sorted(key for key in own if own[key].shape != tensors[key].shape)
    if wrong:
        message = f"the weights in {folder} do not fit {architecture}: {len(wrong)} tensors differ, first {', '.join(wrong[:3])}"
        raise WeightsError(message, folder=str(folder), tensors=wrong[:20])
    network.load_state_dict(tensors)


def check_links(folder: Path) -> None:
    """WeightsError when a file in a folder that somebody named is a link to outside of it: who allowed the folder did not allow that."""
    inside = folder.resolve()
    for path in (folder / name for name in (CONFIG, WEIGHTS, "class_names.json", "preprocessing.json", "calibration.json")):
        if not path.resolve().is_relative_to(inside):
            raise WeightsError(f"{path} is a link that leads out of its folder; put the file itself there", folder=str(folder))


def _head_prefixes(network: nn.Module) -> tuple[str, ...]:
    names = network.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The safetensors in `folder`; WeightsError when they are absent or damaged. Pickles are never opened."""
    path = folder / WEIGHTS
    if not path.is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")) if folder.is_dir() else []
        found = f"; {', '.join(others)} is not opened, because a pickle can run code" if others else ""
        raise WeightsError(f"{folder} has no {WEIGHTS}{found}", folder=str(folder), refused=others)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is damaged or no safetensors file: {error}", folder=str(folder)) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of timm in `folder`; WeightsError when it is absent or unreadable."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} has no readable {CONFIG}: {error}", folder=str(folder)) from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise WeightsError(f"{folder / CONFIG} does not name an architecture", folder=str(folder))
    return config


def load_network(folder: Path) -> nn.Module:
    """The network of timm's folder `folder` on the CPU, in eval mode, without gradients and without model noise."""
    config = read_config(folder)
    check_architecture(config["architecture"])
    arguments = {key: value for key, value in config.get("model_args", {}).items() if key not in _RESERVED - {"img_size", "in_chans"}}
    try:
        network = timm.create_model(config["architecture"], **(arguments | {"num_classes": config["num_classes"]}))
    except (*_CONSTRUCTION, KeyError) as error:
        raise WeightsError(f"timm cannot build the network that {folder / CONFIG} describes: {error}", folder=str(folder)) from error
    load_weights(network, folder, architecture=config["architecture"], new_head=False)
    return network.eval().requires_grad_(requires_grad=False)


def load_generation(folder: Path, device: torch.device) -> LoadedGeneration:
    """An exported generation on `device`; WeightsError when its folder is incomplete or damaged."""
    network = load_network(folder)
    try:
        preprocessing = Preprocessing.from_dict(json.loads((folder / "preprocessing.json").read_text(encoding="utf-8")))
        class_names = tuple(json.loads((folder / "class_names.json").read_text(encoding="utf-8")))
        temperature = float(json.loads((folder / "calibration.json").read_text(encoding="utf-8"))["temperature"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder} is no exported generation: {error}", folder=str(folder)) from error
    network = network.to(device=device).to(memory_format=torch.channels_last)
    return LoadedGeneration(network, preprocessing, class_names, temperature)


def save_network(network: nn.Module, folder: Path, *, class_names: Sequence[str], preprocessing: Preprocessing) -> None:
    """Write timm's layout (config.json, model.safetensors) into `folder`; DiskFull when there is no room."""
    data_config = {
        "input_size": (3, preprocessing.size, preprocessing.size),
        "interpolation": preprocessing.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "crop_pct": 1.0 if preprocessing.small_images else preprocessing.crop_ratio,
        "crop_mode": "squash" if preprocessing.small_images else "center",
    }
    # safetensors takes contiguous tensors only.
    network = network.to(memory_format=torch.contiguous_format)
    # The architecture's default tag and license are those of weights that these are not.
    model_config = {"label_names": list(class_names), "pretrained_cfg": {"tag": None, "license": None}}
    try:
        save_for_hf(network, str(folder), model_config, safe_serialization=True, data_config=data_config)
    except SafetensorError as error:
        if any(f"os error {number})" in str(error) for number in FULL):
            raise DiskFull(f"no room left for {folder / WEIGHTS}: free some space and try again", path=str(folder)) from error
        raise
