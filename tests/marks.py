"""What tests of several packages need, and are skipped without."""

import pytest

from dml_accel.inference import onnx

needs_onnx_exporter = pytest.mark.skipif(
    not onnx._EXPORTER_IS_TESTED, reason="this torch cannot write our networks as ONNX"
)
