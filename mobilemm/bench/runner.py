"""Measures one bundle in a process of its own, so that nothing else is in its memory.

    python -m mobilemm.bench.runner < request.json

The request is `Request` as JSON; what comes out is one JSON object a line: `{"figure": …, "unit": …, "runs":
[…]}`, `{"phase": …, "begins": seconds}`, `{"peak": phase, "bytes": …}`, `{"trace": …}`, at last
`{"done": …}`. It needs what `mobilemm run` needs, no more,
so that it can be sent to a board.
"""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from PIL import Image

from mobilemm.bench.machine import EnergyMeter
from mobilemm.bench.result import Settings
from mobilemm.errors import MobileMMError
from mobilemm.runtime.backends import Array, Backend, open_backend
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.image import to_pixels
from mobilemm.runtime.manifest import Strict
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session

QUESTION = "What is in this picture?"
# Positions that tokens are written behind, as far as the context goes, and how many tokens.
DEPTHS = (256, 1024, 4096)
DEPTH_TOKENS = 16
# Seconds between two looks at the process' memory.
MEMORY_INTERVAL = 0.1
# A telephone's photograph, as messengers send it.
PHOTO = (1280, 960)


class Request(Strict):
    """`load` only loads all parts, once; `all` measures everything."""

    bundle: str
    what: Literal["load", "all"] = "all"
    settings: Settings = Settings()


class Runner:
    """One process' measurements."""

    def __init__(self, request: Request, out: TextIO) -> None:
        self.settings, self.out = request.settings, out
        self.begun = time.perf_counter()
        self.bundle: Bundle = open_bundle(Path(request.bundle), verify=False)
        self.manifest = self.bundle.manifest
        self.backend: Backend = open_backend(self.bundle, self.settings.threads)

    def load(self) -> None:
        """Of all parts, one after the other."""
        with self._phase("load"):
            begun = time.perf_counter()
            for part in self.manifest.parts:
                if part != "decoder":
                    self.backend.load(part)
            self.decoder = self.backend.decoder()
            self._tell("load", "s", [time.perf_counter() - begun])

    def measure(self) -> None:
        """Everything, the parts being loaded."""
        settings, runs = self.settings, self.settings.runs
        if self.manifest.image is not None and settings.images:
            photos = [photograph(index) for index in range(runs + 1)]
            image = self.manifest.image
            with self._phase("image"):
                pixels = []
                self._repeat("image", lambda index: pixels.append(to_pixels(photos[index], image)))
            with self._phase("vision"):
                self._repeat(
                    "vision", lambda index: self.backend.run("vision", {"pixels": pixels[index][None]})
                )
            with self._phase("ttft"):
                self._time_to_first_token()
        with self._phase("prefill"):
            self._prefill()
        with self._phase("decode"):
            self._decode()
        with self._phase("depth"):
            self._decode_at_depths()

    def _time_to_first_token(self) -> None:
        """From the bytes of new pictures to the first token, the question's tokens among what is read."""
        session = Session(self.bundle, self.backend, Sampling(max_new_tokens=1))
        count = self.settings.images

        def ask(index: int) -> None:
            session.reset()
            for photo in photos[index * count : (index + 1) * count]:
                session.look_at(photo)
            session.reply(QUESTION)

        photos = [photograph(1000 + index) for index in range((self.settings.runs + 1) * count)]
        self._repeat("ttft", ask)

    def _prefill(self) -> None:
        ids = self._ids(self.settings.prompt_tokens)

        def read(_: int) -> None:
            self.decoder.truncate(0)
            self.decoder.decode(self._embed(ids))

        rates = [self.settings.prompt_tokens / seconds for seconds in self._times(read)]
        self._tell("prefill", "tok/s", rates)

    def _decode(self) -> None:
        """Behind the prompt: embedding, step and greedy choice of each token."""
        count = self.settings.new_tokens
        ids = self._ids(self.settings.prompt_tokens)
        each: list[float] = []
        rates: list[float] = []
        joules: list[float] = []
        for turn in range(self.settings.runs + 1):
            self.decoder.truncate(0)
            token = int(self.decoder.decode(self._embed(ids))[0, -1].argmax())
            meter = EnergyMeter()
            begun = last = time.perf_counter()
            for _ in range(count):
                token = int(self.decoder.decode(self._embed([token]))[0, -1].argmax())
                now = time.perf_counter()
                if turn:
                    each.append(now - last)
                last = now
            if turn:  # the first warms up
                rates.append(count / (last - begun))
                joules += [meter.joules() / count] if meter.known else []
        self._tell("decode", "tok/s", rates)
        self._tell("token", "s", each)
        if joules:
            self._tell("energy", "J", joules)

    def _decode_at_depths(self) -> None:
        """Behind longer and longer texts: attention reads more keys and values with each token."""
        for depth in DEPTHS:
            if depth + DEPTH_TOKENS > self.manifest.model.context_length:
                break
            ids = self._ids(depth)
            self.decoder.truncate(0)
            for start in range(0, depth, DEPTHS[0]):
                logits = self.decoder.decode(self._embed(ids[start : start + DEPTHS[0]]))
            token = int(logits[0, -1].argmax())
            rates = []
            for turn in range(min(self.settings.runs, 3) + 1):
                self.decoder.truncate(depth)
                begun = time.perf_counter()
                for _ in range(DEPTH_TOKENS):
                    token = int(self.decoder.decode(self._embed([token]))[0, -1].argmax())
                if turn:  # the first warms up
                    rates.append(DEPTH_TOKENS / (time.perf_counter() - begun))
            self._tell(f"depth{depth}", "tok/s", rates)

    def _ids(self, count: int) -> list[int]:
        model = self.manifest.model
        drawn = np.random.default_rng(0).integers(0, model.vocab_size, 2 * count + 64)
        special = {model.image_token_id, *model.eos_token_ids}
        return [int(token) for token in drawn if int(token) not in special][:count]

    def _embed(self, ids: list[int]) -> Array:
        empty = np.zeros((0, self.manifest.model.hidden_size), np.float32)
        inputs: dict[str, Array] = {"input_ids": np.array([ids], np.int64), "image_features": empty}
        return self.backend.run("embed", inputs)["inputs_embeds"]

    def _repeat(self, name: str, action: Callable[[int], Any]) -> None:
        self._tell(name, "s", self._times(action))

    def _times(self, action: Callable[[int], Any]) -> list[float]:
        """Seconds of each run; one more before them warms up."""
        times = []
        for index in range(self.settings.runs + 1):
            begun = time.perf_counter()
            action(index)
            times.append(time.perf_counter() - begun)
        return times[1:]

    def _tell(self, name: str, unit: str, runs: list[float]) -> None:
        self._write({"figure": name, "unit": unit, "runs": runs})

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._write({"phase": name, "begins": time.perf_counter() - self.begun})
        known = reset_peak()
        yield
        if known and (size := peak()) is not None:
            self._write({"peak": name, "bytes": size})

    def _write(self, content: dict[str, Any]) -> None:
        self.out.write(json.dumps(content) + "\n")
        self.out.flush()


