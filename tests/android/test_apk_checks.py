"""The look-ups by which `make android` checks an APK, on classes and libraries made here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "android_demo"))

import apk_checks
from class_files import read_jar

needs_javac = pytest.mark.skipif(shutil.which("javac") is None, reason="there is no JDK")
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def jar(folder: Path, name: str, sources: dict[str, str], classpath: Path | None = None) -> Path:
    work = folder / name
    for path, text in sources.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_text(text)
    command = ["javac", "--release", "17", "-d", str(work / "out"), *(str(work / path) for path in sources)]
    subprocess.run([*command, *(["-cp", str(classpath)] if classpath else [])], check=True)
    found = folder / f"{name}.jar"
    with zipfile.ZipFile(found, "w") as archive:
        for path in (work / "out").rglob("*.class"):
            archive.write(path, path.relative_to(work / "out").as_posix())
    return found


@needs_javac
def test_what_an_older_android_lacks_is_named(tmp_path: Path) -> None:
    view = "package android.view; public class View {{ public void old() {{}} {} }}"
    new = jar(
        tmp_path, "new", {"android/view/View.java": view.format("public int fresh(int a) { return a; }")}
    )
    old = jar(tmp_path, "old", {"android/view/View.java": view.format("")})
    use = "void use() { old(); fresh(1); hashCode(); }"
    mine = f"package mine; public class Mine extends android.view.View {{ {use} }}"
    app = jar(tmp_path, "app", {"mine/Mine.java": mine}, new)
    assert apk_checks.AndroidClasses(new).check([app])[1] == []
    (missing,) = apk_checks.AndroidClasses(old).check([app])[1]
    assert missing == ("android/view/View", ("fresh", "(I)I"), {"mine/Mine"})


@needs_javac
@needs_cc
def test_native_methods_are_found_in_libraries(tmp_path: Path) -> None:
    methods = "native void one(); native int two_2(String a); native void lost();"
    source = f"package mine; public class Mine {{ {methods} }}"
    app = jar(tmp_path, "app", {"mine/Mine.java": source})
    (tmp_path / "mine.c").write_text(
        "void Java_mine_Mine_one(void) {} int Java_mine_Mine_two_12__Ljava_lang_String_2(void) { return 0; }"
    )
    library = tmp_path / "mine.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "mine.c")], check=True)
    exported = {"mine.so": apk_checks.exported(library.read_bytes())}
    natives = sorted((one.name, name) for one in read_jar(app) for name, _ in one.natives)
    lost = [native for native in natives if not apk_checks.is_exported(native, exported)]
    assert len(natives) == 3
    assert lost == [("mine/Mine", "lost")]
