"""What each operator takes: a table, and a trace for Perfetto or chrome://tracing.

    python -m mobilemm.bench.profiling < request.json

One photo, one prompt and some tokens, each run once to warm up and once to be recorded, by the runtime's
own profiler: onnxruntime's, ExecuTorch's ETDump, torch.profiler. Recording slows what it measures: look at
shares, not at sums.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mobilemm.bench.result import Settings, write_whole
from mobilemm.bench.runner import photograph
from mobilemm.bench.subject import BundleSubject, Subject, is_bundle
from mobilemm.errors import MobileMMError
from mobilemm.runtime.backends import Array, Backend, Decoder
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.manifest import Strict

if TYPE_CHECKING:
    from mobilemm.runtime.backends.executorch import ExecutorchProgram
    from mobilemm.runtime.backends.onnx import OnnxBackend

TOKENS = 16


class Operator(Strict):
    """All calls of one kind of operator in one phase. `seconds` without those of operators inside it."""

    phase: str
    name: str
    calls: int
    seconds: float


class Request(Strict):
    """What to profile, and the file for the trace."""

    folder: str
    trace: str
    settings: Settings = Settings()


@dataclass(frozen=True)
class Event:
    """One call of an operator in a part's run of that index; times in microseconds since the part's first."""

    part: str
    run: int
    name: str
    begin: float
    duration: float


class Profiler(Protocol):
    """A subject under a profiler."""

    @property
    def subject(self) -> Subject:
        """Not loaded yet."""

    def record(self, phase: str, action: Callable[[], Any]) -> None:
        """Runs it; what it does is recorded as that phase."""

    def end(self) -> tuple[list[Operator], list[dict[str, Any]]]:
        """The operators, and Chrome's trace events."""


def run_profile(request: Request) -> list[Operator]:
    """Profiles, writes the trace, and gives the operators, the most expensive first."""
    with tempfile.TemporaryDirectory() as scratch:
        profiler = _open(request, Path(scratch))
        subject = profiler.subject
        subject.load()
        if subject.takes_pictures and request.settings.images:
            pixels = subject.to_pixels(photograph(0))
            _twice(profiler, "photo", lambda: subject.look(pixels))
        count = request.settings.prompt_tokens
        ids = [subject.words[index % len(subject.words)] for index in range(count)]

        def read() -> None:
            subject.truncate(0)
            subject.decode(subject.embed(ids))

        def write() -> None:
            token = ids[0]
            for _ in range(TOKENS):
                token = subject.decode(subject.embed([token]))

        _twice(profiler, f"pp{count}", read)
        _twice(profiler, f"tg{TOKENS}", write)
        if subject.draws:
            _twice(profiler, "draw", lambda: subject.draw(0))
        operators, events = profiler.end()
    write_whole(json.dumps({"traceEvents": events}), Path(request.trace))
    return sorted(operators, key=lambda one: -one.seconds)


def _twice(profiler: Profiler, phase: str, action: Callable[[], Any]) -> None:
    profiler.record("", action)  # warms up
    profiler.record(phase, action)


def _open(request: Request, scratch: Path) -> Profiler:
    folder = Path(request.folder)
    if not is_bundle(folder):
        return CheckpointProfiler(folder, request.settings)
    bundle = open_bundle(folder, verify=False)
    if bundle.manifest.target == "coreml":
        raise MobileMMError(
            f"{folder}: Core ML's operators are profiled by Xcode: open the package there, Performance"
        )
    threads = request.settings.threads
    if bundle.manifest.target == "onnx":
        from mobilemm.runtime.backends.onnx import OnnxBackend

        onnx = OnnxBackend(bundle, threads, scratch)
        return BundleProfiler(
            bundle, request.settings, onnx, lambda recording: onnx_events(onnx, recording.phases)
        )
    from mobilemm.runtime.backends.executorch import ExecutorchBackend, ExecutorchDecoder

    executorch = ExecutorchBackend(bundle, threads, profiled=True)

    def events(recording: Recording) -> Iterator[Event]:
        programs = {part: executorch.program(part) for part in recording.phases if part != "decoder"}
        for decoder in recording.decoders:  # one, with a program of its own
            assert isinstance(decoder, ExecutorchDecoder)
            programs["decoder"] = decoder.program
        return executorch_events(programs, scratch)

    return BundleProfiler(bundle, request.settings, executorch, events)


# --- bundles ------------------------------------------------------------------------------------------------


class BundleProfiler:
    """Knows which run of which part belongs to which phase; what a part did in it, the runtime tells."""

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings,
        backend: Backend,
        events: Callable[[Recording], Iterable[Event]],
    ) -> None:
        self.recording, self.events = Recording(backend), events
        self.subject: Subject = BundleSubject(bundle, settings.threads, settings.steps, self.recording)

    def record(self, phase: str, action: Callable[[], Any]) -> None:
        self.recording.phase = phase
        action()

    def end(self) -> tuple[list[Operator], list[dict[str, Any]]]:
        events = list(self.events(self.recording))
        last = {event.part: event.run for event in sorted(events, key=lambda event: event.run)}
        sums: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in events:
            # What loading ran comes first, and is no run of ours.
            phases = self.recording.phases[event.part]
            index = event.run - (last[event.part] + 1 - len(phases))
            if index >= 0 and phases[index]:
                sums[phases[index], event.name].append(event.duration / 1e6)
        operators = [
            Operator(phase=phase, name=name, calls=len(times), seconds=sum(times))
            for (phase, name), times in sums.items()
        ]
        return operators, chrome_trace(events)


