"""Chat servers of the standard library, for what asks them: each counts who asked what."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def chat_reply(text, finish="stop", tokens=None):
    """A chat completion, 200, as servers write it."""
    usage = {"prompt_tokens": 7, "completion_tokens": len(text.split()) if tokens is None else tokens}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": usage}


@contextmanager
def chat_server(reply, host="127.0.0.1"):
    """(URL, requests by last prompt, bodies) of a server; `reply(body)` gives (status, object)."""
    seen, bodies, lock = Counter(), [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen[body["messages"][-1]["content"]] += 1
                bodies.append((body, {name.lower(): value for name, value in self.headers.items()}))
            self.answered(*reply(body))

        def do_GET(self):
            self.answered(200, {"data": [{"id": "tiny"}]})

        def answered(self, status, found):
            text = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    server.handle_error = lambda *args: None  # a client that was killed
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_port}/v1", seen, bodies
    finally:
        server.shutdown()
        server.server_close()
