import XCTest

@testable import MobileMMKit

final class NoiseTests: XCTestCase {
    func testNumbersArePythonsBitForBit() throws {
        let cases = try Vectors.objects("noise.json")
        XCTAssertGreaterThanOrEqual(cases.count, 4)
        for one in cases {
            let found = try Noise.normal(seed: UInt64(one.string("seed"))!, one.ints("shape"))
            let wanted = try Vectors.floats(one.string("file"))
            XCTAssertEqual(Array(found.floats), wanted, "seed \(one.string("seed"))")
        }
    }

    /// The vectors of docs/noise.md, and of the paper's own implementation for a counter of ones.
    func testWordsArePhiloxs() {
        let ones = UInt32.max
        let zeros = Noise.philox((0, 0, 0, 0), (0, 0))
        XCTAssertEqual([zeros.0, zeros.1, zeros.2, zeros.3], [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8])
        let found = Noise.philox((ones, ones, ones, ones), (ones, ones))
        XCTAssertEqual([found.0, found.1, found.2, found.3], [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD])
    }
}
