"""Measures one bundle or checkpoint in a process of its own, so that nothing else is in its memory.

    python -m mobilemm.bench.runner < request.json

The request is `Request` as JSON; what comes out is one JSON object a line: `{"figure": …, "unit": …, "runs":
[…]}`, `{"phase": …, "begins": seconds}`, `{"peak": phase, "bytes": …}`, `{"bundle": …, "decoding": …}`,
`{"absent": …}`, `{"trace": …}`, at last `{"done": …}`. For a bundle it needs what `mobilemm run` needs, no
more: it can be sent to a board.
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
from mobilemm.bench.subject import Subject, open_subject
from mobilemm.errors import MobileMMError
from mobilemm.runtime.manifest import Strict

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

    folder: str
    what: Literal["load", "all"] = "all"
    settings: Settings = Settings()


class Runner:
    """One process' measurements."""

    def __init__(self, request: Request, out: TextIO) -> None:
        self.settings, self.out = request.settings, out
        self.begun = time.perf_counter()
        self.subject: Subject = open_subject(Path(request.folder), self.settings.threads, self.settings.steps)

    def load(self) -> None:
        """All parts, one after the other."""
        with self._phase("load"):
            begun = time.perf_counter()
            self.subject.load()
            self._tell("load", "s", [time.perf_counter() - begun])

    def measure(self) -> None:
        """Everything, the parts being loaded."""
        bundle, decoding = self.subject.facts()
        self._write({"bundle": bundle.model_dump(), "decoding": decoding.model_dump()})
        if self.subject.takes_pictures and self.settings.images:
            self._photos()
        with self._phase("prefill"):
            self._prefill()
        with self._phase("decode"):
            self._decode()
        with self._phase("depth"):
            self._decode_at_depths()
        if self.subject.draws:
            with self._phase("drawing"):
                self._draw()
        self._write({"absent": self.subject.absent})

    def _photos(self) -> None:
        subject = self.subject
        photos = [photograph(index) for index in range(self.settings.runs + 1)]
        pixels: list[Any] = []
        with self._phase("image"):
            self._repeat("image", lambda index: pixels.append(subject.to_pixels(photos[index])))
        with self._phase("vision"):
            self._repeat("vision", lambda index: subject.look(pixels[index]))
        count = self.settings.images
        photos = [photograph(1000 + index) for index in range((self.settings.runs + 1) * count)]
        with self._phase("ttft"):
            self._repeat(
                "ttft", lambda index: subject.ask(photos[index * count : (index + 1) * count], QUESTION)
            )

    def _prefill(self) -> None:
        ids = self._ids(self.settings.prompt_tokens)

        def read(_: int) -> None:
            self.subject.truncate(0)
            self._next(ids)

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
            self.subject.truncate(0)
            token = self._next(ids)
            meter = EnergyMeter()
            begun = last = time.perf_counter()
            for _ in range(count):
                token = self._next([token])
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
            if depth + DEPTH_TOKENS > self.subject.context_length:
                break
            ids = self._ids(depth)
            self.subject.truncate(0)
            for start in range(0, depth, DEPTHS[0]):
                token = self._next(ids[start : start + DEPTHS[0]])
            rates = []
            for turn in range(min(self.settings.runs, 3) + 1):
                self.subject.truncate(depth)
                begun = time.perf_counter()
                for _ in range(DEPTH_TOKENS):
                    token = self._next([token])
                if turn:  # the first warms up
                    rates.append(DEPTH_TOKENS / (time.perf_counter() - begun))
            self._tell(f"depth{depth}", "tok/s", rates)

    def _draw(self) -> None:
        """Whole pictures, and their steps; where those are one program, each step's share of the whole."""
        steps: list[float] = []

        def draw(index: int) -> None:
            begun = time.perf_counter()
            found = self.subject.draw(index)
            if index:  # the first warms up
                share = (time.perf_counter() - begun) / self.subject.draws
                steps.extend(found or [share])

        self._repeat("draw", draw)
        self._tell("draw_step", "s", steps)

    def _ids(self, count: int) -> list[int]:
        words = self.subject.words
        return [words[index % len(words)] for index in range(count)]

    def _next(self, ids: list[int]) -> int:
        return self.subject.decode(self.subject.embed(ids))

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
    pixels = np.empty((height, width, 3), np.uint8)
    columns = np.linspace(0, 31, width, dtype=np.uint8)[:, None]
    for index in range(height):  # row by row: it should not show in the process' memory
        pixels[index] = generator.integers(0, 24, (width, 3), np.uint8) + columns + 200 * index // height
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
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
        out.write(json.dumps({"done": runner.subject.runtime}) + "\n")
    except MobileMMError as error:
        out.write(json.dumps({"error": str(error)}) + "\n")
        out.flush()
        sys.exit(2)
    finally:
        out.flush()


if __name__ == "__main__":
    main()
