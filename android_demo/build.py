#!/usr/bin/env python3
"""Builds and tests the Android demo where Google's servers cannot be reached: Java 17, Maven, and this file.

    python android_demo/build.py test --bundle FOLDER --vectors FOLDER --drawing FOLDER
    python android_demo/build.py test-executorch (the same and) --answers FOLDER
    python android_demo/build.py test-app --bundle FOLDER --vectors FOLDER --drawing FOLDER
    python android_demo/build.py apk [--bundle FOLDER]
    python android_demo/build.py check

Sources and versions are those of the Gradle project beside it: `src/main` and `src/test` of each module,
and `gradle/libs.versions.toml`. What is fetched stays in Maven's own repository; what is made is in
build/android.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import apk_checks
from class_files import read_jar

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "build" / "android"
CATALOG = tomllib.loads((HERE / "gradle" / "libs.versions.toml").read_text(encoding="utf-8"))
VERSIONS: dict[str, str] = CATALOG["versions"]
RESOLVER = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:build-classpath"
TRIES = 3


class BuildError(Exception):
    """What failed, and what to do, in a line or a compiler's own words."""


def run(command: Sequence[str | Path], tries: int = 1, cwd: Path | None = None) -> str:
    """A program's output. Raises BuildError with it when the program fails."""
    words = [str(word) for word in command]
    for attempt in range(1, tries + 1):
        try:
            done = subprocess.run(
                words,
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            raise BuildError(f"{words[0]} is not installed; README.md says what is needed") from None
        if done.returncode == 0:
            return done.stdout
        if attempt < tries:
            print(f"try {attempt} failed; once more in 5 seconds", file=sys.stderr)
            time.sleep(5)
    raise BuildError(f"{' '.join(words)[:300]}\n{done.stdout[-6000:]}")


# --- what is fetched --------------------------------------------------------------------------------------


def resolve(*libraries: str, without: Iterable[str] = ()) -> list[Path]:
    """Jars of the version catalog's libraries and of what they need, `without` some (group:artifact)."""
    exclusions = "".join(
        f"<exclusion><groupId>{group}</groupId><artifactId>{artifact}</artifactId></exclusion>"
        for group, artifact in (name.split(":") for name in without)
    )
    dependencies = ""
    for library in libraries:
        entry = CATALOG["libraries"][library]
        group, artifact = entry["module"].split(":")
        dependencies += (
            f"<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId>"
            f"<version>{VERSIONS[entry['version']['ref']]}</version><exclusions>{exclusions}</exclusions></dependency>\n"
        )
    pom = (
        "<project><modelVersion>4.0.0</modelVersion><groupId>org.mobilemm</groupId><artifactId>fetch</artifactId>"
        f"<version>1</version><packaging>pom</packaging><dependencies>\n{dependencies}</dependencies></project>\n"
    )
    folder = OUT / "maven" / "-".join(libraries)[:80]
    found = folder / "classpath"
    if not (
        (folder / "pom.xml").is_file() and (folder / "pom.xml").read_text() == pom and found.is_file()
    ) or not all(Path(path).is_file() for path in found.read_text().split(os.pathsep)):
        print(f"fetching {', '.join(libraries)}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pom.xml").write_text(pom)
        found.unlink(missing_ok=True)
        command = ["mvn", "--batch-mode", "--quiet", "-f", folder / "pom.xml", RESOLVER]
        run([*command, f"-Dmdep.outputFile={found}"], tries=TRIES)
    return [Path(path) for path in found.read_text().strip().split(os.pathsep)]


# --- what is compiled -------------------------------------------------------------------------------------


def sources(module: str, kind: str) -> list[Path]:
    """Of `src/main`, `src/test` and others."""
    return sorted((HERE / module / "src" / kind / "kotlin").rglob("*.kt"))


def compile_kotlin(name: str, files: Sequence[Path], classpath: Sequence[Path], *options: str) -> Path:
    """A jar of these sources, made anew when they or what they are compiled with have changed."""
    jar = OUT / f"{name}.jar"
    state = hashlib.sha256("\n".join([VERSIONS["kotlin"], *options, *map(str, classpath)]).encode())
    for path in [*files, *(path for path in classpath if OUT in path.parents)]:
        state.update(path.read_bytes())
    stamp = OUT / f"{name}.state"
    if jar.is_file() and stamp.is_file() and stamp.read_text() == state.hexdigest():
        return jar
    print(f"compiling {name} ({len(files)} files)", flush=True)
    compiler = resolve("kotlin-compiler")
    jar.unlink(missing_ok=True)
    run(
        [
            *("java", "-Xmx1500m", "-cp", os.pathsep.join(map(str, compiler))),
            "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler",
            *("-no-stdlib", "-no-reflect", "-module-name", name, "-Werror"),
            *options,
            *("-cp", os.pathsep.join(map(str, classpath)), "-d", jar),
            *files,
        ]
    )
    stamp.write_text(state.hexdigest())
    return jar


def stdlib() -> Path:
    return next(path for path in resolve("kotlin-compiler") if path.name.startswith("kotlin-stdlib-"))


# Android 8's Java: since 9, ByteBuffer.clear() and others have signatures that its classes lack.
ANDROIDS_JAVA = ("-jvm-target", "1.8", "-Xjdk-release=1.8")
TESTS_JAVA = ("-jvm-target", "17")


def core() -> Path:
    return compile_kotlin(
        "core", sources("core", "main"), [stdlib(), *resolve("onnxruntime")], *ANDROIDS_JAVA
    )


# --- the app ----------------------------------------------------------------------------------------------

PACKAGE = "org.mobilemm.demo"
ABIS = ("arm64-v8a", "x86_64")
ONNXRUNTIME_NPM = "com.github.asus4.onnxruntime"
ONNXRUNTIME_NPM_SHA256 = "e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d"
# Pages of 16 kB, which Android 15 may have; others need 4 bytes.
LIBRARY_ALIGNMENT, ALIGNMENT = 16384, 4


def onnxruntime_android() -> Path:
    """The publisher's AAR, unpacked: classes.jar and jni/ABI/*.so."""
    folder = OUT / f"onnxruntime-android-{VERSIONS['onnxruntime']}"
    if (folder / "classes.jar").is_file():
        return folder
    version = VERSIONS["onnxruntimeNpm"]
    print(f"fetching {ONNXRUNTIME_NPM} {version}", flush=True)
    draft = OUT / "onnxruntime-android.part"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    run(["npm", "pack", "--silent", f"{ONNXRUNTIME_NPM}@{version}"], tries=TRIES, cwd=draft)
    (package,) = draft.glob("*.tgz")
    if hashlib.sha256(package.read_bytes()).hexdigest() != ONNXRUNTIME_NPM_SHA256:
        raise BuildError(f"{package.name}: is not the package that this build was made with")
    with tarfile.open(package) as archive:
        aar = archive.extractfile("package/Plugins/Android/onnxruntime.aar")
        assert aar is not None
        with zipfile.ZipFile(aar) as entries:
            for name in entries.namelist():
                if name == "classes.jar" or (name.startswith("jni/") and name.endswith(".so")):
                    entries.extract(name, draft)
    package.unlink()
    draft.rename(folder)
    return folder


def aapt2() -> tuple[Path, Path]:
    """The resource compiler and Android's own resources, out of apktool's jar."""
    jar = next(path for path in resolve("apktool", without=["*:*"]) if path.name.startswith("apktool-lib-"))
    folder = OUT / f"aapt2-{VERSIONS['apktool']}"
    folder.mkdir(exist_ok=True)
    system = "macosx" if sys.platform == "darwin" else "linux"
    tool, framework = folder / "aapt2", folder / "android-framework.jar"
    with zipfile.ZipFile(jar) as archive:
        for name, target in (
            (f"prebuilt/{system}/aapt2", tool),
            ("prebuilt/android-framework.jar", framework),
        ):
            if not target.is_file():
                target.write_bytes(archive.read(name))
    tool.chmod(0o755)
    return tool, framework


def android_jar() -> Path:
    """All of Android's classes, of the version that is compiled against."""
    return next(
        path for path in resolve("android-all", without=["*:*"]) if path.name.startswith("android-all-")
    )


def resources() -> tuple[Path, Path]:
    """An APK of manifest and resources alone, and the jar of R."""
    tool, framework = aapt2()
    main = HERE / "app" / "src" / "main"
    work = OUT / "resources"
    shutil.rmtree(work, ignore_errors=True)
    (work / "java").mkdir(parents=True)
    # What Gradle's plugin adds: the package, and that libraries are mapped out of the APK.
    text = (main / "AndroidManifest.xml").read_text(encoding="utf-8")
    text = text.replace("<manifest ", f'<manifest package="{PACKAGE}" ', 1)
    text = text.replace("<application", '<application android:extractNativeLibs="false"', 1)
    (work / "AndroidManifest.xml").write_text(text, encoding="utf-8")
    run([tool, "compile", "--dir", main / "res", "-o", work / "compiled.zip"])
    run(
        [
            *(
                tool,
                "link",
                "-I",
                framework,
                "--manifest",
                work / "AndroidManifest.xml",
                "--java",
                work / "java",
            ),
            *("--min-sdk-version", VERSIONS["minSdk"], "--target-sdk-version", VERSIONS["targetSdk"]),
            *("--version-code", VERSIONS["versionCode"], "--version-name", VERSIONS["versionName"]),
            *("-o", work / "resources.apk", work / "compiled.zip"),
        ]
    )
    run(["javac", "--release", "17", "-d", work / "classes", *(work / "java").rglob("*.java")])
    with zipfile.ZipFile(work / "R.jar", "w") as jar:
        for path in sorted((work / "classes").rglob("*.class")):
            jar.writestr(zipfile.ZipInfo(str(path.relative_to(work / "classes"))), path.read_bytes())
    return work / "resources.apk", work / "R.jar"


def app_classes(r_jar: Path) -> Path:
    classpath = [android_jar(), core(), r_jar, stdlib(), *resolve("onnxruntime")]
    return compile_kotlin("app", sources("app", "main"), classpath, *LENIENT, *ANDROIDS_JAVA)


def dex(jars: Sequence[Path]) -> list[Path]:
    folder = OUT / "dex"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (r8,) = (path for path in resolve("r8", without=["*:*"]) if path.name.startswith("r8-"))
    command = ["java", "-Xmx1500m", "-cp", r8, "com.android.tools.r8.D8", "--release", "--lib", android_jar()]
    run([*command, "--min-api", VERSIONS["minSdk"], "--output", folder, *jars])
    return sorted(folder.glob("classes*.dex"))


# In the SDK's android.jar what may be null only warns; in the framework's own classes it is an error.
LENIENT = ("-Xnullability-annotations=@android.annotation:ignore",)


class Apk:
    """A zip whose uncompressed entries begin where Android can map them."""

    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path, "w", allowZip64=False)

    def add(self, name: str, data: bytes, compress: bool) -> None:
        # A fixed time: the same sources give the same bytes.
        entry = zipfile.ZipInfo(name, (2008, 1, 1, 0, 0, 0))
        entry.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
        if not compress:
            assert self.archive.fp is not None
            start = self.archive.fp.tell() + 30 + len(name.encode())
            alignment = LIBRARY_ALIGNMENT if name.endswith(".so") else ALIGNMENT
            # An extra field of Android's own kind: its id, its length, the alignment, zeros.
            padding = -(start + 6) % alignment
            entry.extra = (
                b"\x35\xd9"
                + (2 + padding).to_bytes(2, "little")
                + alignment.to_bytes(2, "little")
                + bytes(padding)
            )
        self.archive.writestr(entry, data)


