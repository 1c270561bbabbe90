"""An export that is killed at any moment: what then stands under its name, and what the next run makes of it.

One process imports everything and converts the parts, which happens in memory and leaves nothing on the
disk. Then it forks a child for each trial. The child runs the whole of `export_bundle`, from reading the
checkpoint to the bundle in its place, with the graphs that lie converted in its memory, and is killed a
random time behind a random line of its report: so the moments are spread over the whole run however busy
the machine is. (All threads, those of onnxruntime among them, are started behind the fork.)
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

FRESH, REPLACING = 70, 30
LINES = 12  # of a whole run's report
OLD, NEW = 256, 512  # lengths of context, by which the bundles are told apart


@pytest.mark.slow
def test_a_hundred_kills(checkpoint: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, __file__, str(checkpoint), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.splitlines()[-1])

    fresh, replacing = told["fresh"], told["replacing"]
    assert len(fresh) + len(replacing) == 100
    # Nothing, or a bundle that opens; where there was one before, it or the new one.
    assert {trial["found"] for trial in fresh} <= {None, NEW}, fresh
    assert {trial["recovered"] for trial in replacing} <= {OLD, NEW}, replacing
    assert sum(trial["found"] is None for trial in replacing) <= 3  # between two renames, a moment
    # The kills were spread over the run: most came in time, and found from none to all parts finished.
    assert sum(trial["killed"] for trial in fresh + replacing) >= 70
    assert len({trial["parts"] for trial in fresh}) >= 3
    assert {trial["recovered"] for trial in replacing} == {OLD, NEW}
    # The runs behind the last kills took over what was finished, and left the bundle and nothing else.
    for last in (told["after_fresh"], told["after_replacing"]):
        assert last["found"] == NEW
        assert last["names"] == ["b"]
        assert "decoder: unchanged" in last["told"]
        assert last["told"][-1] == "assembling"


# --- the other process --------------------------------------------------------------------------------------


class Converted(Exception):
    """Raised when a graph is there, before anything is written."""


def convert(checkpoint: Path) -> None:
    """Puts what torch.onnx.export makes of each part in its place."""
    import torch

    from mobilemm.export.model import open_model
    from mobilemm.export.targets import find_target
    from mobilemm.export.verify import with_weights

    really = torch.onnx.export
    held: dict[Any, Any] = {}

    def key(module: Any, names: list[str]) -> Any:
        spec = getattr(getattr(module, "module", None), "spec", None)
        return (*names, None if spec is None else spec.context_length)

    def keep(module: Any, *arguments: Any, **options: Any) -> Any:
        held[key(module, options["input_names"])] = really(module, *arguments, **options)
        raise Converted

    torch.onnx.export = keep
    for length in (OLD, NEW):
        for part in open_model(str(checkpoint), options_of(length)).parts.values():
            if length == NEW or part.name == "decoder":
                with suppress(Converted):
                    module = with_weights(part.module, part.weights)
                    find_target("onnx").write(part, module, Path("/nowhere"))
    torch.onnx.export = lambda module, *_, **options: held[key(module, options["input_names"])]


def options_of(length: int) -> Any:
    from mobilemm.export.options import ExportOptions
    from mobilemm.export.quantization import make_plan

    return ExportOptions(plan=make_plan("fp32", vision="fp32"), context_length=length, verify=False)


def start(checkpoint: Path, destination: Path, length: int, told: Path) -> int:
    """A child that exports; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        from mobilemm.export.assemble import export_bundle
        from mobilemm.export.targets import find_target

        lines: list[str] = []

        def report(text: str) -> None:
            lines.append(text)
            told.write_text("\n".join(lines))

        export_bundle(
            str(checkpoint),
            find_target("onnx"),
            destination,
            options_of(length),
            overwrite=True,
            report=report,
        )
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def lines_of(told: Path) -> list[str]:
    return told.read_text().splitlines() if told.exists() else []


def finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the export ended with {status}"


def found(destination: Path) -> int | None:
    """The bundle's length of context, None where there is nothing. What does not open raises."""
    from mobilemm.runtime.bundle import open_bundle

    if not os.path.lexists(destination):
        return None
    return open_bundle(destination).manifest.model.context_length


def main(checkpoint: Path, folder: Path) -> None:
    import torch

    from mobilemm.export.bundle import recover
    from mobilemm.runtime.pytorch import quiet

    quiet()
    torch.set_num_threads(1)
    convert(checkpoint)
    place, told = folder / "place" / "b", folder / "told"
    place.parent.mkdir()
    work = place.with_name(".b.parts")
    chance = random.Random(0)

    def whole(length: int) -> dict[str, Any]:
        begin = time.monotonic()
        finish(start(checkpoint, place, length, told))
        return {
            "seconds": time.monotonic() - begin,
            "found": found(place),
            "names": sorted(os.listdir(place.parent)),
            "told": lines_of(told),
        }

    def kill(length: int, step: float) -> dict[str, Any]:
        told.unlink(missing_ok=True)
        child = start(checkpoint, place, length, told)
        line = chance.randrange(LINES)
        ended = 0
        while not ended and len(lines_of(told)) < line:
            time.sleep(0.002)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(chance.uniform(0, step))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), f"the export ended with {status}"
        return {
            "killed": status != 0,
            "found": found(place),
            "parts": len(list(work.glob("[a-z]*.json"))) if place.parent.is_dir() else 0,
        }

    def kill_behind(line: str, length: int) -> None:
        told.unlink(missing_ok=True)
        child = start(checkpoint, place, length, told)
        while line not in lines_of(told):
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def clean(*paths: Path) -> None:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)

    old = folder / "old"
    whole(OLD)
    os.rename(place, old)
    step = 2 * whole(NEW)["seconds"] / LINES
    fresh = []
    for _ in range(FRESH):
        clean(place)
        if chance.random() < 0.5:  # else the next run goes on where this one was stopped
            clean(work)
        fresh.append(kill(NEW, step))
    clean(place)
    kill_behind("vision: converting", NEW)
    after_fresh = whole(NEW)

    clean(place)
    shutil.copytree(old, place)
    whole(NEW)
    replacing = []
    for _ in range(REPLACING):
        clean(place, work)
        shutil.copytree(old, place)
        trial = kill(NEW, step)
        recover(place)  # what the next run does first
        replacing.append({**trial, "recovered": found(place)})
    clean(place, work)
    shutil.copytree(old, place)
    kill_behind("assembling", NEW)
    after_replacing = whole(NEW)
    print(
        json.dumps(
            {
                "fresh": fresh,
                "replacing": replacing,
                "after_fresh": after_fresh,
                "after_replacing": after_replacing,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
