// swift-tools-version: 6.0
import PackageDescription

// Core ML, ImageIO and zlib are the system's on Apple's platforms. On Linux pictures are decoded by libpng and
// libjpeg-turbo, and models run on ONNX Runtime, whose library is opened when it is first used.
let linux = TargetDependencyCondition.when(platforms: [.linux])

// On Linux the branches for Apple's systems are compiled too when MOBILEMM_STAND_INS is set, against modules with the
// names and signatures of Apple's (StandIns): `make test-ios` does so. Nothing of them is in what is built otherwise.
let standIns = Context.environment["MOBILEMM_STAND_INS"] == nil ? [] : ["CoreML", "CoreVideo", "ExecuTorch"]

// ExecuTorch bundles need ExecuTorch's own package, by its version: MOBILEMM_EXECUTORCH=1.5.0 swift build.
let executorch = Context.environment["MOBILEMM_EXECUTORCH"]
let executorchProducts = ["executorch", "backend_xnnpack", "kernels_llm", "kernels_optimized", "kernels_quantized"]

let package = Package(
    name: "MobileMMKit",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [
        .library(name: "MobileMMKit", targets: ["MobileMMKit"]),
        .executable(name: "mobilemm-swift", targets: ["mobilemm-swift"]),
    ],
    dependencies: executorch.map {
        [.package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-\($0)")]
    } ?? [],
    targets: standIns.map { name in
        .target(name: name, dependencies: name == "CoreML" ? ["CoreVideo"] : [], path: "StandIns/\(name)")
    } + [
        .systemLibrary(name: "COnnxRuntime"),
        .systemLibrary(name: "CPng", providers: [.apt(["libpng-dev"])]),
        .systemLibrary(name: "CTurboJpeg", providers: [.apt(["libturbojpeg0-dev"])]),
        .systemLibrary(name: "CZlib", providers: [.apt(["zlib1g-dev"])]),
        .target(
            name: "MobileMMKit",
            dependencies: [
                .target(name: "COnnxRuntime", condition: linux),
                .target(name: "CPng", condition: linux),
                .target(name: "CTurboJpeg", condition: linux),
                "CZlib",
            ] + standIns.map { .target(name: $0, condition: linux) }
                + (executorch == nil ? [] : executorchProducts.map { .product(name: $0, package: "executorch") })),
        .executableTarget(name: "mobilemm-swift", dependencies: ["MobileMMKit"]),
        .testTarget(name: "MobileMMKitTests", dependencies: ["MobileMMKit"]),
    ],
    swiftLanguageModes: [.v6]
)
