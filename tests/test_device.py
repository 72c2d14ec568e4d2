"""What the hardware is: told right, or told to be unknown."""

import pytest
import torch

from gpt2.config import UserError
from gpt2.device import choose_device, choose_precision, cuda_or_else, hardware, known_peak


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", 65),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
    ],
)
def test_a_peak_is_that_of_the_very_chip_or_unknown(name, teraflops):
    assert known_peak(name) == (teraflops and teraflops * 1e12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_and_only_the_promised_default_falls_back(caplog):
    with pytest.raises(UserError, match="there is no cuda here"):
        choose_device("cuda")
    with caplog.at_level("INFO"):
        assert cuda_or_else("cuda") == choose_device("auto")
    assert "no CUDA device" in caplog.text
    with pytest.raises(UserError, match="there is no cuda:7 here"):
        cuda_or_else("cuda:7")


@pytest.mark.parametrize(
    ("asked", "name"),
    [("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16")],
)
def test_precision_on_a_cpu_is_fp32_unless_asked(asked, name):
    precision = choose_precision(asked, torch.device("cpu"))
    assert precision.name == name
    assert not precision.scaler().is_enabled()


def test_the_hardware_of_a_run_is_named():
    about = hardware(torch.device("cpu"))
    assert about["device"] == "cpu"
    assert about["cpu"]
    assert min(about["cores"], about["threads"]) >= 1
