"""What `auto` becomes, and whose error an exhausted memory is."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch

import ml.devices
import ml.runtimes
from ml.config import RuntimeConfig
from ml.cores import num_cores
from ml.devices import apply_runtime, autocast, host_facts, resolve_runtime, shield_small_convolutions, translate_oom
from ml.errors import OutOfMemory, RecipeError


def test_a_resolved_runtime_leaves_nothing_to_choose() -> None:
    resolved = resolve_runtime(RuntimeConfig())

    assert resolved.device in ("cpu", "cuda")
    assert resolved.precision in ("bf16", "fp32")
    assert resolved.num_threads >= 1
    assert isinstance(resolved.num_loader_workers, int)
    assert resolve_runtime(resolved) == resolved


def test_what_is_given_stays_as_it_is() -> None:
    given = RuntimeConfig(device="cpu", precision="fp32", num_threads=3, num_loader_workers=0)

    assert resolve_runtime(given) == given


def test_on_a_cpu_the_network_gets_every_core_and_one_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ml.runtimes, "num_cores", lambda: 8)

    resolved = resolve_runtime(RuntimeConfig(device="cpu"))

    assert (resolved.num_threads, resolved.num_loader_workers) == (8, 1)


def test_beside_cuda_the_host_has_one_thread_so_that_loaders_keep_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ml.devices, "num_cores", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: not including_emulation)

    resolved = resolve_runtime(RuntimeConfig(device="auto"))

    assert resolved == RuntimeConfig(device="cuda", precision="bf16", num_threads=1, num_loader_workers=12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused_at_its_field() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_runtime(RuntimeConfig(device="cuda"))

    assert caught.value.pointer == "/runtime/device"


def test_applying_a_runtime_sets_the_threads_that_the_bits_depend_on() -> None:
    before = torch.get_num_threads()
    try:
        apply_runtime(RuntimeConfig(device="cpu", precision="fp32", num_threads=1))

        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_autocast_computes_in_bf16_only_when_asked() -> None:
    layer, images = torch.nn.Linear(4, 4), torch.ones(2, 4)

    with autocast(RuntimeConfig(device="cpu", precision="bf16")):
        assert layer(images).dtype == torch.bfloat16
    with autocast(RuntimeConfig(device="cpu", precision="fp32")):
        assert layer(images).dtype == torch.float32


@pytest.mark.parametrize(("side", "kernel", "stride"), [(1, 3, 2), (1, 5, 1), (2, 7, 1), (1, 7, 2)])
def test_a_convolution_on_images_smaller_than_its_kernel_trains_right_in_bf16(side: int, kernel: int, stride: int) -> None:
    """Fails without the shield on processors with bf16, because torch 2.15 leaves these gradients uninitialized."""
    runtime = RuntimeConfig(device="cpu", precision="bf16", num_threads=1)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 320, kernel, stride=stride, padding=kernel // 2, bias=False)
    exact = copy.deepcopy(layer)
    images = torch.randn(24, 3, side, side)

    shield_small_convolutions(layer, runtime, side=side)
    for _ in range(3):
        # What lies in freed memory is what an uninitialized gradient would show.
        torch.full((1 << 20,), torch.nan)
        with autocast(runtime):
            layer(images).square().sum().backward()
    exact(images).square().sum().mul(3).backward()

    assert layer.weight.grad is not None
    assert exact.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, exact.weight.grad, rtol=1e-3, atol=1e-3)


def test_the_shield_leaves_other_convolutions_in_bf16() -> None:
    runtime = RuntimeConfig(device="cpu", precision="bf16", num_threads=1)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, stride=2, padding=1)).train()

    shield_small_convolutions(network, runtime, side=8)

    assert network.training
    with autocast(runtime):
        assert network(torch.zeros(1, 3, 8, 8)).dtype == torch.bfloat16


def test_an_allocation_that_cannot_be_had_is_named_as_such() -> None:
    with pytest.raises(OutOfMemory, match="a batch of 9 images"), translate_oom("a batch of 9 images"):
        torch.empty(2**62, dtype=torch.uint8)


def test_another_runtime_error_passes_untouched() -> None:
    with pytest.raises(RuntimeError, match="shape"), translate_oom("anything"):
        raise RuntimeError("shape mismatch")


def test_host_facts_are_json_and_name_what_decides_the_bits() -> None:
    facts = json.loads(json.dumps(host_facts(RuntimeConfig(device="cpu", precision="fp32", num_threads=2))))

    assert facts["num_threads"] == 2
    assert facts["torch"] == torch.__version__
    assert facts["processor"]


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
