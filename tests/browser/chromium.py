"""Headless Chromium through the DevTools protocol over a pipe: no driver and no package needed."""

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --mute-audio --remote-debugging-pipe"
).split()


def find() -> str | None:
    """The browser's path, or None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One page. `requests` and `complaints` (console errors, exceptions, refused requests) gather what happens."""

    def __init__(self, path: str):
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        # The browser reads commands from descriptor 3 and answers on 4; messages end with a zero byte.
        (down, self.down), (self.up, up) = os.pipe(), os.pipe()
        old = down, up
        command = [path, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        down, up = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in old)  # out of the way of 3 and 4

        def connect():
            os.dup2(down, 3)
            os.dup2(up, 4)

        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, preexec_fn=connect, pass_fds=(3, 4), **silent)
        for end in (*old, down, up):
            os.close(end)
        self.numbers, self.rest, self.session = itertools.count(1), b"", None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded = False
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """A command's result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.down, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.up], [], [], 60)
            data = os.read(self.up, 1 << 16) if ready else b""
            if not data:
                raise RuntimeError("Chromium has gone" if ready else "Chromium does not answer")
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        event = json.loads(message)
        params = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(params["entry"]["text"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning"):
                self.complaints.append(str(params["args"]))
            case "Page.loadEventFired":
                self.loaded = True
        return event

    def open(self, url: str) -> None:
        """Loads a page and waits until it is there."""
        self.loaded = False
        self.call("Page.navigate", url=url)
        while not self.loaded:
            self._read()

    def run(self, expression: str):
        """A JavaScript expression's value; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def close(self) -> None:
        """Ends the browser."""
        try:
            self.session = None
            self.call("Browser.close")
        except (RuntimeError, OSError):
            pass
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.down)
        os.close(self.up)
        for _ in range(20):  # its helper processes may still write
            shutil.rmtree(self.profile, ignore_errors=True)
            if not os.path.exists(self.profile):
                break
            time.sleep(0.1)
