"""The README.md of an exported generation: what it is, how it was made, how good it is, how to open it without this project."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_HOW_TO_LOAD = """## How to load it

With [timm](https://github.com/huggingface/pytorch-image-models), from this folder:

```python
import timm, torch
network = timm.create_model("local-dir:.", pretrained=True).eval()
probs = torch.softmax(network(images), dim=-1)
```

With ONNX Runtime alone:

```python
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(None, {"images": images})
```

`images` is float32 [batch, 3, size, size]: RGB levels divided by 255, minus the mean, divided by the standard deviation,
after the resize and crop of `preprocessing.json`. Divide the logits by the temperature before the softmax for calibrated
probabilities. `class_names.json` names the outputs in their order.
"""


def model_card(
    metrics: dict[str, Any], *, class_names: Sequence[str], preprocessing: dict[str, Any], temperature: float, lineage: dict[str, Any]
) -> str:
    """The card as Markdown."""
    shown = ", ".join(class_names[:20]) + (f", ... ({len(class_names)} in all)" if len(class_names) > 20 else "")
    sections = [
        f"# {metrics['architecture']}, {_kind(metrics)}",
        f"{metrics['num_parameters']:,} parameters. Classes: {shown}.",
        _accuracy(metrics),
        _training(metrics),
        _HOW_TO_LOAD,
        _json_section("Preprocessing", preprocessing | {"temperature": temperature}),
        _json_section("ONNX Runtime against torch", metrics["onnx_parity"]),
    ]
    if lineage:
        sections.append(_json_section("Lineage", lineage))
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _kind(metrics: dict[str, Any]) -> str:
    role = metrics["role"]
    return f"{role} of iteration {metrics['iteration']}" if metrics.get("iteration") else str(role)


def _accuracy(metrics: dict[str, Any]) -> str:
    rows = [_accuracy_row(split, metrics[split]) for split in ("validation", "test") if metrics.get(split)]
    if not rows:
        return ""
    head = "| split | images | top-1 | 95 % interval | NLL | ECE |\n| --- | --- | --- | --- | --- | --- |\n"
    note = "\n\nValidation chose the checkpoint and the temperature; test only reports."
    return "## Accuracy\n\n" + head + "\n".join(rows) + note


def _accuracy_row(split: str, measured: dict[str, Any]) -> str:
    low, high = measured["interval"]
    interval = f"{low:.2%} to {high:.2%}"
    return f"| {split} | {measured['num_images']} | {measured['top1']:.2%} | {interval} | {measured['nll']:.4f} | {measured['ece']:.4f} |"


def _training(metrics: dict[str, Any]) -> str:
    if "steps" not in metrics:
        return ""
    length = f"{metrics['steps']:,} steps over {metrics['images_seen']:,} images in {metrics['training_seconds']:.0f} s"
    best = f"the averaged weights after step {metrics['best_step']:,} were best on validation"
    lines = [f"{length}; {best}.", *(f"- Warning: {warning}" for warning in metrics.get("warnings", []))]
    return "## Training\n\n" + "\n".join(lines) + "\n\n" + _json_block(metrics["host"])


def _json_section(title: str, data: Any) -> str:
    return f"## {title}\n\n{_json_block(data)}"


def _json_block(data: Any) -> str:
    return f"```json\n{json.dumps(data, indent=2, default=str)}\n```"
