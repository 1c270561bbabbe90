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

        /// The tiny model that draws step by step, for a target.
        static func stepwise(_ target: String) throws -> ModelBundle {
            let folder = ProcessInfo.processInfo.environment["MOBILEMM_DRAWING"]!
            return try ModelBundle.open(URL(fileURLWithPath: "\(folder)/stepwise/stepwise-\(target)"))
        }

        /// Hands over a copy of a bundle whose manifest says `to` where it said `from`.
        static func changed(
            _ bundle: ModelBundle, _ from: String, _ to: String, _ action: (URL) async throws -> Void
        ) async throws {
            let files = FileManager.default
            let above = files.temporaryDirectory.appendingPathComponent("\(UUID())")
            // The stand-ins know recordings by the folder's name.
            let copy = above.appendingPathComponent(bundle.folder.lastPathComponent)
            defer { try? files.removeItem(at: above) }
            try files.createDirectory(at: above, withIntermediateDirectories: true)
            try files.copyItem(at: bundle.folder, to: copy)
            try? files.removeItem(at: copy.appendingPathComponent(ModelBundle.manifestDigestName))
            let manifest = copy.appendingPathComponent(ModelBundle.manifestName)
            let text = try String(contentsOf: manifest, encoding: .utf8)
            XCTAssertTrue(text.contains(from), from)
            try Data(text.replacingOccurrences(of: from, with: to).utf8).write(to: manifest)
            try await action(copy)
        }

        static func data(_ bundle: ModelBundle, _ name: String) throws -> Data {
            try Data(contentsOf: folder.appendingPathComponent(bundle.folder.lastPathComponent).appendingPathComponent(name))
        }

        /// What was said and drawn again.
        struct Replay {
            var tokens: [Int] = []
            var drawings = 0
            /// Of drawings that were made step by step, by how many steps there were.
            var sketches: [Int: Int] = [:]
        }

        /// Says again what Python's sessions said; every answer's tokens, and every pixel drawn, must be the same.
        static func replay(_ bundle: ModelBundle, keepVision: Bool = true) async throws -> Replay {
            let run = try Json.parse(try data(bundle, "run.json")).object!
            let backend = try await openBackend(bundle)
            let sampling = Sampling(maxNewTokens: run.int("max_new_tokens"), seed: UInt64(run.int("seed")))
            var replay = Replay()
            for recorded in run.objects("sessions") {
                let steps = recorded["steps"]?.whole
                let session = try await Session(
                    bundle, backend, sampling: sampling, keepVision: keepVision, steps: steps, sketches: true)
                for turn in recorded.objects("turns") { try await say(turn, session, bundle, &replay) }
            }
            return replay
        }

        private static func say(
            _ turn: JsonObject, _ session: Session, _ bundle: ModelBundle, _ replay: inout Replay
        ) async throws {
            if turn["reset"] != nil { await session.reset() }
            for image in turn.strings("images") { try await session.lookAt(try Vectors.picture(image)) }
            var (text, drawings): (String, [(Drawing, [Sketch])]) = ("", [])
            var sketches: [Sketch] = []
            for try await piece in session.stream(turn.string("text")) {
                text += piece.text
                switch piece {
                case .text: break
                case .sketch(let sketch): sketches.append(sketch)
                case .drawing(let drawing):
                    drawings.append((drawing, sketches))
                    sketches = []
                }
            }
            let ids = await session.answerIds
            XCTAssertEqual(ids, turn.ints("ids"))
            assertSame(text, turn.string("answer"))
            let wanted = turn.objects("drawings")
            XCTAssertEqual(drawings.count, wanted.count)
            for ((drawing, sketches), one) in zip(drawings, wanted) {
                try assertPixels(drawing.picture, one, bundle)
                let made = one.objects("sketches")
                XCTAssertEqual(sketches.count, made.count)
                for (sketch, one) in zip(sketches, made) {
                    XCTAssertEqual([sketch.step, sketch.steps], [one.int("step"), one.int("steps")])
                    try assertPixels(sketch.picture, one, bundle)
                    replay.sketches[sketch.steps, default: 0] += 1
                }
            }
            replay.tokens += ids
            replay.drawings += drawings.count
        }

        private static func assertPixels(_ found: PixelRaster, _ wanted: JsonObject, _ bundle: ModelBundle) throws {
            XCTAssertEqual([found.width, found.height], [wanted.int("width"), wanted.int("height")])
            let rgb = [UInt8](try data(bundle, wanted.string("file")))
            XCTAssertTrue(found.rgb == rgb, "\(found.psnr(rgb)) dB")
        }
    }
#endif
