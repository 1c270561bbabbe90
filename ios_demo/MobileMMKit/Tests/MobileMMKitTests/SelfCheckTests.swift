import Foundation
import XCTest

@testable import MobileMMKit

final class SelfCheckTests: XCTestCase {
    func testTheGoldenCheckPassesOnThisMachine() async throws {
        let bundle = try Vectors.bundle.get()
        let checks = try await SelfCheck(bundle, try Vectors.backend.get()).run()
        XCTAssertEqual(checks.map(\.part), bundle.manifest.golden.map(\.part) + ["conversation"])
        XCTAssertTrue(Set(checks.map(\.part)).isSuperset(of: ["decoder", "embed", "vision"]))
        for check in checks { XCTAssertTrue(check.passed, "\(check)") }
    }

    func testTheGoldenCheckCoversThePartsThatDrawStepByStep() async throws {
        let folder = ProcessInfo.processInfo.environment["MOBILEMM_DRAWING"]!
        let bundle = try ModelBundle.open(URL(fileURLWithPath: "\(folder)/stepwise/drawer-onnx"))
        let checks = try await SelfCheck(bundle, try OnnxBackend(bundle, threads: 1)).run()
        XCTAssertTrue(Set(checks.map(\.part)).isSuperset(of: ["output_projector", "denoiser", "image_decoder"]))
        for check in checks { XCTAssertTrue(check.passed, "\(check)") }
    }

    /// Weights of one part are changed in a copy of the bundle, its manifest made to agree: nothing but the golden
    /// vectors can tell.
    func testTheGoldenCheckTellsWhichPartHasOtherWeights() async throws {
        let files = FileManager.default
        let folder = files.temporaryDirectory.appendingPathComponent("changed-\(UUID())")
        try files.copyItem(at: Vectors.bundleFolder, to: folder)
        defer { try? files.removeItem(at: folder) }
        let weights = folder.appendingPathComponent("parts/vision.onnx.data")
        let before = try ModelBundle.sha256(folder, "parts/vision.onnx.data")
        var data = [UInt8](try Data(contentsOf: weights))
        for index in stride(from: data.count / 2, to: 3 * data.count / 4, by: 2) { data[index] ^= 0x55 }
        try Data(data).write(to: weights)
        assertOneLine(failure { try ModelBundle.open(folder) }, "vision.onnx.data")
        let after = try ModelBundle.sha256(folder, "parts/vision.onnx.data")
        let manifest = folder.appendingPathComponent(ModelBundle.manifestName)
        let text = try String(contentsOf: manifest, encoding: .utf8)
        try Data(text.replacingOccurrences(of: before, with: after).utf8).write(to: manifest)
        try? files.removeItem(at: folder.appendingPathComponent(ModelBundle.manifestDigestName))
        let bundle = try ModelBundle.open(folder)
        let checks = try await SelfCheck(bundle, try OnnxBackend(bundle, threads: 1)).run()
        XCTAssertEqual(checks.filter { !$0.passed }.map(\.part), ["vision"])
    }
}
