"""What a manifest says about where a run was made."""

from __future__ import annotations

import sys

import pytest
import torch

from zoo.compare import record


def test_versions_and_hardware_are_named() -> None:
    assert {"python", "torch", "lightning", "mmzoo"} <= set(record.versions())
    found = record.hardware()
    assert found["cores"] >= 1
    assert found["cpu"]


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="resident memory, resettable on Linux")
def test_a_job_is_not_charged_with_the_peak_of_another() -> None:
    record.reset_peak_memory()
    before = record.peak_memory_bytes()
    block = torch.ones(50_000_000)  # 200 MB
    assert record.peak_memory_bytes() - before > 150e6
    del block
    record.reset_peak_memory()
    assert record.peak_memory_bytes() - before < 100e6
