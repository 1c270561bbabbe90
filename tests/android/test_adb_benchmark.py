"""`mobilemm bench --device adb:` with the app's own benchmark, on the JVM, after `make test-android`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mobilemm import __version__
from mobilemm.bench import adb
from mobilemm.bench.adb import bench_adb
from mobilemm.bench.result import Settings
from mobilemm.errors import MobileMMError
from mobilemm.runtime.bundle import MANIFEST, Bundle, file_sha256, open_bundle
from tests.bench.phones import Phones, scripted_phones

sys.path.insert(0, str(Path(__file__).parents[2] / "android_demo"))

import build

BUNDLE = build.OUT / "vectors" / "tiny-onnx"
SETTINGS = Settings(prompt_tokens=12, new_tokens=6, runs=2, threads=1)

needs_vectors = pytest.mark.skipif(
    not BUNDLE.is_dir() or shutil.which("mvn") is None or shutil.which("java") is None,
    reason="`make test-android` has not run here",
)


@pytest.fixture
def phones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Phones]:
    with scripted_phones(tmp_path / "phones", monkeypatch) as phones:
        phones.set(benchmark=build.app_benchmark())
        # A machine that is busy takes its time to start a JVM.
        monkeypatch.setattr(adb, "START", 60.0)
        monkeypatch.setattr(adb, "POLL", 0.05)
        yield phones


@needs_vectors
def test_the_app_measures_what_was_sent(phones: Phones) -> None:
    told: list[str] = []
    result = bench_adb(BUNDLE, SETTINGS, "", told.append)
    assert result.device == "adb:8A1X0B7C"
    assert result.bundle.digest == file_sha256(BUNDLE, MANIFEST)
    assert result.bundle.bytes == sum(file.bytes for file in open_bundle(BUNDLE).manifest.files)
    assert result.runtime.startswith("onnxruntime ")
    names = {figure.name for figure in result.figures}
    assert {"load_warm", "image", "vision", "ttft", "pp12", "tg6", "token"} <= names
    assert len(result.figure("tg6").runs) == SETTINGS.runs
    assert len(result.figure("token").runs) == SETTINGS.runs * SETTINGS.new_tokens
    assert result.settings.model_dump() == SETTINGS.model_dump()
    limit = result.figure("load_warm").limit
    assert limit is not None
    weights = sum(path.stat().st_size for path in (BUNDLE / "parts").iterdir())
    assert limit.best == pytest.approx(weights / result.machine.bandwidth)
    assert any(line.startswith("measuring the device") for line in told)
    assert phones.left() == []


@needs_vectors
def test_the_app_refuses_what_is_damaged_on_the_way(phones: Phones, monkeypatch: pytest.MonkeyPatch) -> None:
    send = adb._send

    def send_and_damage(phone: adb.Phone, bundle: Bundle, report: Callable[[str], None]) -> str:
        name = send(phone, bundle, report)
        tokenizer = phones.folder / "bench" / name / "tokenizer.json"
        tokenizer.write_bytes(b" " + tokenizer.read_bytes()[1:])
        return name

    monkeypatch.setattr(adb, "_send", send_and_damage)
    with pytest.raises(MobileMMError) as raised:
        bench_adb(BUNDLE, SETTINGS, "")
    assert "tokenizer.json: damaged or changed" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert phones.left() == []


@needs_vectors
def test_the_app_takes_no_more_than_it_can(phones: Phones) -> None:
    settings = SETTINGS.model_copy(update={"images": 0, "threads": 100})
    result = bench_adb(BUNDLE, settings, "")
    assert result.settings.threads == 64
    assert result.absent["threads"] == "the app does not take 100, but 64"
    assert "ttft" not in {figure.name for figure in result.figures}


def test_the_app_is_of_mobilemms_version() -> None:
    assert build.VERSIONS["versionName"] == __version__