class Recording:
    """A `Backend` that notes the phase of each run of each part."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.phase = ""
        self.phases: dict[str, list[str]] = defaultdict(list)
        self.prefills_in_pieces = backend.prefills_in_pieces
        self.decoders: list[Decoder] = []

    @property
    def runtime(self) -> str:
        return self.backend.runtime

    def load(self, part: str) -> None:
        self.backend.load(part)

    def release(self, part: str) -> None:
        self.backend.release(part)

    def run(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.phases[part].append(self.phase)
        return self.backend.run(part, inputs)

    def decoder(self) -> Decoder:
        decoder = self.backend.decoder()
        self.decoders.append(decoder)
        return RecordingDecoder(decoder, self)


class RecordingDecoder:
    """Its decoder, each call of which is a run of the part `decoder`."""

    def __init__(self, decoder: Decoder, recording: Recording) -> None:
        self.inner, self.recording = decoder, recording

    @property
    def length(self) -> int:
        return self.inner.length

    def decode(
        self, inputs_embeds: Array, position_ids: Array | None = None, logits_positions: Array | None = None
    ) -> Array:
        self.recording.phases["decoder"].append(self.recording.phase)
        return self.inner.decode(inputs_embeds, position_ids, logits_positions)

    def truncate(self, length: int) -> None:
        self.inner.truncate(length)


def onnx_events(backend: OnnxBackend, parts: Iterable[str]) -> Iterator[Event]:
    """By onnxruntime's own profiler, a file a session."""
    for part in parts:
        file = Path(backend.session(part).end_profiling())
        found = json.loads(file.read_text(encoding="utf-8"))
        runs = sorted(one["ts"] for one in found if one["name"] == "model_run")
        kernels = [one for one in found if one["name"].endswith("_kernel_time") and runs]
        for one in sorted(kernels, key=lambda one: one["ts"]):
            run = bisect_right(runs, one["ts"]) - 1
            yield Event(part, run, one["args"]["op_name"], one["ts"] - runs[0], one["dur"])


def executorch_events(programs: Mapping[str, ExecutorchProgram], scratch: Path) -> Iterator[Event]:
    """By ETDump; of what XNNPACK runs, its own operators."""
    from executorch.devtools import Inspector

    for part, program in programs.items():
        file = scratch / f"{part}.etdump"
        program.write_profile(file)
        blocks = [block for block in Inspector(etdump_path=str(file)).event_blocks if block.name == "Execute"]
        calls = [event for block in blocks for event in block.events if event.perf_data is not None]
        begin = min((event.start_time[0] for event in calls if event.start_time), default=0)
        for event in calls:
            name = executorch_name(event.name, event.is_delegated_op)
            if name is not None:
                times = zip(event.perf_data.raw, event.start_time, strict=True)
                for run, (milliseconds, at) in enumerate(times):
                    yield Event(part, run, name, (at - begin) / 1e3, milliseconds * 1e3)


def executorch_name(name: str, delegated: bool) -> str | None:
    """The operator's, None for what only holds others: a method, a call, a delegate."""
    if delegated:
        return f"XNNPACK {re.sub(r' #[0-9]+$', '', name)}"
    if name.startswith(("native_call_", "llama::")):
        return name.removeprefix("native_call_")
    return None


def chrome_trace(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Chrome's trace events, each part a process of its own."""
    made: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    for event in events:
        if event.part not in numbers:
            number = numbers[event.part] = len(numbers) + 1
            made.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": event.part}})
        made.append(
            {
                "ph": "X",
                "name": event.name,
                "pid": numbers[event.part],
                "tid": 1,
                "ts": event.begin,
                "dur": event.duration,
                "args": {"run": event.run},
            }
        )
    return made


# --- checkpoints --------------------------------------------------------------------------------------------


class CheckpointProfiler:
    """By torch.profiler."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        from mobilemm.bench.pytorch import CheckpointSubject

        self.subject: Subject = CheckpointSubject(folder, settings.threads, settings.steps)
        self.operators: list[Operator] = []
        self.trace: list[dict[str, Any]] = []

    def record(self, phase: str, action: Callable[[], Any]) -> None:
        if not phase:
            action()
            return
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            action()
        for one in profiler.key_averages():
            seconds = one.self_cpu_time_total / 1e6
            self.operators.append(Operator(phase=phase, name=one.key, calls=one.count, seconds=seconds))
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "trace.json")
            profiler.export_chrome_trace(str(file))
            self.trace += json.loads(file.read_text(encoding="utf-8"))["traceEvents"]

    def end(self) -> tuple[list[Operator], list[dict[str, Any]]]:
        return self.operators, self.trace


# --- the process --------------------------------------------------------------------------------------------


def profile(folder: Path, settings: Settings, trace: Path) -> list[Operator]:
    """Profiles in a process of its own. Raises MobileMMError for what cannot be profiled here."""
    from mobilemm.bench.host import runner_lines

    request = Request(folder=str(folder.resolve()), trace=str(trace.resolve()), settings=settings)
    command = [sys.executable, "-m", "mobilemm.bench.profiling"]
    found: list[Operator] = []
    for line in runner_lines(command, request.model_dump()):
        found += [Operator.model_validate(one) for one in line.get("operators", [])]
    return found


def main() -> None:
    """Serves the request on standard input. Errors are one line, `{"error": …}`, and exit code 2."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print goes elsewhere
    with out:
        try:
            operators = run_profile(Request.model_validate_json(sys.stdin.read()))
        except MobileMMError as error:
            out.write(json.dumps({"error": str(error)}) + "\n")
            out.flush()
            sys.exit(2)
        out.write(json.dumps({"operators": [one.model_dump() for one in operators], "done": ""}) + "\n")


if __name__ == "__main__":
    main()
