"""The default model as an ExecuTorch program: its own runner, and its own profile, say what we say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobilemm.export.assemble import export_bundle
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.runtime.bundle import Bundle
from tests.export.targets.executorch_judges import delegation_is_executed, runner_and_session

pytest.importorskip("executorch")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """In 4 bits by rounding, which takes no time."""
    options = ExportOptions(plan=make_plan("int4", method="rtn"), verify=False)
    folder = tmp_path_factory.mktemp("bundles") / "default"
    return export_bundle(None, find_target("executorch"), folder, options).bundle


def test_the_stock_runner_says_the_same(default: Bundle) -> None:
    said, pieces = runner_and_session(default, 24)
    assert said == pieces
    assert len(set(pieces)) > 2


def test_delegation_is_what_is_executed(default: Bundle, tmp_path: Path) -> None:
    events = delegation_is_executed(default, tmp_path)
    layers = default.manifest.model.num_layers
    assert sum(count for event, count in events.items() if "QB4W" in event) == 7 * layers + 1
