"""The live page: what status and report say, renewed as it happens, for this machine's browser and nobody else."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadpool_megatron import cli
from deadpool_megatron.observe import EVENTS, STATUS, page
from test_screen import events_of, status_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[page.LivePage]:
    """The page of a run that has written nothing yet."""
    with page.LivePage(tmp_path, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _write(live: page.LivePage, lost: int | None) -> None:
    status = status_of(16, lost=lost, recovers=lost is not None, slow=1)
    (live.run_dir / STATUS).write_text(json.dumps(status))
    (live.run_dir / EVENTS).write_text("".join(json.dumps(e) + "\n" for e in events_of(16, lost)))


def _ask(live: page.LivePage, path: str, method: str = "GET", host: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", live.server_port, timeout=60)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{live.server_port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_a_recovery_is_on_the_page_as_it_happens(live: page.LivePage) -> None:
    assert "no status at" in _ask(live, "/screen")[1] and _ask(live, "/")[0] == 200
    _write(live, None)
    before = _ask(live, "/screen")[1]
    assert "any 1 node may be lost now" in before and "gpu-0005" in before and "lost:" not in before
    _write(live, 0)
    after = _ask(live, "/screen")[1]
    assert "waits for node 1" in after and "lost: node 0" in after and "http-equiv=refresh" in after
    assert "color: " in after, "the cells have their colours"
    assert "its agent is gone or silent" in _ask(live, "/report")[1]
    assert json.loads(_ask(live, "/status.json")[1])["epoch"] == 1


def test_another_run_in_the_directory_begins_anew(live: page.LivePage) -> None:
    _write(live, 0)
    assert len(json.loads(_ask(live, "/status.json")[1])["recoveries"]) == 1
    assert len(json.loads(_ask(live, "/status.json")[1])["recoveries"]) == 1
    (live.run_dir / EVENTS).rename(live.run_dir / "of the run before")
    _write(live, None)
    assert json.loads(_ask(live, "/status.json")[1])["recoveries"] == []


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_is_none_is_one_line(port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["page", "--run-dir", str(tmp_path), "--port", port])
    assert end.value.code == 2 and capsys.readouterr().err == f"deadpool: --port: must be 0 to 65535, not {port}\n"


def test_a_directory_without_a_job_is_told(
    live: page.LivePage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page.LivePage, "serve_forever", lambda self: None)
    for told in (True, False):
        page.serve(live.run_dir, 0)
        assert ("no job has begun there yet" in capsys.readouterr().out) is told
        _write(live, None)


def test_nobody_else_reads_it_and_nobody_writes(live: page.LivePage) -> None:
    _write(live, None)
    assert live.server_address[0] == "127.0.0.1"
    assert _ask(live, "/screen", host=f"evil.example:{live.server_port}")[0] == 403
    assert _ask(live, "/screen", method="POST")[0] == 501
    assert _ask(live, "/../job.json")[0] == 404 and _ask(live, "/job.json")[0] == 404


def test_what_a_job_says_is_text_and_no_html(live: page.LivePage) -> None:
    _write(live, None)
    evil = {"t": 1.0, "event": "worker_error", "node": 1, "message": "<script>alert(1)</script>"}
    with (live.run_dir / EVENTS).open("a") as f:
        f.write(json.dumps(evil) + "\n")
    for path in ("/screen", "/report"):
        text = _ask(live, path)[1]
        assert "<script" not in text and "&lt;script&gt;" in text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to show the page in")
def test_a_real_browser_shows_it(live: page.LivePage, tmp_path: Path) -> None:
    _write(live, 0)
    assert BROWSER is not None
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", f"--user-data-dir={tmp_path}/u"]
    shown = [BROWSER, *options, "--virtual-time-budget=5000", f"--screenshot={picture}"]
    subprocess.run([*shown, f"http://127.0.0.1:{live.server_port}/"], check=True, capture_output=True, timeout=120)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    dom = [BROWSER, *options, "--dump-dom", f"http://127.0.0.1:{live.server_port}/screen"]
    text = subprocess.run(dom, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "waits for node 1" in text
