"""The app's page without a browser: what its script sends and reads."""

import json

import httpx

JOIN = "/gradio_api/queue/join"


class Browser:
    """What the page's own script does, in Python: the cookie, the Origin, the queue and its event stream."""

    def __init__(self, served, session="s1", **options):
        self.url = served.url.rstrip("/")
        self.http = httpx.Client(base_url=self.url, headers={"Origin": self.url}, timeout=600, **options)
        self.http.get("/")
        self.session, self.seen = session, b""

    def config(self):
        """The page's description, as the browser gets it."""
        return self.http.get("/config").json()

    def function(self, elem_id, event="click"):
        """The number of the handler behind a widget."""
        config = self.config()
        (widget,) = [c["id"] for c in config["components"] if c["props"].get("elem_id") == elem_id]
        return next(
            d["id"]
            for d in config["dependencies"]
            if d["backend_fn"] and [widget, event] in [list(t) for t in d["targets"]]
        )

    def call(self, elem_id, data, event="click"):
        """Press a button; the messages of its stream, whose raw bytes are added to `seen`."""
        body = {"data": data, "fn_index": self.function(elem_id, event), "session_hash": self.session}
        joined = self.http.post(JOIN, json=body)
        assert joined.status_code == 200, joined.text
        raw = b""
        with self.http.stream("GET", f"/gradio_api/queue/data?session_hash={self.session}") as stream:
            for chunk in stream.iter_bytes():
                raw += chunk
                if b"process_completed" in raw and raw.endswith(b"\n\n"):
                    break
        self.seen += raw
        return [json.loads(line[5:]) for line in raw.decode().split("\n") if line.startswith("data:")]
