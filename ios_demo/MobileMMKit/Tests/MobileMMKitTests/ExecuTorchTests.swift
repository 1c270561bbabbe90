#if canImport(ExecuTorch) && canImport(COnnxRuntime)
    import Foundation
    import XCTest

    @testable import MobileMMKit

    /// The ExecuTorch backend over a stand-in for ExecuTorch, which answers from a run recorded on its own runtime.
    final class ExecuTorchTests: XCTestCase {
        private static let bundle = Result { try Recorded.open("MOBILEMM_EXECUTORCH_BUNDLE") }

        func testAConversationAboutTwoPicturesAndADrawingArePythonsTokenForToken() async throws {
            let replay = try await Recorded.replay(try Self.bundle.get())
            XCTAssertGreaterThanOrEqual(replay.tokens.count, 3 * 65)
            XCTAssertGreaterThanOrEqual(replay.drawings, 1)
        }

        func testStepByStepItSketchesAndDrawsAsInPython() async throws {
            for keepVision in [true, false] {
                let replay = try await Recorded.replay(try Recorded.stepwise("executorch"), keepVision: keepVision)
                XCTAssertGreaterThanOrEqual(replay.drawings, 3)
                // A drawing in each of 1, 2 and 4 steps at least.
                XCTAssertNil(replay.sketches[1])
                XCTAssertGreaterThanOrEqual(replay.sketches[2, default: 0], 1)
                XCTAssertGreaterThanOrEqual(replay.sketches[4, default: 0], 3)
            }
        }

        func testReleasingThePartsThatSeeAndDrawChangesNothing() async throws {
            _ = try await Recorded.replay(try Self.bundle.get(), keepVision: false)
        }

        func testInputsThatWereNotRecordedAreRefusedByTheStandIn() async throws {
            let session = try await Session(
                try Self.bundle.get(), try await openBackend(try Self.bundle.get()), sampling: Sampling(maxNewTokens: 3))
            let error = await failure { try await session.reply("Something else.") }
            assertOneLine(error, "recorded")
        }

        /// Other shapes than the program's own are refused when a part is loaded.
        func testAManifestThatSaysOtherThanTheProgramIsRefused() async throws {
            let bundle = try Self.bundle.get()
            let length = "\"context_length\": \(bundle.manifest.model.contextLength)"
            try await Recorded.changed(bundle, length, "\"context_length\": 400") { folder in
                let error = await failure { try await openBackend(try ModelBundle.open(folder)).load("decoder") }
                assertOneLine(error, "text_decoder")
            }
            let full = "\"name\": \"scales\",\n     \"dtype\": \"float32\""
            let half = full.replacingOccurrences(of: "32", with: "16")
            try await Recorded.changed(try Recorded.stepwise("executorch"), full, half) { folder in
                let error = await failure { try await openBackend(try ModelBundle.open(folder)).load("denoiser") }
                assertOneLine(error, "scales")
            }
        }
    }
#endif
