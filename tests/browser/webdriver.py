"""A headless Chromium without network, driven through chromedriver's HTTP interface (W3C WebDriver)."""

import base64
import json
import shutil
import subprocess
import urllib.request

import pytest

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9",
)  # fmt: skip
# The test's own talk with the driver must not go through a proxy of the environment.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Browser:
    """One browser session; use as a context manager."""

    def __init__(self, profile):
        browser, driver = (_find(name) for name in ("chromium", "chromedriver"))
        self._process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        self._url = f"http://127.0.0.1:{self._port()}"
        options = {"binary": browser, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        try:
            session = self._call("/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self._process.kill()
            raise
        self._url += f"/session/{session['sessionId']}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self._call("", None, "DELETE")
        finally:
            self._process.terminate()
            self._process.wait(timeout=20)
            self._process.stdout.close()

    def open(self, url, width, height):
        """Shows a page in a window whose inside has this size."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._call("/url", {"url": url})

    def run(self, script):
        """What a script returns."""
        return self._call("/execute/sync", {"script": script, "args": []})

    def console(self):
        """Messages of the console since the last call."""
        return self._call("/se/log", {"type": "browser"})

    def network(self):
        """(method, parameters) of DevTools' network events since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._call("/se/log", {"type": "performance"})]
        return [(e["method"], e["params"]) for e in events if e["method"].startswith("Network.")]

    def screenshot(self, path, *, whole_page):
        """Saves a PNG of the window, or of all of the page."""
        shot = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole_page)
        path.write_bytes(base64.b64decode(shot["data"]))

    def devtools(self, command, **parameters):
        return self._call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _port(self):
        for line in self._process.stdout:
            if "started successfully on port" in line:
                return int(line.rstrip(". \n").rsplit(" ", 1)[1])
        raise RuntimeError("chromedriver ended before it listened")

    def _call(self, path, body, method="POST"):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        with _OPENER.open(request, timeout=120) as answer:
            return json.load(answer)["value"]


def _find(name):
    path = shutil.which(name)  # pyright: ignore[reportDeprecated]
    if path is None:
        pytest.fail(f"{name} is not on the PATH: apt-get install chromium chromium-driver", pytrace=False)
    return path
