"""What every test shares: no network, two torch threads, and fixtures for what a machine may lack."""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Set before torch and transformers are first imported, and inherited by the processes that tests start. The proxies
# lead nowhere, so that a download attempted in such a process fails at once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "groma-tests-no-hub-cache")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _scheme in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
    os.environ[_scheme] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost,::1"


class NetworkForbidden(AssertionError):
    """A test reached for a machine other than this one."""


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback or str(host) == "0.0.0.0"
    except ValueError:  # a name, which would have to be looked up
        return False


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Connections and name look-ups that leave this machine fail with NetworkForbidden."""

    def guard_connect(original: Any) -> Any:
        @functools.wraps(original)
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
                raise NetworkForbidden(f"tests run offline, but this one connects to {address!r}")
            return original(self, address)

        return connect

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise NetworkForbidden(f"tests run offline, but this one looks up {host!r}")
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard_connect(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guard_connect(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real sample files beside the checkout; the test is skipped where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real sample files are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def renderer() -> None:
    """Ask for this fixture to draw with VTK: the test is skipped, saying what to install, where drawing fails.

    VTK's wheel loads EGL or OSMesa when it first draws and crashes the process without them, so another process tries.
    """
    code = "import pyvista; p = pyvista.Plotter(off_screen=True, window_size=(8, 8)); p.screenshot(return_img=True)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    if "ModuleNotFoundError" in result.stderr:
        pytest.skip("drawing needs pyvista: pip install 'groma[tabletop]'")
    if result.returncode != 0:
        pytest.skip("drawing needs EGL, which this machine lacks; on Debian or Ubuntu: apt-get install libegl1")
