"""Choice of device and precision, and the description of the hardware."""

import time

import pytest
import torch

from gpt2.errors import UserError
from gpt2.runtime import device
from gpt2.runtime.device import (
    Precision,
    auto_without_training,
    choose_device,
    choose_precision,
    cuda_or_fallback,
    fastest_seconds,
    hardware,
    known_peak,
)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla V100S-PCIE-32GB", 130),
        ("Tesla T4", 65),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None),
        ("NVIDIA A10G", None),
        ("Quadro RTX 6000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_peak_flops_by_device_name(name, teraflops):
    assert known_peak(name) == (teraflops and pytest.approx(teraflops * 1e12))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_rejected_and_api_default_falls_back(caplog):
    with pytest.raises(UserError, match="there is no cuda here"):
        choose_device("cuda")
    with caplog.at_level("INFO"):
        assert cuda_or_fallback("cuda") == choose_device("auto")
    assert "no CUDA device" in caplog.text
    with pytest.raises(UserError, match="there is no cuda:7 here"):
        cuda_or_fallback("cuda:7")


@pytest.mark.parametrize("computes", [False, True])
@pytest.mark.parametrize("requested", ["auto", "fp32", "bf16"])
def test_precision_on_a_cpu(requested, computes, monkeypatch):
    monkeypatch.setattr(device, "computes_in_bf16", lambda device: computes)
    precision = choose_precision(requested, torch.device("cpu"))
    assert precision.name == ({False: "fp32", True: "bf16"}[computes] if requested == "auto" else requested)
    assert not precision.scaler().is_enabled()


@pytest.mark.parametrize(
    ("kind", "capability", "emulates"),
    [("cuda", (7, 5), True), ("cuda", (8, 0), False), ("mps", None, False), ("cpu", None, True)],
)
def test_emulated_bf16(kind, capability, emulates, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert Precision("bf16", torch.device(kind)).is_emulated == emulates
    assert not Precision("fp32", torch.device(kind)).is_emulated


@pytest.mark.parametrize("computes", [False, True])
def test_auto_is_exact_without_training_except_on_cuda(computes, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": computes})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if computes else (7, 0))

    def chosen(name: str, kind: str) -> str:
        there = torch.device(kind)
        return choose_precision(auto_without_training(name, there), there).name

    assert [chosen("auto", kind) for kind in ("cpu", "mps", "cuda")] == ["fp32", "fp32", "bf16" if computes else "fp16"]
    assert [chosen("bf16", kind) for kind in ("cpu", "cuda")] == ["bf16", "bf16"]


@pytest.mark.parametrize(
    ("capabilities", "computes"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True),
        ({}, False),
    ],
)
def test_bf16_is_chosen_by_capability_and_never_by_time(capabilities, computes, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(device, "fastest_seconds", None)
    assert choose_precision("auto", torch.device("cpu")).name == ("bf16" if computes else "fp32")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # a PyTorch that emulates bf16
    assert choose_precision("auto", torch.device("cpu")).name == "fp32"


def test_fastest_seconds_alternates_between_functions():
    calls = []
    seconds = fastest_seconds([lambda: calls.append("a"), lambda: (calls.append("b"), time.sleep(2e-3))], repetitions=3)
    assert calls == ["a", "b"] * 4
    assert seconds[0] < seconds[1] and seconds[1] >= 2e-3


def test_fast_functions_are_repeated_for_the_least_time():
    calls = []
    fastest_seconds([lambda: (calls.append(1), time.sleep(1e-3))], repetitions=1, min_seconds=5e-2)
    assert 2 < len(calls) <= 51


def test_hardware_description():
    about = hardware(torch.device("cpu"))
    assert about["device"] == "cpu"
    assert about["cpu"]
    assert min(about["cores"], about["threads"]) >= 1
