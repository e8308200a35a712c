"""For all tests: one torch thread, no network, a store of their own, the same hypothesis examples each time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from browser import document_of, find_chromium

# Before torch is imported by any test: xdist runs one process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

settings.register_profile("coldforge", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("coldforge")


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' own store, so that none touches the user's."""
    home = tmp_path_factory.mktemp("coldforge-home")
    os.environ["COLDFORGE_HOME"] = str(home)
    return home


@pytest.fixture(autouse=True)
def same_weights_every_time() -> None:
    """Networks that a test builds without a seed start the same, whichever tests ran before."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """The document of a local page after its scripts ran, from headless Chromium."""
    binary = find_chromium()
    if binary is None:
        pytest.skip("no Chromium found: install the package chromium, or name the binary in COLDFORGE_CHROMIUM")
    profile = tmp_path_factory.mktemp("chromium")
    return lambda page: document_of(binary, page, profile)
