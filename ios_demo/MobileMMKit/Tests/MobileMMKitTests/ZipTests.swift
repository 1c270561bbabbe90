import Foundation
import XCTest

@testable import MobileMMKit

/// Zip files that Python has written, honest and hostile (`python -m tests.ios.zips`).
final class ZipTests: XCTestCase {
    private var above = URL(fileURLWithPath: "/")
    private var library: Library { Library(above.appendingPathComponent("library")) }

    override func setUp() {
        above = FileManager.default.temporaryDirectory.appendingPathComponent("zips-\(UUID())")
    }

    override func tearDown() {
        try? FileManager.default.removeItem(at: above)
    }

    private static let zips = URL(fileURLWithPath: ProcessInfo.processInfo.environment["MOBILEMM_ZIPS"]!)

    private func files(_ folder: URL) throws -> [String: Data] {
        let names = FileManager.default.enumerator(atPath: folder.path)!.compactMap { $0 as? String }
        var found: [String: Data] = [:]
        for name in names {
            if let data = try? Data(contentsOf: folder.appendingPathComponent(name)) { found[name] = data }
        }
        return found
    }

    private func cases(_ imports: Bool?) throws -> [JsonObject] {
        let data = try Data(contentsOf: Self.zips.appendingPathComponent("zips.json"))
        return try Json.parse(data).array!.map { $0.object! }.filter { $0["imports"]!.bool == imports }
    }

    func testAnHonestZipFileIsTheBundleThatWasPacked() throws {
        let wanted = try files(Vectors.file("tiny-onnx"))
        for one in try cases(true) {
            var heard: [Int] = []
            let bundle = try library.importZip(Self.zips.appendingPathComponent(one.string("file"))) { done, total in
                heard.append(done)
                XCTAssertLessThanOrEqual(done, total)
            }
            XCTAssertEqual(try files(bundle.folder), wanted, one.string("file"))
            XCTAssertEqual(heard.last, bundle.manifest.files.reduce(0) { $0 + $1.bytes })
            XCTAssertEqual(library.names(), ["tiny"])
            try library.delete("tiny")
        }
    }

    func testHostileZipFilesAreRefusedInOneLineAndLeaveNothing() throws {
        let cases = try cases(false)
        XCTAssertGreaterThanOrEqual(cases.count, 40)
        for one in cases {
            let zip = Self.zips.appendingPathComponent(one.string("file"))
            let error = failure { try library.importZip(zip) }
            assertOneLine(error, zip.path)
            let message = (error as? MobileMMError)?.message ?? ""
            XCTAssertTrue(message.contains(one.string("word")), "\(one.string("word")): \(message)")
            try assertNothingIsLeft()
        }
    }

    func testZipFilesChangedAtRandomAreRefusedOrTheSameBundle() throws {
        let wanted = try files(Vectors.file("tiny-onnx"))
        let cases = try cases(nil)
        XCTAssertGreaterThanOrEqual(cases.count, 500)
        var refused = 0
        for one in cases {
            let zip = Self.zips.appendingPathComponent(one.string("file"))
            do {
                let bundle = try library.importZip(zip)
                for (name, data) in try files(bundle.folder) { XCTAssertEqual(data, wanted[name], "\(name) of \(zip.path)") }
                try library.delete(bundle.folder.lastPathComponent)
            } catch {
                refused += 1
                assertOneLine(error, zip.path)
            }
            try assertNothingIsLeft()
        }
        print("\(refused) of \(cases.count) zip files changed at random were refused")
        XCTAssertGreaterThan(refused, cases.count / 2)
    }

    private func assertNothingIsLeft() throws {
        let files = FileManager.default
        let left = try files.contentsOfDirectory(atPath: above.path) + files.contentsOfDirectory(atPath: library.folder.path)
        XCTAssertTrue(left.allSatisfy { $0 == "library" }, "\(left)")
        XCTAssertFalse(files.fileExists(atPath: "/tmp/evil"))
    }
}
