"""A bundle or checkpoint measured on this computer, beside what this machine could do at best."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mobilemm import __version__
from mobilemm.bench import machine
from mobilemm.bench.limits import Decoding, Rates, decode_limit, load_limit, prefill_limit
from mobilemm.bench.result import (
    BundleFacts,
    Condition,
    Figure,
    Limit,
    Machine,
    MemoryTrace,
    Result,
    Settings,
    Unit,
)
from mobilemm.bench.runner import DEPTH_TOKENS
from mobilemm.bench.subject import is_bundle
from mobilemm.errors import MobileMMError, one_line
from mobilemm.runtime.bundle import open_bundle

# Each in a fresh process, which is what makes them slow.
LOADS = 3

WHAT = {
    "load_cold": "load, files on disk",
    "load_warm": "load, files in memory",
    "image": "photo: decode and resize",
    "vision": "photo: encode, project",
    "ttft": "photo to first token",
    "prefill": "read a prompt",
    "decode": "write",
    "token": "write one token",
    "energy": "energy of one token",
    "draw": "draw a picture",
    "draw_step": "draw: one step",
}


@dataclass
class Found:
    """What runners told."""

    figures: dict[str, tuple[Unit, list[float]]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    trace: dict[str, list[Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    bundle: BundleFacts | None = None
    decoding: Decoding | None = None
    runtime: str = ""

    def take(self, line: dict[str, Any], names: dict[str, str]) -> None:
        """One line; `names` renames figures."""
        if "figure" in line:
            name = names.get(line["figure"], line["figure"])
            self.figures.setdefault(name, (line["unit"], []))[1].extend(line["runs"])
        elif "peak" in line:
            self.peaks[line["peak"]] = max(line["bytes"], self.peaks.get(line["peak"], 0))
        elif "phase" in line:
            self.phases[line["phase"]] = line["begins"]
        elif "bundle" in line:
            self.bundle = BundleFacts.model_validate(line["bundle"])
            self.decoding = Decoding.model_validate(line["decoding"])
        elif "absent" in line:
            self.absent = line["absent"]
        elif "trace" in line:
            self.trace = line["trace"]
        elif "done" in line:
            self.runtime = line["done"]


def bench_here(
    folder: Path, settings: Settings, report: Callable[[str], None] = lambda _: None, device: str = "host"
) -> Result:
    """Measures a bundle, or a checkpoint on PyTorch.

    Raises MobileMMError when it is damaged, or a part cannot be run.
    """
    files = _files(folder)
    threads = settings.threads or machine.cores()
    report("measuring the machine")
    rates = _rates(threads)
    before = machine.condition()
    found = Found()
    for turn in range(LOADS):
        if not drop_from_memory(files):
            break
        report(f"loading, cold ({turn + 1}/{LOADS})")
        run(folder, "load", settings, found, {"load": "load_cold"})
    for turn in range(LOADS - 1):
        report(f"loading, warm ({turn + 1}/{LOADS})")
        run(folder, "load", settings, found, {"load": "load_warm"})
    report("measuring")
    run(folder, "all", settings, found, {"load": "load_warm"})
    after = machine.condition()
    report("measuring the machine again")
    again = _rates(threads)  # others may have used it: its best is what it can do
    best = Rates(max(rates.bandwidth, again.bandwidth), max(rates.operations, again.operations))
    return _result(settings, best, before, after, found, device)


def _rates(threads: int) -> Rates:
    return Rates(machine.read_bandwidth(threads), machine.operation_rate(threads))


def _files(folder: Path) -> list[Path]:
    """What loading reads. Raises MobileMMError for a damaged bundle."""
    if is_bundle(folder):
        bundle = open_bundle(folder)
        return [bundle.path(file.path) for file in bundle.manifest.files]
    from mobilemm.bench.pytorch import checkpoint_files

    return checkpoint_files(folder)


def drop_from_memory(files: Iterable[Path]) -> bool:
    """Asks the system to forget what it holds of files; False where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def run(folder: Path, what: str, settings: Settings, found: Found, names: dict[str, str]) -> None:
    """One runner's process, whose figures `found` takes, some by other names."""
    request = {"folder": str(folder.resolve()), "what": what, "settings": settings.model_dump()}
    command = [sys.executable, "-m", "mobilemm.bench.runner"]
    for line in runner_lines(command, request):
        found.take(line, names)