def apk(arguments: argparse.Namespace) -> None:
    """The signed APK, with a bundle packed in where one is given."""
    base, r_jar = resources()
    onnxruntime = onnxruntime_android()
    classes = app_classes(r_jar)
    print("making dex", flush=True)
    dexes = dex([core(), classes, r_jar, stdlib(), onnxruntime / "classes.jar"])
    unsigned, signed = OUT / "unsigned.apk", OUT / "mobilemm-demo.apk"
    package = Apk(unsigned)
    with zipfile.ZipFile(base) as archive:
        for entry in archive.infolist():
            package.add(entry.filename, archive.read(entry), entry.compress_type != zipfile.ZIP_STORED)
    for path in dexes:
        package.add(path.name, path.read_bytes(), compress=True)
    for abi in ABIS:
        for path in sorted((onnxruntime / "jni" / abi).glob("*.so")):
            package.add(f"lib/{abi}/{path.name}", path.read_bytes(), compress=False)
    if arguments.bundle is not None:
        files = bundle_files(arguments.bundle)
        for file in files:
            package.add(f"assets/bundle/{file}", (arguments.bundle / file).read_bytes(), compress=False)
        package.add("assets/bundle.files", "\n".join(files).encode(), compress=True)
    package.archive.close()
    sign(unsigned, signed)
    unsigned.unlink()
    describe(signed)


