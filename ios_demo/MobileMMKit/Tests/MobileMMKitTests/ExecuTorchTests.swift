#if canImport(ExecuTorch) && canImport(COnnxRuntime)
    import Foundation
    import XCTest

    @testable import MobileMMKit

    /// The ExecuTorch backend over a stand-in for ExecuTorch, which answers from a run recorded on its own runtime.
    final class ExecuTorchTests: XCTestCase {
        private static let bundle = Result { try Recorded.open("MOBILEMM_EXECUTORCH_BUNDLE") }

        func testAConversationAboutTwoPicturesAndADrawingArePythonsTokenForToken() async throws {
            let (tokens, drawings) = try await Recorded.replay(try Self.bundle.get())
            XCTAssertGreaterThanOrEqual(tokens.count, 3 * 65)
            XCTAssertGreaterThanOrEqual(drawings, 1)
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
            let files = FileManager.default
            let above = files.temporaryDirectory.appendingPathComponent("\(UUID())")
            let whole = try Self.bundle.get()
            // The stand-in knows recordings by the folder's name.
            let folder = above.appendingPathComponent(whole.folder.lastPathComponent)
            defer { try? files.removeItem(at: above) }
            try files.createDirectory(at: above, withIntermediateDirectories: true)
            try files.copyItem(at: whole.folder, to: folder)
            try? files.removeItem(at: folder.appendingPathComponent(ModelBundle.manifestDigestName))
            let manifest = folder.appendingPathComponent(ModelBundle.manifestName)
            let text = try String(contentsOf: manifest, encoding: .utf8)
            let length = "\"context_length\": \(whole.manifest.model.contextLength)"
            XCTAssertTrue(text.contains(length))
            try Data(text.replacingOccurrences(of: length, with: "\"context_length\": 400").utf8).write(to: manifest)
            let error = await failure { try await openBackend(try ModelBundle.open(folder)).load("decoder") }
            assertOneLine(error, "text_decoder")
        }
    }
#endif
