"""Memory is told in one unit, whatever the system counts in, or not at all."""

import os
import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from mas import machine
from mas.doctor import doctor
from mas.precision import free_memory


@pytest.mark.parametrize(("system", "counted"), [("linux", 300 * 2**10), ("darwin", 300 * 2**20)])
def test_systems_count_in_kilobytes_or_in_bytes(system, counted, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "STATUS", tmp_path / "status")
    monkeypatch.setattr("sys.platform", system)
    usage = SimpleNamespace(ru_maxrss=counted)
    monkeypatch.setattr(resource, "getrusage", lambda _: usage)
    assert machine.peak_rss_mb() == 300
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t 204800 kB\n")  # as some sandboxes say
    assert machine.peak_rss_mb() == 300
    (tmp_path / "status").write_text("VmHWM:\t 102400 kB\nVmRSS:\t 51200 kB\n")
    assert machine.peak_rss_mb() == 100


def test_a_system_that_does_not_tell_its_memory_refuses_nothing(monkeypatch, tmp_path, capsys):
    """Windows."""
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr("mas.precision.MEMORY_INFO", tmp_path / "none")
    assert free_memory(torch.device("cpu")) == sys.maxsize
    doctor()
    assert " cores, ? GB memory\n" in capsys.readouterr().out