def bundle_files(bundle: Path) -> list[str]:
    """Of a bundle's folder, as they are packed in."""
    return sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())


def sign(unsigned: Path, signed: Path) -> None:
    """By a key of this machine, which is enough for `adb install`; a store asks for one of your own."""
    keystore = OUT / "debug.keystore"
    if not keystore.is_file():
        run(
            [
                *(
                    "keytool",
                    "-genkeypair",
                    "-keystore",
                    keystore,
                    "-storetype",
                    "PKCS12",
                    "-storepass",
                    "android",
                ),
                *(
                    "-alias",
                    "debug",
                    "-keyalg",
                    "RSA",
                    "-keysize",
                    "2048",
                    "-validity",
                    "10000",
                    "-dname",
                    "CN=Debug",
                ),
            ]
        )
    signer = os.pathsep.join(map(str, resolve("apksig", without=["*:*"])))
    command = ["java", "-cp", signer, HERE / "ApkSigning.java", unsigned, signed, keystore]
    print(run([*command, "android", "debug", VERSIONS["minSdk"]]).strip())


def describe(signed: Path) -> None:
    """What was built, as a phone would read it."""
    tool, _ = aapt2()
    badging = run([tool, "dump", "badging", signed])
    for line in badging.splitlines():
        if re.match(
            r"package:|sdkVersion|minSdkVersion|targetSdkVersion|uses-permission|native-code|launchable", line
        ):
            print(line)
    print(f"{signed}: {signed.stat().st_size / 1e6:.1f} MB")


