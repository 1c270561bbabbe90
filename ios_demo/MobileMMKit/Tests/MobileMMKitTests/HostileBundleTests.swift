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

    func testManifestsOfBundlesThatDrawAreReadOrRefusedAtTheKeyThatPythonNames() throws {
        let cases = try Vectors.objects("drawing_manifests.json")
        XCTAssertGreaterThanOrEqual(cases.count, 140)
        for one in cases {
            let data = try Data(contentsOf: Vectors.file(one.string("file")))
            let error = failure { try ManifestReader.parse(data, path: "manifest.json") }
            if one["refused"]!.bool! {
                assertOneLine(error, one["key"]!.string.map { "key '\($0)'" } ?? "manifest.json: ")
            } else {
                XCTAssertNil(error, one.string("file"))
            }
        }
    }

    /// Also those whose hashes hold, because whoever made them has computed them anew.
    func testAThousandDamagedBundlesAreRefusedInOneLineEachBeforeAModelIsLoaded() throws {
        let cases = try Vectors.objects("damaged.json")
        XCTAssertGreaterThanOrEqual(cases.count, 1000)
        for one in cases {
            let folder = Vectors.file(one.string("folder"))
            let error = failure { try ModelBundle.open(folder) }
            XCTAssertNotNil(error, "\(one.string("damage")) was not refused: \(one["told"]!)")
            if error != nil { assertOneLine(error, folder.path) }
        }
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
