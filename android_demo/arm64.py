#!/usr/bin/env python3
"""Runs bundles on emulated arm64 processors, and compares what they say with this computer's answers.

    python android_demo/arm64.py BUNDLE… [--cpu cortex-a53 --cpu neoverse-n1 --cpu max] [--tokens N]

In float32 every token must be equal, and of every bundle each part within its golden floor.
Debian's arm64 Python and qemu are unpacked below build/android/arm64, with the arm64 wheels of what
`mobilemm run` needs; nothing is installed. It is emulation: the numbers are real, the speed is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = ROOT / "build" / "android" / "arm64"
CATALOG = tomllib.loads((HERE / "gradle" / "libs.versions.toml").read_text(encoding="utf-8"))
# Older releases of qemu crash when onnxruntime is imported.
QEMU_SUITE, SUITE = "trixie", "bookworm"
SYSTEM = ("python3", "libstdc++6", "libgomp1")
# With their own version for arm64; numpy's and the others' are this environment's.
PACKAGES = ("numpy", "pillow", "tokenizers", "safetensors", "pydantic", "pydantic-core", "packaging")
PURE = (
    "typing-extensions",
    "annotated-types",
    "typing-inspection",
    "flatbuffers",
    "protobuf",
    "onnx",
    "ml-dtypes",
)
CPUS = ("cortex-a53", "neoverse-n1", "max")

ASK = """
import json, sys, time
from pathlib import Path
import onnxruntime, platform
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.self_check import self_check
from mobilemm.runtime.session import Session
bundle = open_bundle(sys.argv[1], verify=False)
backend = open_backend(bundle, 1)
answers = []
sampling = Sampling(max_new_tokens=int(sys.argv[2]))
for picture in sys.argv[3:]:
    session = Session(bundle, backend, sampling)
    session.look_at(picture)
    session.reply("What is in this picture?")
    answers.append(session.answer_ids)
session = Session(bundle, backend, sampling)
session.reply("Tell me about the sun.")
answers.append(session.answer_ids)
checks = [(check.part, check.passed, check.text) for check in self_check(bundle, backend)]
print(json.dumps({"machine": platform.machine(), "onnxruntime": onnxruntime.__version__,
                  "is_exact": bundle.manifest.parts["decoder"].quantization.bits == 32,
                  "answers": answers, "checks": checks}))
"""


def unpack_debian(packages: list[str], suite: str, architecture: str, folder: Path) -> None:
    """Debian's packages with what they need, unpacked into a folder by a private state of apt."""
    if (folder / "done").exists():
        return
    state = folder.with_suffix(".apt")
    for name in ("state/lists/partial", "cache/archives/partial", "etc/preferences.d"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    mirror = mirror_of_this_machine()
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (state / "etc" / "sources.list").write_text(f"deb [signed-by={keys}] {mirror} {suite} main\n")
    options = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "Dir::State": state / "state",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Etc": state / "etc",
        "Dir::Etc::sourcelist": state / "etc" / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Install-Recommends": "false",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run(
        [*apt, "-y", "--download-only", "install", *packages], check=True, stdout=subprocess.DEVNULL
    )
    folder.mkdir(parents=True, exist_ok=True)
    for package in sorted((state / "cache" / "archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    (folder / "done").touch()


def mirror_of_this_machine() -> str:
    """Where this machine's own apt gets its packages."""
    found = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SITE) $(REPO_URI)", "Codename: bookworm"],
        capture_output=True,
        text=True,
    ).stdout.split()
    uris = [word for word in found if "://" in word and "security" not in word]
    if not uris:
        sys.exit("error: this machine's apt has no sources of Debian bookworm")
    return uris[-1]


def wheels(folder: Path) -> None:
    """Of the app's onnxruntime, and of this environment's versions of the rest, for arm64."""
    if (folder / "done").exists():
        return
    wanted = [f"onnxruntime=={CATALOG['versions']['onnxruntime']}"]
    wanted += [f"{name}=={version(name)}" for name in (*PACKAGES, *PURE)]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 24, 17)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder),
            *(
                "--python-version",
                "3.11",
                "--only-binary=:all:",
                *platforms,
                "--platform=manylinux2014_aarch64",
            ),
            *wanted,
        ],
        check=True,
    )
    (folder / "done").touch()


def ask(command: list[str], environment: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [*command, "-c", ASK, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(command[:3])}: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument(
        "--cpu", action="append", help=f"qemu's name of a processor; left out: {', '.join(CPUS)}"
    )
    parser.add_argument("--tokens", type=int, default=8, help="of each answer, at most")
    parser.add_argument("--pictures", type=int, default=2, help="of the held-out drawings, to ask about")
    arguments = parser.parse_args()
    unpack_debian(["qemu-user"], QEMU_SUITE, "amd64", OUT / "qemu")
    unpack_debian(list(SYSTEM), SUITE, "arm64", OUT / "system")
    wheels(OUT / "packages")
    pictures = sorted((ROOT / "tests" / "assets" / "held_out").glob("*.png"))[: arguments.pictures]
    base = {**os.environ, "OMP_NUM_THREADS": "1"}
    # `make test-android` has put the app's version of onnxruntime there.
    same = ROOT / "build" / "android" / f"onnxruntime-{CATALOG['versions']['onnxruntime']}"
    here = {**base, "PYTHONPATH": f"{ROOT}{os.pathsep}{same}"}
    emulated = {**base, "PYTHONPATH": f"{ROOT}{os.pathsep}{OUT / 'packages'}", "PYTHONNOUSERSITE": "1"}
    failed = False
    for bundle in arguments.bundles:
        words = [str(bundle.resolve()), str(arguments.tokens), *map(str, pictures)]
        wanted = ask([sys.executable], here, words)
        print(
            f"{bundle}: {wanted['machine']} onnxruntime {wanted['onnxruntime']}: {wanted['answers']}",
            flush=True,
        )
        for cpu in arguments.cpu or CPUS:
            qemu = [str(OUT / "qemu/usr/bin/qemu-aarch64"), "-cpu", cpu, "-L", str(OUT / "system")]
            found = ask([*qemu, str(OUT / "system/usr/bin/python3.11")], emulated, words)
            equal = sum(one == other for one, other in zip(found["answers"], wanted["answers"], strict=True))
            count = len(wanted["answers"])
            print(f"  {found['machine']} {cpu}: {equal} of {count} answers equal: {found['answers']}")
            # How activations are rounded for int4 weights depends on the processor; float32 leaves no choice.
            failed = failed or (wanted["is_exact"] and equal < count)
            for part, passed, text in found["checks"]:
                print(f"    {'ok' if passed else 'FAILED'} {part}: {text}", flush=True)
                failed = failed or not passed
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
