import Foundation
import XCTest

@testable import MobileMMKit

final class TensorTests: XCTestCase {
    func testHashesAreThoseOfTheStandardsExamples() {
        // FIPS 180-4's examples, and lengths around a block's end against Python's hashlib.
        XCTAssertEqual(
            Sha256.of([UInt8]("abc".utf8)), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        XCTAssertEqual(Sha256.of([]), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        XCTAssertEqual(
            Sha256.of([UInt8](repeating: 97, count: 1_000_000)),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")
        var pieces = Sha256()
        for length in [1, 62, 1, 64, 65, 807] {
            [UInt8](repeating: 97, count: length).withUnsafeBytes { pieces.update($0) }
        }
        XCTAssertEqual(pieces.finish(), Sha256.of([UInt8](repeating: 97, count: 1000)))
    }

    func testHalvesAreThoseOfTheProcessor() throws {
        #if !(os(macOS) && arch(x86_64))
            for bits in UInt16.min...UInt16.max {
                let wanted = Float(Float16(bitPattern: bits))
                let found = float(half: bits)
                XCTAssertTrue(found == wanted || found.isNaN && wanted.isNaN, "\(bits)")
                if !wanted.isNaN { XCTAssertEqual(half(wanted), bits) }
            }
            var random = SplitMix64(1)
            for _ in 0..<200_000 {
                let value = Float(bitPattern: UInt32(truncatingIfNeeded: random.next()))
                if !value.isNaN { XCTAssertEqual(half(value), Float16(value).bitPattern, "\(value)") }
            }
        #endif
    }

    func testSlicesAreThoseOfRows() throws {
        let tensor = try Tensor(.float32, [2, 3, 2])
        for index in 0..<12 { tensor.floats[index] = Float(index) }
        XCTAssertEqual(Array(try tensor.slice(axis: 1, 1..<3).floats), [2, 3, 4, 5, 8, 9, 10, 11])
        XCTAssertTrue(failure { try Tensor(.float32, [1 << 20, 1 << 20]) } is MobileMMError)
    }
}
