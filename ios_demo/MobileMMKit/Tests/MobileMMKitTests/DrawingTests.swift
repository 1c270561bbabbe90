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

        func testStepByStepItSketchesAndDrawsAsInPython() async throws {
            let folder = try stepwise()
            let bundle = try ModelBundle.open(folder.appendingPathComponent("drawer-onnx"))
            let backend = try OnnxBackend(bundle, threads: 1)
            let pictures = try await drawsAsPython(bundle, backend, folder, sketches: 3)
            XCTAssertNotEqual(pictures[0], pictures[1])
            let other = try await Session(
                bundle, backend, sampling: Sampling(maxNewTokens: 4, seed: 7), steps: 2, sketches: true)
            var counts: [Int] = []
            for try await piece in other.stream("What is this picture") {
                if case .sketch(let sketch) = piece { counts += [sketch.step, sketch.steps] }
            }
            XCTAssertEqual(counts, [1, 2])
            let refused = await failure { try await Session(bundle, backend, steps: 3) }
            assertOneLine(refused, "draws in 1, 2, 4: export it with --stepwise --steps 3")
        }

        func testSchedulesThatDoNotFitAreRefused() throws {
            let file = try stepwise().appendingPathComponent("drawer-onnx/manifest.json")
            let text = String(decoding: try Data(contentsOf: file), as: UTF8.self)
            let changes = [
                ("\"steps\": 4", "\"steps\": 3", "one for each number of steps, 3 among them"),
                ("\"scales\"", "\"scale\"", "'scales' is missing"),
                ("\"next_latents\"", "\"latents\"", "'next_latents' is missing"),
            ]
            for (old, new, told) in changes {
                let changed = text.replacingOccurrences(of: old, with: new)
                XCTAssertNotEqual(changed, text)
                assertOneLine(failure { try ManifestReader.parse(Data(changed.utf8), path: file.path) }, told)
            }
        }

        private func stepwise() throws -> URL {
            URL(fileURLWithPath: try XCTUnwrap(ProcessInfo.processInfo.environment["MOBILEMM_DRAWING"]))
                .appendingPathComponent("stepwise")
        }

        private func drawsAsPython(
            _ bundle: ModelBundle, _ backend: OnnxBackend, _ folder: URL, sketches: Int = 0
        ) async throws -> [PixelRaster] {
            var pictures: [PixelRaster] = []
            let data = try Data(contentsOf: folder.appendingPathComponent("drawings.json"))
            for one in try Json.parse(data).array!.map({ $0.object! }) {
                let seed = UInt64(one.string("seed"))!
                let sampling = Sampling(maxNewTokens: one.int("max_new_tokens"), seed: seed)
                let session = try await Session(
                    bundle, backend, sampling: sampling, keepVision: false, sketches: true)
                var (text, drawings, found): (String, [Drawing], [Sketch]) = ("", [], [])
                for try await piece in session.stream(one.string("question")) {
                    text += piece.text
                    if case .drawing(let drawing) = piece { drawings.append(drawing) }
                    if case .sketch(let sketch) = piece { found.append(sketch) }
                }
                XCTAssertEqual(drawings.count, 1)
                XCTAssertEqual(found.count, sketches)
                for (sketch, file) in zip(found, sketches == 0 ? [] : one.strings("sketches")) {
                    let rgb = [UInt8](try Data(contentsOf: folder.appendingPathComponent(file)))
                    XCTAssertGreaterThanOrEqual(sketch.picture.psnr(rgb), 45)
                }
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
