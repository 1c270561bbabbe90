#if canImport(COnnxRuntime)
    import Foundation
    import XCTest

    @testable import MobileMMKit

    /// What Python's session drew for the same words and seeds (`python -m tests.ios.drawing`).
    final class DrawingTests: XCTestCase {
        func testATinyModelDrawsTheSamePictureForASeedAsInPython() async throws {
            let folder = URL(
                fileURLWithPath: try XCTUnwrap(ProcessInfo.processInfo.environment["MOBILEMM_DRAWING"]))
            let bundle = try ModelBundle.open(folder.appendingPathComponent("drawer-onnx"))
            let backend = try OnnxBackend(bundle, threads: 1)
            let pictures = try await drawsAsPython(bundle, backend, folder)
            XCTAssertGreaterThanOrEqual(pictures.count, 2)
            XCTAssertNotEqual(pictures[0], pictures[1])
        }

        func testTheModelThatShipsDrawsTheSamePictureForASeedAsInPython() async throws {
            let pictures = try await drawsAsPython(
                try Vectors.bundle.get(), try Vectors.backend.get(), Vectors.file("drawings"))
            XCTAssertGreaterThanOrEqual(pictures.count, 2)
            XCTAssertNotEqual(pictures[0], pictures[1])
        }

        private func drawsAsPython(
            _ bundle: ModelBundle, _ backend: OnnxBackend, _ folder: URL
        ) async throws -> [PixelRaster] {
            var pictures: [PixelRaster] = []
            let data = try Data(contentsOf: folder.appendingPathComponent("drawings.json"))
            for one in try Json.parse(data).array!.map({ $0.object! }) {
                let seed = UInt64(one.string("seed"))!
                let sampling = Sampling(maxNewTokens: one.int("max_new_tokens"), seed: seed)
                let session = try await Session(bundle, backend, sampling: sampling, keepVision: false)
                var (text, drawings): (String, [Drawing]) = ("", [])
                for try await piece in session.stream(one.string("question")) {
                    text += piece.text
                    if case .drawing(let drawing) = piece { drawings.append(drawing) }
                }
                XCTAssertEqual(drawings.count, 1)
                let picture = drawings[0].picture
                XCTAssertEqual([picture.width, picture.height], [one.int("width"), one.int("height")])
                let rgb = [UInt8](try Data(contentsOf: folder.appendingPathComponent(one.string("file"))))
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
            return pictures
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
