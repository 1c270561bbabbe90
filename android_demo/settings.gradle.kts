pluginManagement {
    repositories {
        google()
        mavenCentral()
        gradlePluginPortal()
    }
}

dependencyResolutionManagement {
    repositoriesMode.set(RepositoriesMode.FAIL_ON_PROJECT_REPOS)
    repositories {
        google()
        mavenCentral()
    }
}

rootProject.name = "mobilemm-android"

include(":core", ":app")

// ExecuTorch bundles, by ExecuTorch's own library: `./gradlew :app:assembleRelease -Pexecutorch`.
if (providers.gradleProperty("executorch").isPresent) include(":executorch")
