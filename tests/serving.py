# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Run `transformers serve` on localhost during a test."""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def serve(directory: str) -> Iterator[str]:
    """Yield the base URL for an OpenAI client. Skip the test if the packages of the server are missing."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"`transformers serve` needs {', '.join(missing)} (pip install 'transformers[serving]')")
    program = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", directory]
    for _ in range(3):  # another program may take the port before the server does
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen([*program, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
            try:
                if _becomes_healthy(process, port):
                    yield f"http://127.0.0.1:{port}/v1"
                    return
            finally:
                process.terminate()
                process.wait(20)
            log.seek(0)
            output = log.read()
        if "address already in use" not in output.lower():
            break
    pytest.fail(f"transformers serve ended:\n{output}")


def _becomes_healthy(process: subprocess.Popen, port: int) -> bool:
    """Wait until the server answers. Return False if it ends before."""
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
        except OSError:
            if process.poll() is not None:
                return False
            time.sleep(0.2)
        else:
            return process.poll() is None
    pytest.fail("transformers serve did not become healthy within 2 minutes")
