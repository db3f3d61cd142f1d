"""`python -m tqcompress.plugins.lmcache server`: LMCache's own server, which knows the serde."""

import contextlib
import json
import socket
import subprocess
import sys
import time

import requests

STARTED_WITHIN = 120  # seconds


def test_server_knows_the_serde(artifacts, tmp_path):
    """It starts with the serde in its settings, and says that the storage is wrapped in one."""
    serde = {"type": "tqcompress", "artifact": str(artifacts["four"])}
    adapter = json.dumps({"type": "fs", "base_path": str(tmp_path / "stored"), "serde": serde})
    port, http = _free_port(), _free_port()
    command = [sys.executable, "-m", "tqcompress.plugins.lmcache", "server", "--port", str(port)]
    command += ["--http-host", "127.0.0.1", "--http-port", str(http), "--eviction-policy", "LRU"]
    command += ["--l1-size-gb", "0.25", "--no-l1-use-lazy", "--l2-adapter", adapter]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        for _ in range(STARTED_WITHIN):
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(requests.ConnectionError):
                assert '"serde_wrapped":true' in requests.get(f"http://127.0.0.1:{http}/status", timeout=30).text
                return
            time.sleep(1)
        raise AssertionError("the server did not start:\n" + log.read_text()[-3000:])
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
