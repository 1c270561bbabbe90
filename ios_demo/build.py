#!/usr/bin/env python3
"""Builds and tests the Swift package on Linux, with a Swift that is unpacked into build/ios.

    python ios_demo/build.py test --bundle FOLDER --vectors FOLDER --coreml-bundle FOLDER
                                   --coreml-default FOLDER --recording FOLDER --drawing FOLDER
                                   --zips FOLDER [--sanitize address] [-- OPTION…]
    python ios_demo/build.py check
    python ios_demo/build.py run -- run BUNDLE --prompt TEXT

Needs Debian's apt, and root or the right to make user namespaces. On a Mac, `swift test` and `swift run` do
it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from download_server import serving
from toolchain import BuildError, inside, unpack

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "build" / "ios"
ROOT = OUT / "toolchain"
PACKAGE = HERE / "MobileMMKit"


def onnxruntime_library() -> Path:
    """The shared library that this Python's onnxruntime runs on: kernels differ between versions."""
    found = find_spec("onnxruntime")
    if found is None or not found.submodule_search_locations:
        raise BuildError("onnxruntime is missing; `make setup` installs it")
    libraries = sorted(Path(found.submodule_search_locations[0], "capi").glob("libonnxruntime.so*"))
    if not libraries:
        raise BuildError(f"{found.origin}: this onnxruntime brings no libonnxruntime.so")
    return libraries[0]


def swift(
    command: str,
    *options: str,
    scratch: str,
    binds: Iterable[Path] = (),
    environment: dict[str, str] | None = None,
) -> None:
    """`swift build`, `test` or `run` of the package; `scratch` names the folder of what is made."""
    library = onnxruntime_library()
    OUT.mkdir(parents=True, exist_ok=True)
    unpack(ROOT)
    inside(
        ROOT,
        ["swift", command, "--package-path", PACKAGE, "--scratch-path", OUT / scratch, *options],
        cwd=PACKAGE,
        binds=[HERE.parent, OUT, library.parent, *binds],
        environment={"MOBILEMM_ONNXRUNTIME": str(library), "OMP_NUM_THREADS": "1", **(environment or {})},
        shown=True,
    )


# Optimized, because pictures and hashes are computed by the megabyte; tests still see what is internal.
OPTIMIZED = ("--configuration", "release", "-Xswiftc", "-enable-testing")


def test(folders: dict[str, Path], sanitize: str | None, options: Sequence[str]) -> None:
    """The tests, with the branches for Apple's systems compiled against stand-ins."""
    how = (*OPTIMIZED, *(("--sanitize", sanitize) if sanitize else ()))
    variables = {f"MOBILEMM_{name.upper()}": str(path.resolve()) for name, path in folders.items()}
    variables["MOBILEMM_STAND_INS"] = "1"
    # libcurl, Foundation and XCTest leave a few kilobytes behind at the end, which are not the package's.
    variables["ASAN_OPTIONS"] = "detect_leaks=0"
    scratch = f"tests-{sanitize}" if sanitize else "tests"
    # What was compiled for another run's recordings is of no use.
    caches = OUT / scratch / "caches"
    shutil.rmtree(caches, ignore_errors=True)
    caches.mkdir(parents=True)
    variables["XDG_CACHE_HOME"] = str(caches)
    with serving(folders["bundle"]) as address:
        variables["MOBILEMM_SERVER"] = address
        swift("test", *how, *options, scratch=scratch, binds=folders.values(), environment=variables)


# In the order in which they need each other.
STAND_INS = (
    *("CoreGraphics", "CoreVideo", "CoreML", "CryptoKit", "ImageIO", "os", "UniformTypeIdentifiers", "UIKit"),
    *("SwiftUI", "PhotosUI", "Charts", "AppIntents", "ExecuTorch"),
)


def check() -> None:
    """Lints all Swift files, and type-checks those for Apple's systems, the app included, in Swift 6 mode."""
    unpack(ROOT)
    modules = OUT / "modules"
    modules.mkdir(parents=True, exist_ok=True)
    binds = [HERE.parent, OUT]
    found = [word for folder in (modules, PACKAGE / "Sources" / "CZlib") for word in ("-I", str(folder))]
    swiftc = ["swiftc", "-swift-version", "6", "-warnings-as-errors", *found]

    def module(name: str, folder: Path, *options: str) -> None:
        words = ["-emit-module", "-parse-as-library", "-module-name", name]
        words += ["-o", str(modules / f"{name}.swiftmodule")]
        inside(ROOT, [*swiftc, *words, *options, *sorted(folder.glob("*.swift"))], binds=binds)

    for name in STAND_INS:
        module(name, PACKAGE / "StandIns" / name)
    module("MobileMMKit", PACKAGE / "Sources" / "MobileMMKit")
    for folder in (PACKAGE / "Sources" / "mobilemm-swift", HERE / "App" / "MobileMM"):
        files = sorted(folder.glob("*.swift"))
        inside(ROOT, [*swiftc, "-typecheck", "-parse-as-library", *files], binds=binds)
        print(f"type-checked in Swift 6 mode: {folder.relative_to(HERE)} ({len(files)} files)", flush=True)
    lint = ["swift-format", "lint", "--strict", "--recursive", "--configuration", ".swift-format"]
    folders = ["App", *(f"MobileMMKit/{name}" for name in ("Package.swift", "Sources", "Tests"))]
    inside(ROOT, [*lint, *folders], cwd=HERE, binds=binds)
    print("swift-format: nothing to say")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    testing = commands.add_parser("test", help="run the package's tests")
    testing.add_argument("--bundle", type=Path, required=True)
    testing.add_argument("--vectors", type=Path, required=True, help="by tests/phone_vectors.py")
    testing.add_argument("--coreml-bundle", type=Path, required=True, help="by tests/ios/drawing.py")
    testing.add_argument("--coreml-default", type=Path, required=True, help="of the model that ships")
    testing.add_argument("--executorch-bundle", type=Path, required=True, help="by tests/ios/drawing.py")
    testing.add_argument("--recording", type=Path, required=True, help="by tests/ios/recording.py, of all")
    testing.add_argument("--drawing", type=Path, required=True, help="by tests/ios/drawing.py")
    testing.add_argument("--zips", type=Path, required=True, help="by tests/ios/zips.py")
    testing.add_argument("--sanitize", choices=["address", "thread"])
    testing.add_argument("options", nargs="*", help="further options of `swift test`, behind --")
    commands.add_parser("check", help="lint, and type-check what is for Apple's systems against stand-ins")
    running = commands.add_parser("run", help="run mobilemm-swift")
    running.add_argument("words", nargs="+", help="its arguments, behind --")
    arguments = parser.parse_args()
    try:
        if arguments.command == "check":
            check()
        elif arguments.command == "test":
            names = (
                *("bundle", "vectors", "coreml_bundle", "coreml_default", "executorch_bundle"),
                *("recording", "drawing", "zips"),
            )
            folders = {name: getattr(arguments, name) for name in names}
            test(folders, arguments.sanitize, arguments.options)
        else:
            places = [Path(word) for word in arguments.words if Path(word).exists()]
            words = [str(Path(word).resolve()) if Path(word).exists() else word for word in arguments.words]
            swift("run", *OPTIMIZED, "mobilemm-swift", *words, scratch="swift", binds=places)
    except BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
