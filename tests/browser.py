"""Pages in headless Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def find_chromium() -> str | None:
    named = os.environ.get("COLDFORGE_CHROMIUM")
    if named:
        return named
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def document_of(binary: str, page: Path, profile: Path) -> str:
    """The document of a local page after its scripts ran."""
    command = [
        binary, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--window-size=1280,900",
        "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.decode()