def check(arguments: argparse.Namespace) -> None:
    """What can be known of the built APK without a phone."""
    _, r_jar = resources()
    onnxruntime = onnxruntime_android()
    ours = [core(), app_classes(r_jar), r_jar, onnxruntime / "classes.jar", stdlib()]
    for library in ("android-all-min", "android-all"):
        jar = next(path for path in resolve(library, without=["*:*"]) if path.name.startswith("android-all-"))
        known = apk_checks.AndroidClasses(jar)
        found, missing = known.check(ours)
        print(f"{jar.name}: {found} references to android.*, {len(missing)} that it lacks")
        # Kotlin's library and ONNX Runtime look for newer classes and go without them.
        for owner, (name, kind), users in missing:
            print(f"  {owner}.{name}{kind} in {', '.join(sorted(users))}")
        if missing:
            raise BuildError("the app names what an Android version that it is for does not have")
    signed = OUT / "mobilemm-demo.apk"
    natives = [(one.name, name) for one in read_jar(onnxruntime / "classes.jar") for name, _ in one.natives]
    for abi in ABIS:
        libraries = apk_checks.libraries(signed, abi)
        lost = [native for native in natives if not apk_checks.is_exported(native, libraries)]
        print(f"{abi}: {len(natives)} native methods, {len(lost)} that no library has")
        if lost:
            raise BuildError(f"{abi}: no library has {lost[:3]}")
    for name, offset, alignment in apk_checks.alignments(signed):
        print(f"{name}: at {offset}, pages of {alignment}")
        if offset % LIBRARY_ALIGNMENT or alignment % LIBRARY_ALIGNMENT:
            raise BuildError(f"{name}: a phone with pages of 16 kB could not map it")


# --- commands ---------------------------------------------------------------------------------------------


def core_tests() -> tuple[Path, list[Path], Path]:
    """The core, what it needs on this computer, and its tests."""
    libraries = [stdlib(), *resolve("onnxruntime"), *resolve("junit")]
    main = core()
    options = (f"-Xfriend-paths={main}", *TESTS_JAVA)
    return main, libraries, compile_kotlin("core-test", sources("core", "test"), [main, *libraries], *options)


def test(arguments: argparse.Namespace) -> None:
    """The core's tests on the JVM, with the publisher's ONNX Runtime."""
    main, libraries, tests = core_tests()
    classes = [f"org.mobilemm.{path.stem}" for path in sources("core", "test") if path.stem.endswith("Test")]
    if arguments.only:
        classes = [name for name in classes if name.endswith(tuple(arguments.only))]
    junit([tests, main, *libraries], classes, arguments)


