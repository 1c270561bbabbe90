import Foundation
import XCTest

@testable import MobileMMKit

final class ImageTests: XCTestCase {
    func testPixelsArePillowsBitForBit() throws {
        let cases = try Vectors.objects("images.json")
        XCTAssertGreaterThanOrEqual(cases.count, 60)
        for one in cases {
            let (width, height) = (one.int("width"), one.int("height"))
            let bytes = try Vectors.bytes("images/\(one.string("rgba"))")
            let pixels = (0..<width * height).map { index in
                let four = bytes[4 * index..<4 * index + 4].map(UInt32.init)
                return four[3] << 24 | four[0] << 16 | four[1] << 8 | four[2]
            }
            let rule = one["rule"]!.object!
            let found = try ImageProcessor(imageRule(rule)).toPixels(
                PixelRaster(width: width, height: height, pixels: pixels))
            let wanted = try Vectors.bytes("images/\(one.string("pixels"))")
            XCTAssertTrue(found == wanted, "\(width)×\(height) by \(rule)")
        }
    }

    private func imageRule(_ of: JsonObject) -> ImageRule {
        ImageRule(
            height: of.int("height"), width: of.int("width"), strategy: of.string("strategy"),
            filter: of.string("filter"), padColor: of.ints("pad_color"), shortestEdge: of["shortest_edge"]?.whole,
            positionGrid: nil)
    }

    func testPhotographsAreDecodedAndTurnedUprightAsInPython() throws {
        let all = try Vectors.object("orientations.json")
        for one in all.objects("turned") {
            let orientation = one.int("orientation")
            let data = try Vectors.bytes("images/\(one.string("file"))")
            XCTAssertEqual(Orientation.of(data), orientation)
            let right = all["upright"]!.object![String(orientation)]!.object!
            let rgb = try Vectors.bytes("images/\(right.string("file"))")
            let wanted = PixelRaster(
                width: right.int("width"), height: right.int("height"),
                pixels: (0..<rgb.count / 3).map { index in
                    let three = rgb[3 * index..<3 * index + 3].map(UInt32.init)
                    return 255 << 24 | three[0] << 16 | three[1] << 8 | three[2]
                })
            let found = try PictureFile.read(Vectors.file("images/\(one.string("file"))"))
            XCTAssertEqual([found.width, found.height], [wanted.width, wanted.height])
            // Decoders of JPEG may differ by a rounding.
            let differences = zip(found.pixels, wanted.pixels).map { one, other in
                [16, 8, 0].map { abs(Int(one >> $0 & 255) - Int(other >> $0 & 255)) }.max()!
            }
            XCTAssertLessThanOrEqual(differences.max()!, 2, "orientation \(orientation)")
        }
    }

    func testDamagedMetadataIsNoOrientationAndDamagedPicturesAreRefused() throws {
        let jpeg = try Vectors.bytes("images/turned-6.jpg")
        for length in 0..<min(jpeg.count, 120) {
            XCTAssertTrue([1, 6].contains(Orientation.of(Array(jpeg.prefix(length)))))
            XCTAssertTrue(failure { try PictureFile.decode(Data(jpeg.prefix(length))) } is MobileMMError)
        }
        let png = try Vectors.bytes("pictures/0.png")
        XCTAssertEqual(Orientation.of(png), 1)
        for length in stride(from: 0, to: png.count / 2, by: png.count / 40) {
            XCTAssertTrue(failure { try PictureFile.decode(Data(png.prefix(length))) } is MobileMMError)
        }
        assertOneLine(failure { try PictureFile.read(Vectors.file("nowhere.png")) }, "nowhere.png")
    }
}
