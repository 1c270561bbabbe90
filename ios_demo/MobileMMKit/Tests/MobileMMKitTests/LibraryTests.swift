import Foundation
import Synchronization
import XCTest

#if canImport(FoundationNetworking)
    import FoundationNetworking
#endif

@testable import MobileMMKit

/// Downloads come from a server of the test script's, which breaks each large file off in the middle the first time.
final class LibraryTests: XCTestCase {
    private var folder = URL(fileURLWithPath: "/")

    override func setUp() {
        folder = FileManager.default.temporaryDirectory.appendingPathComponent("library-\(UUID())")
    }

    override func tearDown() {
        try? FileManager.default.removeItem(at: folder)
    }

    private func server(_ path: String) throws -> URL {
        let address = try XCTUnwrap(ProcessInfo.processInfo.environment["MOBILEMM_SERVER"])
        return URL(string: address)!.appendingPathComponent(path)
    }

    private func hidden() -> [String] {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
        return names.filter { $0.hasPrefix(".") }
    }

    func testABundleIsAddedNamedAndDeleted() throws {
        let library = Library(folder)
        XCTAssertEqual(library.names(), [])
        let bundle = try library.add(Vectors.file("tiny-onnx"))
        XCTAssertEqual(library.names(), ["tiny"])
        XCTAssertEqual(bundle.folder.lastPathComponent, "tiny")
        _ = try library.add(Vectors.file("tiny-onnx"))
        XCTAssertEqual(library.names(), ["tiny", "tiny-2"])
        try library.delete("tiny")
        XCTAssertEqual(library.names(), ["tiny-2"])
        XCTAssertTrue(failure { try library.delete("../tiny-2") } is MobileMMError)
        XCTAssertEqual(hidden(), [])
    }

    func testADamagedOneIsRefusedAndLeavesNothing() throws {
        let one = try Vectors.objects("damaged.json")[0]
        let source = Vectors.file(one.string("folder"))
        XCTAssertTrue(failure { try Library(folder).add(source) } is MobileMMError)
        XCTAssertEqual(Library(folder).names(), [])
        XCTAssertEqual(hidden(), [])
    }

    func testACutDownloadGoesOnAndEndsVerified() async throws {
        let library = Library(folder)
        let heard = Mutex<[Int]>([])
        let bundle = try await library.download(try server("bundle")) { done, _ in heard.withLock { $0.append(done) } }
        XCTAssertEqual(library.names().count, 1)
        XCTAssertEqual(hidden(), [])
        _ = try ModelBundle.open(bundle.folder)
        let total = bundle.manifest.files.reduce(0) { $0 + $1.bytes }
        XCTAssertEqual(heard.withLock { $0.max() }, total)
        // The server counts what it sent: hardly more than the files once, although it broke off.
        let (data, _) = try await URLSession.shared.data(from: try server("sent"))
        let sent = try Json.parse(data).object!
        XCTAssertGreaterThanOrEqual(sent.int("broken"), 1)
        XCTAssertLessThan(sent.int("bytes"), total + (2 << 20))
    }

    func testWhatIsNotThereOrNotTheSameIsToldInOneLine() async throws {
        let library = Library(folder)
        assertOneLine(await failure { try await library.download(try server("nowhere")) }, "nowhere")
        assertOneLine(await failure { try await library.download(try server("changed")) }, "SHA-256")
        XCTAssertEqual(library.names(), [])
    }
}