class MemoryTrace:
    """This process' resident memory, looked at now and then by a thread of its own (on Linux)."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        begun = time.perf_counter()
        while (size := resident()) is not None:
            self.seconds.append(round(time.perf_counter() - begun, 3))
            self.bytes.append(size)
            if self._over.wait(MEMORY_INTERVAL):
                break

    def stop(self) -> None:
        """Ends the watching."""
        self._over.set()
        self._thread.join()


def photograph(seed: int) -> bytes:
    """A JPEG as large as a telephone's: noise over a gradient, another one for each seed."""
    generator = np.random.default_rng(seed)
    width, height = PHOTO
    rows = np.linspace(0, 200, height)[:, None, None]
    columns = np.linspace(0, 55, width)[None, :, None]
    pixels = (rows + columns + generator.integers(0, 24, (height, width, 3))).clip(0, 255)
    with io.BytesIO() as file:
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
        return file.getvalue()


def reset_peak() -> bool:
    """Has Linux count this process' peak anew; False where it does not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int | None:
    """The most bytes that were resident since the last reset."""
    return _status("VmHWM:")


def resident() -> int | None:
    """Bytes that are resident now."""
    return _status("VmRSS:")


def _status(key: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith(key)), None)
    return None if line is None else 1024 * int(line.split()[1])


def main() -> None:
    """Serves the request on standard input. Errors are one line, `{"error": …}`, and exit code 2."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes elsewhere
    try:
        request = Request.model_validate_json(sys.stdin.read())
        trace = MemoryTrace()
        runner = Runner(request, out)
        runner.load()
        if request.what == "all":
            runner.measure()
            trace.stop()
            out.write(json.dumps({"trace": {"seconds": trace.seconds, "bytes": trace.bytes}}) + "\n")
        out.write(json.dumps({"done": runner.backend.runtime}) + "\n")
    except MobileMMError as error:
        out.write(json.dumps({"error": str(error)}) + "\n")
        out.flush()
        sys.exit(2)
    finally:
        out.flush()


if __name__ == "__main__":
    main()
