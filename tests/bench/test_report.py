"""The page of a bundle and its benchmark: what stands on it, and how a browser shows it without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilemm.bench.host import bench_here
from mobilemm.bench.report import labels, report, write_report
from mobilemm.bench.result import Result, Settings, read_results, write_results
from mobilemm.errors import MobileMMError
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.manifest import File, GoldenConversation, Parity

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def result(bundle: Path) -> Result:
    return bench_here(bundle, Settings(prompt_tokens=16, new_tokens=4, runs=2, threads=1))


@pytest.fixture(scope="module")
def spoken(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle with a conversation, and what its decoder keeps."""
    folder = tmp_path_factory.mktemp("report") / "spoken"
    shutil.copytree(bundle, folder)
    Image.new("RGB", (40, 30), "red").save(folder / "picture.png")
    manifest = open_bundle(bundle).manifest
    talk = GoldenConversation(
        image="picture.png",
        prompt="What is this?",
        input_ids=[1],
        answer_ids=[2],
        answer="<script>alert(1)</script>",
        pytorch_answer="<b>bold</b>",
    )
    parity = Parity(cosine=1, snr_db=30, max_abs_error=0, conversion_db=40, layers=[40.0, 35.0])
    decoder = manifest.parts["decoder"].model_copy(update={"parity": parity})
    size = (folder / "picture.png").stat().st_size
    update = {
        "conversations": [talk],
        "parts": {**manifest.parts, "decoder": decoder},
        "files": [*manifest.files, File(path="picture.png", bytes=size, sha256="0" * 64)],
    }
    return Bundle(folder, manifest.model_copy(update=update))


def test_a_checkpoint_and_an_interpreter_are_called_so(spoken: Bundle, result: Result) -> None:
    facts = result.bundle.model_copy(update={"target": "pytorch", "bits": {"language_model": 32}})
    checkpoint = result.model_copy(update={"bundle": facts})
    interpreted = result.model_copy(update={"absent": {"Core ML": "interpreted"}})
    text = report([spoken], [checkpoint, interpreted])
    assert "pytorch 32 bits" in text
    assert "onnx 32 bits, interpreted" in text


@pytest.fixture(scope="module")
def page(spoken: Bundle, result: Result) -> str:
    return report([spoken], [result])


def test_figures_stand_on_the_page(page: str, spoken: Bundle, result: Result) -> None:
    assert f"<title>{spoken.manifest.model.name}</title>" in page
    text = re.sub(r"<[^>]*>", " ", page)
    for figure in result.figures:
        assert f" {figure.name} " in text
    assert "What is this?" in text
    assert page.count("<svg") == 5  # sizes, layers, the question, depth, memory
    assert 'src="data:image/png;base64,' in page


def test_memory_and_depth_are_measured(result: Result, tmp_path: Path) -> None:
    trace = result.memory
    assert trace is not None
    assert len(trace.seconds) == len(trace.bytes) > 5
    assert list(trace.phases) == ["load", "image", "vision", "ttft", "prefill", "decode", "depth"]
    # Looked at ten times a second, a short peak is missed; between phases nothing counts the peak.
    assert 0.5 < max(trace.bytes) / result.figure("memory").median < 1.1
    assert trace.seconds[-1] >= trace.phases["depth"]
    shallow = result.figure("tg16@d256")
    assert len(shallow.runs) == 2
    at_first = result.figure("tg4").limit
    assert shallow.limit is not None
    assert at_first is not None
    assert shallow.limit.best < at_first.best
    write_results([result], tmp_path / "results.json")
    assert read_results(tmp_path / "results.json") == [result]


def test_text_of_a_bundle_is_text(spoken: Bundle) -> None:
    """A bundle comes from anywhere: what it says is shown, not run."""
    model = spoken.manifest.model.model_copy(update={"name": "<i>x</i>"})
    page = report([Bundle(spoken.folder, spoken.manifest.model_copy(update={"model": model}))], [])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "<i>x" not in page
    assert "&lt;b&gt;bold" in page
    assert "mobilemm bench BUNDLE" in page
    assert page.count("<svg") == 2  # sizes and layers


def test_bundles_are_told_apart(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    opened = [open_bundle(bundle), open_bundle(other)]
    assert labels(opened[:1]) == ["onnx 32 bits"]
    assert labels(opened) == ["onnx 32 bits (a bundle)", "onnx 32 bits (other)"]


def test_nothing_half_written_stays(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(MobileMMError, match=r"report\.html: cannot be written"):
        write_report([open_bundle(bundle)], [], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# --- in a browser -------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ALONE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
)
# Whom Chromium asks for the time, on its own account.
OWN = "clients2.google.com/time/"


def browse(address: str, *flags: str) -> str:
    """What Chromium makes of a page; every name leads to this machine's own server."""
    if CHROMIUM is None:
        assert "CI" not in os.environ, "there is no Chromium"
        pytest.skip("there is no Chromium")
    command = [CHROMIUM, *ALONE, *flags, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def served(page: str) -> Iterator[tuple[str, list[str]]]:
    """The page's address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.headers['Host']}{self.path}")
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            if self.path == "/":
                self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_it_and_asks_for_nothing_else(
    served: tuple[str, list[str]], page: str, tmp_path: Path, width: int
) -> None:
    address, asked = served
    port = address.rsplit(":", 1)[1].rstrip("/")
    picture = tmp_path / "page.png"
    size = f"--window-size={width},2400"
    browse(address, size, f"--screenshot={picture}", f"--host-resolver-rules=MAP * 127.0.0.1:{port}")
    wanted = {one.removeprefix(f"127.0.0.1:{port}") for one in asked if not one.startswith(OWN)}
    assert wanted <= {"/", "/favicon.ico"}
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert pixels.std() > 10
    # Bars in their colours: the encoder, the decoder.
    for color in ((0, 114, 178), (230, 159, 0)):
        assert (np.abs(pixels.astype(int) - color).sum(1) < 12).sum() > 200
    # Tables and charts scroll in themselves; the page does not.
    told = page.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'").replace(
        "</body>", "<script>document.title = document.documentElement.scrollWidth</script></body>"
    )
    (tmp_path / "told.html").write_text(told, encoding="utf-8")
    shown = browse(f"file://{tmp_path}/told.html", size, "--dump-dom")
    found = re.search(r"<title>(\d+)</title>", shown)
    assert found is not None
    assert int(found[1]) <= max(width, 500)  # the least that Chromium's windows have
