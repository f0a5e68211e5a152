"""On what the tensors live: the processor's answers to `auto`, its threads, its precision, its memory.

The bits of a training depend on the number of threads and on the precision, so both are resolved once, recorded with
the run, and applied unchanged by every later attempt.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ml.config import RuntimeConfig
from ml.cores import num_cores
from ml.errors import OutOfMemory, RecipeError
from ml.runtimes import cpu_facts, resolve_on_cpu

_MOST_WORKERS = 12

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES = 2**30


def resolve_runtime(runtime: RuntimeConfig) -> RuntimeConfig:
    """The same runtime without `auto` and without 0 threads; RecipeError when CUDA is asked for and absent."""
    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return resolve_on_cpu(runtime)
    if not torch.cuda.is_available():
        raise RecipeError("device cuda is asked for, but this machine has none; use auto or cpu", pointer="/runtime/device")
    precision = runtime.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    workers = runtime.num_loader_workers
    if workers == "auto":
        workers = min(num_cores() - 1, _MOST_WORKERS)
    # What the host computes beside an accelerator is small, and threads for it would only wait for the loader's workers.
    return replace(runtime, device=device, precision=precision, num_threads=runtime.num_threads or 1, num_loader_workers=workers)


def apply_runtime(runtime: RuntimeConfig) -> torch.device:
    """Give torch the resolved runtime's threads and true fp32; return the device to put tensors on."""
    torch.set_num_threads(runtime.num_threads)
    _keep_freed_memory()
    if runtime.device == "cuda":
        # fp32 means fp32: evaluation and labeling are compared with the exported artifact, and TF32 would move them.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(runtime.device)


@cache
def _keep_freed_memory() -> None:
    """Let the C library keep what tensors of one step leave for those of the next, where it is glibc.

    It gives large blocks back to the system at once and asks for them again in the next step, page by page: on two cores
    that was a tenth of a small network's training, and in that trial the most that was held stayed the same.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    # Before glibc 2.35 the first threshold may not be more than 32 MB; the second alone would make matters worse.
    if set_option(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES) or set_option(_M_MMAP_THRESHOLD, 2**25):
        set_option(_M_TRIM_THRESHOLD, _LARGEST_KEPT_BYTES)


def autocast(runtime: RuntimeConfig) -> AbstractContextManager[Any]:
    """The block in which a forward pass runs in the runtime's precision; the weights stay fp32."""
    if runtime.precision == "bf16":
        return torch.autocast(runtime.device, dtype=torch.bfloat16)
    return nullcontext()


def shield_small_convolutions(network: nn.Module, runtime: RuntimeConfig, *, side: int) -> None:
    """Let the convolutions that bf16 gets wrong on CPUs train in fp32; to be called before a training in that precision.

    torch 2.15 (oneDNN) leaves the bf16 gradient of a kernel's weights uninitialized where padding keeps them from ever
    touching the image, as in a 3 x 3 kernel with stride 2 on 1 x 1 pixels: NaN or, worse, garbage. Networks on 16-pixel
    images have such layers, and they are so small that fp32 costs nothing. `side` is that of the training images.
    """
    if runtime.device != "cpu" or runtime.precision != "bf16":
        return
    found: set[nn.Conv2d] = set()

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(layer, nn.Conv2d) and _has_idle_weights(layer, inputs[0].shape[-2:]):
            found.add(layer)

    handles = [layer.register_forward_pre_hook(look) for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    mode = network.training
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, side, side))
    network.train(mode)
    for handle in handles:
        handle.remove()
    for layer in found:
        layer.forward = _in_fp32(layer.forward)  # type: ignore[method-assign, assignment]


def _has_idle_weights(layer: nn.Conv2d, shape: Sequence[int]) -> bool:
    """Whether some row or column of the kernel meets nothing but padding, wherever the kernel stands."""
    for size, kernel, stride, padding, dilation in zip(
        shape, layer.kernel_size, layer.stride, _paddings(layer), layer.dilation, strict=True
    ):
        places = range((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
        for tap in range(kernel):
            if not any(0 <= place * stride + tap * dilation - padding < size for place in places):
                return True
    return False


def _paddings(layer: nn.Conv2d) -> tuple[int, ...]:
    """Rows and columns of padding; layers that say it in words ("same") pad by half a kernel at most."""
    return tuple(kernel // 2 for kernel in layer.kernel_size) if isinstance(layer.padding, str) else tuple(layer.padding)


def _in_fp32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def in_fp32(images: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(images.float())

    return in_fp32


@contextmanager
def translate_oom(what: str) -> Iterator[None]:
    """Raise OutOfMemory instead of what the device's or the host's allocator raises; `what` says what was being done."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the device has not enough memory for {what}; a smaller micro-batch may help", what=what) from error
    except MemoryError as error:
        raise OutOfMemory(f"the host has not enough memory for {what}", what=what) from error
    except RuntimeError as error:
        # The CPU allocator has no class of its own for it.
        if "DefaultCPUAllocator" in str(error) or "can't allocate memory" in str(error):
            raise OutOfMemory(f"the host has not enough memory for {what}; a smaller micro-batch may help", what=what) from error
        raise


def host_facts(runtime: RuntimeConfig) -> dict[str, Any]:
    """What the lineage records about the machine: two trainings with equal facts end with equal bits."""
    facts: dict[str, Any] = {
        "processor": cpu_facts()["model"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": runtime.device,
        "precision": runtime.precision,
        "num_threads": runtime.num_threads,
        "compile": runtime.compile,
    }
    if runtime.device == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts
