"""Starting a Hub for the tests: the small one of this folder, or the full fakehub (with Xet) where it is at hand.

conftest.py calls `start_hub` and `client_environment` before anything imports huggingface_hub, which reads the
environment at import. With PRIOR_HUB_TEST_FAKEHUB=<path of fakehub.py> the same tests run against that server in Xet
mode, the way users upload; without it they run on plain LFS.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import struct
import sys
from pathlib import Path
from typing import Any, Protocol

from loopback_hub import LoopbackHub

FAKEHUB = "PRIOR_HUB_TEST_FAKEHUB"
ALICE, ALICE_READ_ONLY, BOB = "hf_alice_write", "hf_alice_read", "hf_bob_write"  # alice is a member of prior-hub


class HubServer(Protocol):
    """What both servers offer. page_size: longest page of a listing; xet: whether LFS-class files go through Xet."""

    xet: bool
    page_size: int
    root: Path

    @property
    def endpoint(self) -> str:
        """Root of the Hub, the client's HF_ENDPOINT."""

    @property
    def cdn_endpoint(self) -> str:
        """Root of the other host, which has the contents of LFS and Xet files."""

    def stop(self) -> None:
        """Close the sockets."""

    def add_fault(
        self, action: str, *, method: str | None = None, path: str = "", role: str | None = None, times: int = 1,
        skip: int = 0, **options: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Break matching requests, see `LoopbackHub.add_fault`."""

    def clear_faults(self) -> None:
        """Forget all faults."""

    def requests(self, path: str = "", method: str | None = None, role: str | None = None) -> list[dict[str, Any]]:
        """The request log."""

    def clear_log(self) -> None:
        """Forget all requests."""


def start_hub(root: Path) -> HubServer:
    """The server of this test run, listening."""
    path = os.environ.get(FAKEHUB)
    if not path:
        return LoopbackHub(root).start()
    spec = importlib.util.spec_from_file_location("fakehub", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise FileNotFoundError(f"{FAKEHUB}={path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.FakeHub(root, xet=True).start()


def client_environment(hub: HubServer, home: Path) -> dict[str, str]:
    """Environment of a client of this hub. Each hub needs a `home` of its own: hf_xet caches what a hub has."""
    loopback = "127.0.0.1,127.0.0.2,localhost"
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": ALICE,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),  # these have names of their own, which may be set outside
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "0" if hub.xet else "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "NO_PROXY": loopback,
        "no_proxy": loopback,
    } | (
        {
            "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",  # the default waits 112 s for a server that is gone
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "200ms",
            "HF_XET_TELEMETRY_ENABLED": "false",
        }
        if hub.xet
        else {}
    )


def fresh_repo_id(hint: str = "repo", owner: str = "alice") -> str:
    """A repository name that nobody used: tests share one hub, and may run in any order."""
    return f"{owner}/{hint}-{secrets.token_hex(4)}"


def safetensors_bytes(size: int, name: str = "mean.weight") -> bytes:
    """A safetensors file with one float32 tensor of `size` random values (bit patterns, some of them NaN)."""
    header = json.dumps({name: {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    return struct.pack("<Q", len(header)) + header + secrets.token_bytes(4 * size)
