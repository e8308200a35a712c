"""The file: writing it, running it, comparing it with its twin, checking and timing it on another machine."""

from __future__ import annotations

from coldforge.deploy.agreement import agreement
from coldforge.deploy.bench import BenchRow, bench
from coldforge.deploy.onnx import export_onnx
from coldforge.deploy.runtime import OnnxSession, OpenVinoSession, Session, int8_saturates, open_session
from coldforge.deploy.verify import Check, Verification, verify_folder, write_probe

__all__ = [
    "BenchRow",
    "Check",
    "OnnxSession",
    "OpenVinoSession",
    "Session",
    "Verification",
    "agreement",
    "bench",
    "export_onnx",
    "int8_saturates",
    "open_session",
    "verify_folder",
    "write_probe",
]
