"""The Xcode project, read by a kept parser: whole, without lists of files, agreeing with the package."""

from __future__ import annotations

import plistlib
import re
from pathlib import Path
from typing import Any

import openstep_parser
import pytest

DEMO = Path(__file__).parents[2] / "ios_demo"
ID = re.compile(r"[0-9A-F]{24}")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (DEMO / "MobileMM.xcodeproj" / "project.pbxproj").open(encoding="utf-8") as file:
        found: dict[str, Any] = openstep_parser.OpenStepDecoder.ParseFromFile(file)
    return found


def of_kind(project: dict[str, Any], isa: str) -> list[dict[str, Any]]:
    return [value for value in project["objects"].values() if value["isa"] == isa]


def identifiers(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set().union(*map(identifiers, value.values()))
    if isinstance(value, list):
        return set().union(set(), *map(identifiers, value))
    return {value} if ID.fullmatch(value) else set()


def test_every_object_is_there_and_used(project: dict[str, Any]) -> None:
    objects = set(project["objects"])
    used = set().union(*(identifiers(value) for value in project["objects"].values()))
    used.add(project["rootObject"])
    assert used == objects


def test_sources_are_folders_that_are_there_and_no_list_of_files(project: dict[str, Any]) -> None:
    (folder,) = of_kind(project, "PBXFileSystemSynchronizedRootGroup")
    assert sorted((DEMO / folder["path"]).glob("*.swift"))
    (sources,) = of_kind(project, "PBXSourcesBuildPhase")
    assert sources["files"] == []
    # Such folders came with Xcode 16.
    assert int(project["objectVersion"]) >= 77


def test_the_target_takes_the_package_beside_it(project: dict[str, Any]) -> None:
    (reference,) = of_kind(project, "XCLocalSwiftPackageReference")
    (product,) = of_kind(project, "XCSwiftPackageProductDependency")
    manifest = (DEMO / reference["relativePath"] / "Package.swift").read_text(encoding="utf-8")
    assert f'.library(name: "{product["productName"]}"' in manifest
    (target,) = of_kind(project, "PBXNativeTarget")
    (linked,) = of_kind(project, "PBXBuildFile")
    assert target["packageProductDependencies"] == [linked["productRef"]]
    (least,) = re.findall(r"\.iOS\(\.v(\d+)\)", manifest)
    settings = [one["buildSettings"] for one in of_kind(project, "XCBuildConfiguration")]
    targets = {one["IPHONEOS_DEPLOYMENT_TARGET"] for one in settings if "IPHONEOS_DEPLOYMENT_TARGET" in one}
    assert targets == {f"{least}.0"}
    assert {one["SWIFT_VERSION"] for one in settings if "SWIFT_VERSION" in one} == {"6.0"}


def test_what_the_app_asks_the_system_for_is_told(project: dict[str, Any]) -> None:
    settings = [
        one["buildSettings"]
        for one in of_kind(project, "XCBuildConfiguration")
        if "PRODUCT_BUNDLE_IDENTIFIER" in one["buildSettings"]
    ]
    assert len(settings) == 2
    for one in settings:
        assert one["INFOPLIST_KEY_NSCameraUsageDescription"]
        entitlements = plistlib.loads((DEMO / one["CODE_SIGN_ENTITLEMENTS"]).read_bytes())
        assert entitlements == {"com.apple.developer.kernel.increased-memory-limit": True}
