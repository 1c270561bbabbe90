import Foundation
import XCTest

@testable import MobileMMKit

/// What the Python package has computed (`python -m tests.phone_vectors`), and the bundle that it did it with.
enum Vectors {
    static let folder = folder("MOBILEMM_VECTORS")
    static let bundleFolder = folder("MOBILEMM_BUNDLE")

    /// Opened and checked once.
    static let bundle = Result { try ModelBundle.open(bundleFolder) }
    /// What runs it, on one thread as Python had it.
    static let backend = Result { try OnnxBackend(try bundle.get(), threads: 1) }

    private static func folder(_ variable: String) -> URL {
        guard let path = ProcessInfo.processInfo.environment[variable] else {
            fatalError("\(variable) is not set; `make test-ios` sets it")
        }
        return URL(fileURLWithPath: path)
    }

    static func file(_ name: String) -> URL { folder.appendingPathComponent(name) }

    static func bytes(_ name: String) throws -> [UInt8] { [UInt8](try Data(contentsOf: file(name))) }

    static func json(_ name: String) throws -> Json { try Json.parse(try Data(contentsOf: file(name))) }

    static func objects(_ name: String) throws -> [JsonObject] { try json(name).array!.map { $0.object! } }

    static func object(_ name: String) throws -> JsonObject { try json(name).object! }

    static func floats(_ name: String) throws -> [Float] {
        try Data(contentsOf: file(name)).withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
    }

    static func picture(_ name: String) throws -> PixelRaster { try PictureFile.read(file("pictures/\(name)")) }

    static func session(_ sampling: Sampling = Sampling(), system: String? = nil) async throws -> Session {
        try await Session(try bundle.get(), try backend.get(), sampling: sampling, system: system)
    }
}

extension JsonObject {
    func string(_ key: String) -> String { self[key]!.string! }
    func int(_ key: String) -> Int { self[key]!.whole! }
    func number(_ key: String) -> Double { self[key]!.double! }
    func ints(_ key: String) -> [Int] { self[key]!.array!.map { $0.whole! } }
    func strings(_ key: String) -> [String] { self[key]!.array!.map { $0.string! } }
    func objects(_ key: String) -> [JsonObject] { self[key]!.array!.map { $0.object! } }
}

extension PixelRaster {
    /// Bytes of red, green, blue.
    var rgb: [UInt8] {
        pixels.flatMap { pixel in [16, 8, 0].map { UInt8(truncatingIfNeeded: pixel >> UInt32($0)) } }
    }

    /// To the same picture as bytes of red, green, blue; 99 for equal ones.
    func psnr(_ rgb: [UInt8]) -> Double {
        var squares = 0.0
        for (index, pixel) in pixels.enumerated() {
            for channel in 0..<3 {
                let found = Int(pixel >> UInt32(16 - 8 * channel) & 255)
                let difference = Double(found - Int(rgb[3 * index + channel]))
                squares += difference * difference
            }
        }
        return squares == 0 ? 99 : 10 * log10(255 * 255 * Double(rgb.count) / squares)
    }
}

/// Equal code point by code point, which `String`'s own comparison is not.
func assertSame(
    _ found: String, _ wanted: String, _ about: String = "", file: StaticString = #filePath, line: UInt = #line
) {
    XCTAssertEqual(found.scalars, wanted.scalars, about, file: file, line: line)
}

/// That it throws, one line that names a place.
func assertOneLine(
    _ error: (any Error)?, _ place: String, file: StaticString = #filePath, line: UInt = #line
) {
    guard let error = error as? MobileMMError else {
        return XCTFail("no MobileMMError but \(String(describing: error))", file: file, line: line)
    }
    let message = error.message
    XCTAssertFalse(message.unicodeScalars.contains { $0.value < 32 || $0.value == 127 }, message, file: file, line: line)
    XCTAssertTrue(message.contains(place), message, file: file, line: line)
    XCTAssertLessThan(message.count - place.count, 400, message, file: file, line: line)
}

func failure<T>(_ action: () throws -> T) -> (any Error)? {
    do { _ = try action() } catch { return error }
    return nil
}

func failure<T>(_ action: () async throws -> T) async -> (any Error)? {
    do { _ = try await action() } catch { return error }
    return nil
}