def runner_lines(command: list[str], request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a runner tells, line by line. Raises MobileMMError for what it calls an error, or when it dies."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        # Little is said on stderr, and read when all is over.
        out, said = process.communicate(json.dumps(request))
    except BaseException:
        process.kill()
        process.wait()
        raise
    done = False
    for text in out.splitlines():
        line = json.loads(text)
        if "error" in line:
            raise MobileMMError(line["error"])
        done = done or "done" in line
        yield line
    if process.returncode or not done:
        last = said.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise MobileMMError(f"the measuring process ended early: {one_line(last[0])}")


def main() -> None:
    """Serves a request on standard input, as JSON: folder, settings, device. For `mobilemm.bench.ssh`."""
    request = json.loads(sys.stdin.read())
    settings = Settings.model_validate(request["settings"])

    def say(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    try:
        found = bench_here(
            Path(request["folder"]), settings, lambda text: say(report=text), request["device"]
        )
        say(result=found.model_dump())
    except MobileMMError as error:
        say(error=str(error))


def label(name: str, settings: Settings) -> str:
    """A figure's name, in llama-bench's words where it has one."""
    known = {"prefill": f"pp{settings.prompt_tokens}", "decode": f"tg{settings.new_tokens}"}
    return known.get(name, name)


def _result(
    settings: Settings, rates: Rates, before: Condition, after: Condition, found: Found, device: str
) -> Result:
    bundle, decoding = found.bundle, found.decoding
    assert bundle is not None
    assert decoding is not None
    limits: dict[str, Limit] = {
        "prefill": prefill_limit(decoding, settings, rates),
        "decode": decode_limit(decoding, settings.prompt_tokens + settings.new_tokens / 2, rates),
        "load_warm": load_limit(decoding, rates),
    }
    figures = [
        Figure(
            name=label(name, settings),
            what=WHAT[name],
            unit=found.figures[name][0],
            runs=found.figures[name][1],
            limit=limits.get(name),
        )
        for name in WHAT
        if name in found.figures
    ]
    depths = sorted(int(name.removeprefix("depth")) for name in found.figures if name.startswith("depth"))
    for depth in depths:
        figures.append(
            Figure(
                name=f"tg{DEPTH_TOKENS}@d{depth}",
                what=f"write after {depth:,} tokens",
                unit="tok/s",
                runs=found.figures[f"depth{depth}"][1],
                limit=decode_limit(decoding, depth + DEPTH_TOKENS / 2, rates),
            )
        )
    figures += [
        Figure(name=f"memory_{phase}", what=f"peak memory: {phase}", unit="B", runs=[float(size)])
        for phase, size in found.peaks.items()
    ]
    if found.peaks:
        most = float(max(found.peaks.values()))
        figures.append(Figure(name="memory", what="peak memory of the process", unit="B", runs=[most]))
    absent = dict(found.absent)
    if "energy" not in found.figures:
        absent["energy"] = "no counter of the processor's energy can be read"
    if not found.peaks:
        absent["memory"] = "this system does not count a process' peak"
    if "load_cold" not in found.figures:
        absent["load_cold"] = "this system cannot be asked to forget files"
    if bundle.target == "coreml" and sys.platform != "darwin":
        absent["Core ML"] = "these are figures of the reference interpreter; Core ML runs on Apple's systems"
    return Result(
        mobilemm=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        runtime=found.runtime,
        machine=Machine(
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            processor=machine.processor(),
            cores=machine.cores(),
            memory=machine.memory(),
            bandwidth=rates.bandwidth,
            operations=rates.operations,
            before=before,
            after=after,
        ),
        bundle=bundle,
        settings=settings,
        figures=figures,
        memory=MemoryTrace(**found.trace, phases=found.phases) if found.trace.get("bytes") else None,
        absent=absent,
    )


if __name__ == "__main__":
    main()