def test_executorch(arguments: argparse.Namespace) -> None:
    """The ExecuTorch backend's tests on the JVM, over a stand-in that runs ExecuTorch in Python."""
    main, libraries, core_test = core_tests()
    standin = compile_kotlin("executorch-standin", sources("executorch", "standin"), [stdlib()], *TESTS_JAVA)
    files = sources("executorch", "main")
    backend = compile_kotlin("executorch", files, [main, standin, stdlib()], *ANDROIDS_JAVA)
    classpath = [backend, standin, core_test, main, *libraries]
    options = (f"-Xfriend-paths={main},{core_test}", *TESTS_JAVA)
    tests = compile_kotlin("executorch-test", sources("executorch", "standinTest"), classpath, *options)
    names = [path.stem for path in sources("executorch", "standinTest")]
    services = HERE / "executorch" / "src" / "main" / "resources"
    junit(
        [tests, services, *classpath],
        [f"org.mobilemm.executorch.{name}" for name in names if not arguments.only or name in arguments.only],
        arguments,
        f"-Dmobilemm.executorch={arguments.answers}",
        f"-Dmobilemm.python={sys.executable}",
        f"-Dmobilemm.root={HERE.parent}",
    )


def test_dex(arguments: argparse.Namespace) -> None:
    """The core's tests on the APK's own classes, converted back by enjarify (a package of Debian)."""
    back = OUT / "dex-converted-back.jar"
    if shutil.which("enjarify") is None:
        raise BuildError("enjarify is not installed; README.md says what is needed")
    # Debian's script takes the first Python on the PATH, which need not be the one that it is installed for.
    told = run(
        ["env", "PYTHON=/usr/bin/python3", "enjarify", "--force", "-o", back, OUT / "mobilemm-demo.apk"]
    )
    print("\n".join(told.strip().splitlines()[-2:]), flush=True)
    # ONNX Runtime's classes and Kotlin's reflection are left to their own jars: they need methods of
    # interfaces that the old class files which enjarify writes cannot have.
    ours = OUT / "dex-classes.jar"
    with zipfile.ZipFile(back) as archive, zipfile.ZipFile(ours, "w") as jar:
        for name in archive.namelist():
            if not name.startswith(("ai/onnxruntime/", "kotlin/reflect/")):
                jar.writestr(name, archive.read(name))
    _, libraries, tests = core_tests()
    classes = [f"org.mobilemm.{path.stem}" for path in sources("core", "test") if path.stem.endswith("Test")]
    junit([tests, ours, *libraries], classes, arguments)


def app_benchmark() -> list[str]:
    """What measures as the app does, when a folder of external files and `am start`'s extras are added."""
    main, libraries, tests = core_tests()
    classpath = os.pathsep.join(map(str, [tests, main, *libraries]))
    return ["java", "-Xmx2g", "-cp", classpath, "org.mobilemm.HostBenchmarkKt"]


def bench(arguments: argparse.Namespace) -> None:
    """The app's benchmark on this computer's JVM, for `mobilemm compare` with `mobilemm bench --json`."""
    files = OUT / "external-files"
    shutil.rmtree(files, ignore_errors=True)
    (files / "bench").mkdir(parents=True)
    (files / "bench" / "bundle").symlink_to(arguments.bundle.resolve())
    extras = ["--es", "bundle", "bundle", "--es", "out", "result.json"]
    extras += ["--ei", "threads", str(arguments.threads), "--ei", "runs", str(arguments.runs)]
    print(run([*app_benchmark(), files, *extras]).strip())
    shutil.copy(files / "result.json", arguments.out)


