plugins {
    alias(libs.plugins.kotlin.jvm)
    `java-library`
}

kotlin {
    jvmToolchain(17)
    compilerOptions {
        // Android 8's Java: since 9, ByteBuffer.clear() and others have signatures that its classes lack.
        jvmTarget = org.jetbrains.kotlin.gradle.dsl.JvmTarget.JVM_1_8
        freeCompilerArgs.add("-Xjdk-release=1.8")
    }
}

java {
    sourceCompatibility = JavaVersion.VERSION_1_8
    targetCompatibility = JavaVersion.VERSION_1_8
}

dependencies {
    // The same classes as onnxruntime-android's, with this computer's libraries; an app brings its own.
    compileOnly(libs.onnxruntime)
    testImplementation(libs.onnxruntime)
    testImplementation(libs.junit)
}

tasks.test {
    // Written by `python -m tests.phone_vectors BUNDLE FOLDER`, in the folder above.
    systemProperty("mobilemm.vectors", providers.gradleProperty("vectors").getOrElse("../../build/android/vectors"))
    systemProperty("mobilemm.bundle", providers.gradleProperty("bundle").getOrElse("../../build/android/bundle"))
    maxHeapSize = "2g"
}
