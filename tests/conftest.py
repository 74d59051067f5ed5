"""Every test talks to a Hub server of its own on loopback; its address must be known before huggingface_hub is imported."""

import os
import tempfile
from pathlib import Path

import pytest
from hub_fixtures import HubServer, client_environment, start_hub

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other on a busy machine

_FOLDER = tempfile.TemporaryDirectory(prefix="prior-hub-tests-")
_HUB = start_hub(Path(_FOLDER.name) / "hub")
os.environ.update(client_environment(_HUB, Path(_FOLDER.name) / "home"))  # before huggingface_hub is imported


@pytest.fixture(scope="session", autouse=True)
def _stop_hub():
    yield
    _HUB.stop()
    _FOLDER.cleanup()


@pytest.fixture(scope="session")
def hub() -> HubServer:
    return _HUB


@pytest.fixture(autouse=True)
def _no_faults_left():
    yield
    _HUB.clear_faults()


@pytest.fixture
def real_waits() -> None:
    """For tests of the waits themselves."""


@pytest.fixture(autouse=True)
def _short_waits(request, monkeypatch):
    """Between two tries of a request: what is tried again, and how often, stays as it is."""
    from prior_hub.registry import client

    if "real_waits" not in request.fixturenames:
        monkeypatch.setattr(client, "_WAIT", 0.02)
