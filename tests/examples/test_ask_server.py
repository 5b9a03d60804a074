# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""The requests that the example sends. The tests of `medst merge` use a real server."""

import json
import runpy
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.bodies.append(body)
            text = body["messages"][0]["content"][1]["text"]
            reply = f" Question {len(http.bodies)}? " if text == "<vusr>" else f"Answer to {text}"
            message = {"role": "assistant", "content": reply}
            content = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.bodies = []
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


def test_the_example_asks_and_answers(server, capsys):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ask_server.py"))
    url = f"http://127.0.0.1:{server.server_port}/v1"
    pairs = example["main"](url, "runs/x/merged", example["synthetic_scan"](), "Is it dark?", count=2)
    assert pairs[0] == ("Is it dark?", "Answer to Is it dark?")
    assert [question for question, _ in pairs[1:]] == ["Question 2?", "Question 4?"]
    assert all(answer == f"Answer to {question}" for question, answer in pairs)
    for body in server.bodies:
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,") and body["model"] == "runs/x/merged"
        assert (body["temperature"] > 0) == (text["text"] == "<vusr>")
    assert "it asks: Question 2?" in capsys.readouterr().out
