plugins {
    alias(libs.plugins.kotlin.jvm)
    `java-library`
}

kotlin {
    jvmToolchain(17)
}

dependencies {
    // The same classes as onnxruntime-android's, with this computer's libraries; an app brings its own.
    compileOnly(libs.onnxruntime)
    testImplementation(libs.onnxruntime)
    testImplementation(libs.junit)
}

tasks.test {
    // Written by `python -m tests.android.vectors BUNDLE FOLDER`, in the folder above.
    systemProperty("mobilemm.vectors", providers.gradleProperty("vectors").getOrElse("../../build/android/vectors"))
    systemProperty("mobilemm.bundle", providers.gradleProperty("bundle").getOrElse("../../build/android/bundle"))
    maxHeapSize = "2g"
}
