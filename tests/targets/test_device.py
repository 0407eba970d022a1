"""The device in one line."""

from __future__ import annotations

import json
import subprocess
import sys

from autoq import device

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Some Xeon
flags\t\t: fpu avx2 avx512f avx512_vnni amx_bf16 hypervisor

processor\t: 1
model name\t: Another
"""


def test_only_the_first_processor_is_read(monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    monkeypatch.setattr(device, "_CPUINFO", path)
    device._processor.cache_clear()
    try:
        assert device.cpu_model() == "Some Xeon (family 6 model 143)"
        assert device.instruction_sets() == ("avx2", "avx512f", "avx512_vnni", "amx_bf16")
        assert "Some Xeon" in device.fingerprint()
    finally:
        device._processor.cache_clear()


def test_unknown_stays_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_CPUINFO", tmp_path / "none")
    device._processor.cache_clear()
    try:
        assert device.instruction_sets() == ()
        assert "instruction sets unknown" in device.fingerprint()
    finally:
        device._processor.cache_clear()


def test_here():
    assert device.cores() >= 1
    assert "\n" not in device.fingerprint()
    json.dumps(device.facts())


def test_needs_no_torch():
    program = "import sys, autoq.device; autoq.device.fingerprint(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_threads_are_physical_cores_within_what_is_allowed(monkeypatch):
    monkeypatch.setattr(device, "cores", lambda: 8)
    monkeypatch.setattr(device.psutil, "cpu_count", lambda logical: 4)
    for asked, expected in {"": 4, "3": 3, "3,2": 3, "64": 4, "0": 1, "many": 4}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert device.threads() == expected
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(device.psutil, "cpu_count", lambda logical: None)
    assert device.threads() == 8
    monkeypatch.setattr(device, "cores", lambda: 2)
    assert device.threads() == 2
