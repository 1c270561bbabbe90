#if canImport(COnnxRuntime)
    import Foundation
    import XCTest

    @testable import MobileMMKit

    /// Runs of bundles by Python's session, which the stand-ins for Core ML and ExecuTorch answer from.
    enum Recorded {
        private static let folder = URL(fileURLWithPath: ProcessInfo.processInfo.environment["MOBILEMM_RECORDING"]!)

        /// The bundle that a variable of the environment names.
        static func open(_ variable: String) throws -> ModelBundle {
            try ModelBundle.open(URL(fileURLWithPath: ProcessInfo.processInfo.environment[variable]!))
        }

        static func data(_ bundle: ModelBundle, _ name: String) throws -> Data {
            try Data(contentsOf: folder.appendingPathComponent(bundle.folder.lastPathComponent).appendingPathComponent(name))
        }

        /// Says again what Python's session said; every answer's tokens, and every drawing, must be the same.
        static func replay(_ bundle: ModelBundle, keepVision: Bool = true) async throws -> (tokens: [Int], drawings: Int) {
            let run = try Json.parse(try data(bundle, "run.json")).object!
            let backend = try await openBackend(bundle)
            let sampling = Sampling(maxNewTokens: run.int("max_new_tokens"), seed: UInt64(run.int("seed")))
            let session = try await Session(bundle, backend, sampling: sampling, keepVision: keepVision)
            var (tokens, count) = ([Int](), 0)
            for turn in run.objects("turns") {
                if turn["reset"] != nil { await session.reset() }
                for image in turn.strings("images") { try await session.lookAt(try Vectors.picture(image)) }
                var (text, drawings): (String, [Drawing]) = ("", [])
                for try await piece in session.stream(turn.string("text")) {
                    text += piece.text
                    if case .drawing(let drawing) = piece { drawings.append(drawing) }
                }
                let ids = await session.answerIds
                XCTAssertEqual(ids, turn.ints("ids"))
                assertSame(text, turn.string("answer"))
                let wanted = turn.objects("drawings")
                XCTAssertEqual(drawings.count, wanted.count)
                for (drawing, one) in zip(drawings, wanted) {
                    XCTAssertEqual([drawing.picture.width, drawing.picture.height], [one.int("width"), one.int("height")])
                    let ratio = drawing.picture.psnr([UInt8](try data(bundle, one.string("file"))))
                    XCTAssertGreaterThanOrEqual(ratio, 45)
                }
                tokens += ids
                count += drawings.count
            }
            return (tokens, count)
        }
    }
#endif