def test_app(arguments: argparse.Namespace) -> None:
    """The app's screens on Robolectric: Android's own framework code, on the JVM."""
    base, r_jar = resources()
    # What androidx.test, which is on Google's server alone, would give; the few types that Robolectric names.
    without = ["androidx.test:monitor", "androidx.test.espresso:espresso-idling-resource"]
    libraries = [stdlib(), *resolve("onnxruntime"), *resolve("robolectric", "junit", without=without)]
    main = [app_classes(r_jar), core(), r_jar]
    standins = OUT / "standins"
    shutil.rmtree(standins, ignore_errors=True)
    java = sorted((HERE / "app" / "src" / "standins").rglob("*.java"))
    run(["javac", "--release", "17", "-cp", android_jar(), "-d", standins, *java])
    tests = compile_kotlin(
        "app-test",
        sources("app", "test"),
        [*main, *libraries, android_jar()],
        *(f"-Xfriend-paths={main[0]}", *LENIENT, *TESTS_JAVA),
    )
    # As Gradle's plugin tells Robolectric where the resources are.
    settings = OUT / "robolectric"
    shutil.rmtree(settings, ignore_errors=True)
    (settings / "com" / "android" / "tools").mkdir(parents=True)
    (settings / "assets").mkdir()
    # Android reads assets out of the APK, and so does Robolectric.
    packed = settings / "app.apk"
    shutil.copy(base, packed)
    with zipfile.ZipFile(packed, "a") as archive:
        for file in bundle_files(arguments.bundle):
            archive.write(arguments.bundle / file, f"assets/bundle/{file}")
        archive.writestr("assets/bundle.files", "\n".join(bundle_files(arguments.bundle)))
    (settings / "com" / "android" / "tools" / "test_config.properties").write_text(
        f"android_merged_manifest={base.with_name('AndroidManifest.xml')}\n"
        f"android_merged_assets={settings / 'assets'}\n"
        f"android_resource_apk={packed}\n"
        f"android_custom_package={PACKAGE}\n"
    )
    for path in resolve("android-all-instrumented", without=["*:*"]):
        (settings / path.name).symlink_to(path)
    classes = [f"{PACKAGE}.{path.stem}" for path in sources("app", "test") if path.stem.endswith("Test")]
    options = [
        # What Robolectric looks into, of the JVM's own classes.
        *("--add-opens", "java.base/java.io=ALL-UNNAMED", "--add-opens", "java.base/java.lang=ALL-UNNAMED"),
        *("-Drobolectric.offline=true", f"-Drobolectric.dependency.dir={settings}"),
        f"-Dmobilemm.screens={OUT / 'screens'}",
    ]
    junit([settings, tests, *main, standins, *libraries, android_jar()], classes, arguments, *options)


def junit(
    classpath: Sequence[Path], classes: Sequence[str], arguments: argparse.Namespace, *options: str
) -> None:
    command = [
        *(
            "java",
            "-Xmx2g",
            f"-Dmobilemm.vectors={arguments.vectors}",
            f"-Dmobilemm.bundle={arguments.bundle}",
            f"-Dmobilemm.drawing={arguments.drawing}",
        ),
        *options,
        *("-cp", os.pathsep.join(map(str, classpath)), "org.junit.runner.JUnitCore", *classes),
    ]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise BuildError("tests failed; which ones stands above")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tests = {"test": test, "test-executorch": test_executorch, "test-dex": test_dex, "test-app": test_app}
    for name, action in tests.items():
        command = commands.add_parser(name, help=action.__doc__)
        command.add_argument("--bundle", type=Path, required=True, help="a bundle for onnx")
        command.add_argument("--vectors", type=Path, required=True, help="what tests/phone_vectors.py wrote")
        command.add_argument("--drawing", type=Path, required=True, help="what tests/ios/drawing.py wrote")
        command.add_argument("--only", nargs="*", help="names of test classes")
        if action is test_executorch:
            text = "what tests/android/executorch_vectors.py wrote"
            command.add_argument("--answers", type=Path, required=True, help=text)
        command.set_defaults(action=action)
    command = commands.add_parser("bench", help=bench.__doc__)
    command.add_argument("--bundle", type=Path, required=True, help="a bundle for onnx")
    command.add_argument("--out", type=Path, required=True, help="the result's file")
    command.add_argument("--threads", type=int, default=0, help="0: what the runtime takes")
    command.add_argument("--runs", type=int, default=5)
    command.set_defaults(action=bench)
    command = commands.add_parser("apk", help="build the signed APK")
    command.add_argument("--bundle", type=Path, help="a bundle to pack in")
    command.set_defaults(action=apk)
    command = commands.add_parser("check", help=check.__doc__)
    command.set_defaults(action=check)
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        arguments.action(arguments)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
