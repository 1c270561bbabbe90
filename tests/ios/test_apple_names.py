"""What is looked up of Apple's names: that a stand-in of another type or value would be found."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "ios_demo"
FEATURES = "predictionFromFeaturesError(input: MLFeatureProvider, error?: interop.Reference<NSError>): "


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module("apple_names")


@pytest.mark.parametrize(
    ("swift", "metadata", "told"),
    [
        ("case float16 = 65552", "Float16 = 65552,", "same"),
        ("case float16 = 65553", "Float16 = 65552,", "other"),
        ("public let shape: [NSNumber]", "readonly shape: NSArray<number>;", "same"),
        ("public let shape: [String]", "readonly shape: NSArray<number>;", "other"),
        ("open var sourceType: SourceType { get }", "sourceType: MLModelSourceType;", "same"),
        ("open var delegate: (any Delegate)? {", "delegate: any | null;", ""),
        (
            "public let names: [String: MLFeatureDescription]",
            "readonly names: NSDictionary<string, MLFeatureDescription>;",
            "same",
        ),
        (
            "public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {",
            f"{FEATURES}MLFeatureProvider;",
            "same",
        ),
        (
            "public func prediction(from input: any MLFeatureProvider) throws -> String {",
            f"{FEATURES}MLFeatureProvider;",
            "other",
        ),
        (
            "public class func compileModel(at modelURL: URL) async throws -> URL { try compile(modelURL) }",
            "static compileModelAtURLCompletionHandler(modelURL: NSURL, handler: (p1: NSURL | null, "
            "p2: NSError | null) => void): void;",
            "same",
        ),
        (
            "public class func compileModel(at modelURL: URL, twice: Bool) async throws -> URL {",
            "static compileModelAtURLCompletionHandler(modelURL: NSURL, handler: (p1: NSURL | null, "
            "p2: NSError | null) => void): void;",
            "other",
        ),
    ],
)
def test_types_and_values_are_compared(names: Any, swift: str, metadata: str, told: str) -> None:
    assert names.agreement("MLModel", "member", swift, metadata) == told


def test_the_list_is_of_all_names_in_the_stand_ins(names: Any) -> None:
    """Without the metadata: what is new in a stand-in is not in the list until it is written anew."""
    text = names.FOUND.read_text(encoding="utf-8")
    for folder in names.STAND_INS.iterdir():
        if not folder.is_dir() or folder.name in names.OTHERS:
            continue
        for of, name, label in names.stand_in_names(folder.name):
            swift = (f"{of}.{name}" if of else name) + (f"({label}:)" if label else "")
            assert f"| {folder.name} | `{swift}` |" in text or f"- {folder.name}: `{swift}`" in text, swift
