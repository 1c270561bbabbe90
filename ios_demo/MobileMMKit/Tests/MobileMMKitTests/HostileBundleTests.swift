import Foundation
import XCTest

@testable import MobileMMKit

final class HostileBundleTests: XCTestCase {
    func testManifestsAreReadOrRefusedAsInPython() throws {
        let cases = try Vectors.objects("manifests.json")
        XCTAssertGreaterThanOrEqual(cases.count, 25)
        for one in cases {
            let data = try Data(contentsOf: Vectors.file("manifests/\(one.string("file"))"))
            let error = failure { try ManifestReader.parse(data, path: "manifest.json") }
            XCTAssertEqual(error == nil, one["read"]!.bool!, "\(one.string("file")): \(String(describing: error))")
            if error != nil { assertOneLine(error, "manifest.json") }
        }
    }

    /// Damages that leave files, sizes, hashes and manifest in agreement.
    private let insideGraphs: Set = [
        "spoil_values", "spoil_hidden_values", "misplace", "misshape", "retype", "misfit_quantized",
        "change_operators", "change_interface", "spoil_protobuf",
    ]

    /// Of bundles that Python refuses: what is wrong with files and manifests is told before anything is computed.
    /// What is wrong inside of a graph whose hashes hold is the runtime's to tell; it must end in one line as well.
    func testAThousandDamagedBundlesEndInOneLineEach() async throws {
        let cases = try Vectors.objects("damaged.json")
        XCTAssertGreaterThanOrEqual(cases.count, 990)
        var ran = 0
        for one in cases {
            let folder = Vectors.file(one.string("folder"))
            if let error = failure({ try ModelBundle.open(folder) }) {
                assertOneLine(error, folder.path)
                continue
            }
            if let error = await failure({ try await answer(folder) }) {
                assertOneLine(error, folder.path)
                continue
            }
            let damage = one.string("damage")
            XCTAssertTrue(insideGraphs.contains(damage), "\(damage) was not refused: \(one["told"]!)")
            ran += 1
        }
        print("\(cases.count) damaged bundles, of which \(ran) answered all the same")
    }

    func testTheWholeOneThatTheyWereMadeOfAnswers() async throws {
        _ = try ModelBundle.open(Vectors.file("tiny-onnx"))
        _ = try await answer(Vectors.file("tiny-onnx"))
    }

    func testAFolderThatIsNoneAndOneWithoutAManifestAreToldApart() throws {
        let nowhere = Vectors.file("nowhere")
        assertOneLine(failure { try ModelBundle.open(nowhere) }, nowhere.path)
        let error = failure { try ModelBundle.open(Vectors.file("images")) }
        XCTAssertTrue("\(error!)".contains("is no bundle"), "\(error!)")
    }

    private func answer(_ folder: URL) async throws -> String {
        let bundle = try ModelBundle.open(folder, verify: false)
        let backend = try OnnxBackend(bundle, threads: 1)
        let session = try await Session(bundle, backend, sampling: Sampling(maxNewTokens: 3))
        try await session.lookAt(PixelRaster(width: 4, height: 4, pixels: (0..<16).map { $0 * 0x0F_0F0F }))
        return try await session.reply("abc")
    }
}
