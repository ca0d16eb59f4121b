"""The packages that writing a format needs; nothing here loads them."""

from importlib.util import find_spec

from libprune.engine.errors import ExportError

PACKAGES = {"onnx": ("onnx", "onnxscript"), "openvino": ("openvino",)}
"""The packages that writing a format needs."""


def require_packages(kind: str) -> None:
    """Stop if packages are missing that writing a format needs.

    Raises:
        ExportError: with the command that installs them.
    """
    missing = [name for name in PACKAGES[kind] if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"export.formats has {kind}, which needs the package {' and '.join(missing)}: "
            f"pip install 'libprune[{kind}]', or take {kind} out of export.formats"
        )
