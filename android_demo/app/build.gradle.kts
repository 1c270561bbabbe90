import java.io.File

plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.android)
}

/** A bundle that is packed in: `./gradlew :app:assembleRelease -Pbundle=FOLDER`. */
val bundle = providers.gradleProperty("bundle").map { File(it) }
val packed = layout.buildDirectory.dir("packed")

android {
    namespace = "org.mobilemm.demo"
    compileSdk = libs.versions.compileSdk.get().toInt()

    defaultConfig {
        applicationId = "org.mobilemm.demo"
        minSdk = libs.versions.minSdk.get().toInt()
        targetSdk = libs.versions.targetSdk.get().toInt()
        versionCode = libs.versions.versionCode.get().toInt()
        versionName = libs.versions.versionName.get()
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }

    androidResources {
        // Weights do not shrink, and are read as they are.
        noCompress += listOf("data", "onnx", "pte", "safetensors")
    }

    sourceSets["main"].assets.srcDir(packed)
    testOptions.unitTests.isIncludeAndroidResources = true
}

kotlin {
    jvmToolchain(17)
}

dependencies {
    implementation(project(":core"))
    implementation(libs.onnxruntime.android)
    if (providers.gradleProperty("executorch").isPresent) implementation(project(":executorch"))
    testImplementation(libs.junit)
    testImplementation(libs.robolectric)
    testImplementation(libs.onnxruntime)
}

/** The bundle as assets, with the list of its files. */
val packBundle by tasks.registering {
    inputs.property("bundle", bundle.map { it.path }.orElse(""))
    outputs.dir(packed)
    doLast {
        val target = packed.get().asFile
        target.deleteRecursively()
        target.mkdirs()
        val folder = bundle.orNull ?: return@doLast
        folder.copyRecursively(File(target, "bundle"))
        val files = folder.walk().filter { it.isFile }.map { it.relativeTo(folder).invariantSeparatorsPath }.sorted()
        File(target, "bundle.files").writeText(files.joinToString("\n"))
    }
}

tasks.named("preBuild") { dependsOn(packBundle) }
