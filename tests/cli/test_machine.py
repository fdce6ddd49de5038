"""`assay doctor`: devices, kernels and extras, and what installs those that are missing."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from assay.cli import machine, main


def test_everything_is_listed(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in ("devices", "  cpu", "  cuda", "kernels", "  triton", "extras", "  cli", "  text", torch.__version__):
        assert words in out
    assert f"pydantic {importlib.metadata.version('pydantic')}" in out


def test_what_is_missing_has_its_pip_line(capsys, monkeypatch):
    versions = {"peft": None, "gguf": "0.9.9"}
    installed = machine._installed
    monkeypatch.setattr(machine, "_installed", lambda name: versions.get(name, installed(name)))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "missing: peft; pip install --upgrade 'assay[text]'" in out
    assert "too old: gguf 0.9.9 (needs 0.10); pip install --upgrade 'assay[text]'" in out


def test_gpus_are_named(capsys, monkeypatch):
    class Properties:
        name, total_memory, major, minor = "NVIDIA H100", 80 << 30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    assert list(machine._devices())[1:] == [
        (f"  cuda:{i}", "NVIDIA H100, 80 GiB, compute capability 9.0") for i in range(2)
    ]


def test_without_native_code_it_says_so_and_is_no_success(capsys, monkeypatch):
    def broken():
        raise ImportError("libassay: cannot open")

    monkeypatch.setattr("assay.ops.build_info", broken)
    assert main(["doctor"]) == 1
    assert "native" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "least", "older"),
    [
        ("5.0.0", "5.0", False),
        ("4.99", "5.0", True),
        ("2.13.0+cpu", "2.6", False),
        (None, "1", False),
        ("1.0rc1", "1", False),
    ],
)
def test_versions_compare_by_their_numbers(found, least, older):
    assert machine._older(found, least) is older
