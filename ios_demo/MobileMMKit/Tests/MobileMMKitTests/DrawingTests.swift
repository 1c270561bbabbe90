#if canImport(COnnxRuntime)
    import Foundation
    import XCTest

    @testable import MobileMMKit

    /// A tiny model that draws, and what Python's session drew with it (`python -m tests.ios.drawing`).
    final class DrawingTests: XCTestCase {
        private func folder() throws -> URL {
            URL(fileURLWithPath: try XCTUnwrap(ProcessInfo.processInfo.environment["MOBILEMM_DRAWING"]))
        }

        private func draw(_ one: JsonObject, seed: UInt64) async throws -> (Session, String, [Drawing]) {
            let bundle = try ModelBundle.open(try folder().appendingPathComponent("drawer-onnx"))
            let backend = try OnnxBackend(bundle, threads: 1)
            let session = try await Session(
                bundle, backend, sampling: Sampling(maxNewTokens: 4, seed: seed), keepVision: false)
            var (text, drawings): (String, [Drawing]) = ("", [])
            for try await piece in session.stream(one.string("question")) {
                text += piece.text
                if case .drawing(let drawing) = piece { drawings.append(drawing) }
            }
            return (session, text, drawings)
        }

        func testTheSamePictureForASeedAsInPython() async throws {
            let data = try Data(contentsOf: try folder().appendingPathComponent("drawings.json"))
            let cases = try Json.parse(data).array!.map { $0.object! }
            XCTAssertGreaterThanOrEqual(cases.count, 2)
            var pictures: [PixelRaster] = []
            for one in cases {
                let seed = UInt64(one.string("seed"))!
                let (session, text, drawings) = try await draw(one, seed: seed)
                XCTAssertEqual(drawings.count, 1)
                let picture = drawings[0].picture
                XCTAssertEqual([picture.width, picture.height], [one.int("width"), one.int("height")])
                let rgb = [UInt8](try Data(contentsOf: try folder().appendingPathComponent(one.string("file"))))
                let ratio = picture.psnr(rgb)
                print(String(format: "seed %@: %.1f dB to Python's picture", one.string("seed"), ratio))
                XCTAssertGreaterThanOrEqual(ratio, 45)
                XCTAssertEqual(drawings[0].seed, seed)
                assertSame(text, one.string("text"))
                let (ids, memory) = (await session.answerIds, await session.messages.last!.text)
                XCTAssertEqual(ids, one.ints("ids"))
                assertSame(memory, one.string("memory"))
                pictures.append(picture)
            }
            XCTAssertNotEqual(pictures[0], pictures[1])
        }

        func testADrawingIsWrittenAsAPngThatReadsBack() throws {
            let pixels = (0..<12).map { UInt32($0) * 0x0011_0507 | 0xFF00_0000 }
            let picture = PixelRaster(width: 4, height: 3, pixels: pixels)
            let file = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID()).png")
            defer { try? FileManager.default.removeItem(at: file) }
            try PictureFile.write(picture, to: file)
            XCTAssertEqual(try PictureFile.read(file), picture)
            let nowhere = URL(fileURLWithPath: "/nowhere/picture.png")
            assertOneLine(failure { try PictureFile.write(picture, to: nowhere) }, "/nowhere/picture.png")
        }
    }
#endif
