"""The packages that writing a format needs."""

import pytest

from libprune.engine.errors import ExportError
from libprune.export import packages


def test_what_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs the package onnx and onnxscript: pip install 'libprune\[onnx\]'"):
        packages.require_packages("onnx")
    monkeypatch.setattr(packages, "find_spec", lambda name: object())
    packages.require_packages("onnx")
