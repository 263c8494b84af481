# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server in a thread, which answers as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, object, dict[str, str]]


class ChatServer:
    """Answers chat completions by `reply(request content) -> text | (status, body, headers)`; `seen` are the requests."""

    def __init__(self):
        self.seen: list[dict] = []
        self.reply: Callable[[dict], str | Reply] = lambda asked: "Fine. Rating: [[7]]"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append({"path": self.path, "key": self.headers["Authorization"], **content})
                said = outer.reply(content)
                if isinstance(said, str):
                    said = 200, {"choices": [{"message": {"role": "assistant", "content": said}}]}, {}
                status, body, headers = said
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                outer.seen.append({"path": self.path, "key": self.headers["Authorization"]})
                self.send_error(404)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
