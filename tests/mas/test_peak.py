"""The most memory a process has held is told in one unit, whatever the system counts in."""

import resource
from types import SimpleNamespace

import pytest

from mas import peak


@pytest.mark.parametrize(("system", "counted"), [("linux", 300 * 2**10), ("darwin", 300 * 2**20)])
def test_systems_count_in_kilobytes_or_in_bytes(system, counted, monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "STATUS", tmp_path / "status")
    monkeypatch.setattr("sys.platform", system)
    usage = SimpleNamespace(ru_maxrss=counted)
    monkeypatch.setattr(resource, "getrusage", lambda _: usage)
    assert peak.peak_rss_mb() == 300
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t 204800 kB\n")  # as some sandboxes say
    assert peak.peak_rss_mb() == 300
    (tmp_path / "status").write_text("VmHWM:\t 102400 kB\nVmRSS:\t 51200 kB\n")
    assert peak.peak_rss_mb() == 100
