#if canImport(CoreML) && canImport(COnnxRuntime)
    import CoreML
    import Foundation
    import XCTest

    @testable import MobileMMKit

    /// The Core ML backend over a stand-in for Core ML, which answers from a run recorded on the reference interpreter,
    /// and knows the packages' own specifications.
    final class CoreMLTests: XCTestCase {
        private static let bundle = Result { try Recorded.open("MOBILEMM_COREML_BUNDLE") }
        /// The model that ships with mobilemm.
        private static let full = Result { try Recorded.open("MOBILEMM_COREML_DEFAULT") }

        func testAConversationAboutTwoPicturesAndADrawingArePythonsTokenForToken() async throws {
            let (tokens, drawings) = try await Recorded.replay(try Self.bundle.get())
            XCTAssertGreaterThanOrEqual(tokens.count, 4 * 65)
            XCTAssertGreaterThanOrEqual(drawings, 2)
        }

        func testReleasingThePartsThatSeeAndDrawChangesNothing() async throws {
            _ = try await Recorded.replay(try Self.bundle.get(), keepVision: false)
        }

        /// The real packages' names, shapes, types and states.
        func testTheDefaultModelAnswersAboutAPictureAsInPython() async throws {
            let bundle = try Self.full.get()
            let (tokens, drawings) = try await Recorded.replay(bundle)
            XCTAssertGreaterThanOrEqual(tokens.count, 8)
            XCTAssertEqual(drawings > 0, bundle.manifest.generation != nil)
        }

        func testInputsThatWereNotRecordedAreRefusedByTheStandIn() async throws {
            let bundle = try Self.bundle.get()
            let backend = try await openBackend(bundle)
            let session = try await Session(bundle, backend, sampling: Sampling(maxNewTokens: 3))
            let error = await failure { try await session.reply("Something else.") }
            assertOneLine(error, "recorded")
            let count = await session.messages.count
            XCTAssertEqual(count, 0)
        }

        func testThePlanTellsWhereOperationsRun() async throws {
            let backend = try await CoreMLBackend.open(try Self.bundle.get())
            let plan = try await backend.plan("decoder")
            XCTAssertEqual(Array(plan.keys), ["CPU"])
            XCTAssertGreaterThan(plan["CPU"]!, 50)
        }

        func testAManifestThatSaysOtherThanThePackageIsRefused() async throws {
            let files = FileManager.default
            let above = files.temporaryDirectory.appendingPathComponent("\(UUID())")
            let whole = try Self.bundle.get().folder
            // The stand-in knows recordings by the folder's name.
            let folder = above.appendingPathComponent(whole.lastPathComponent)
            defer { try? files.removeItem(at: above) }
            try files.createDirectory(at: above, withIntermediateDirectories: true)
            try files.copyItem(at: whole, to: folder)
            try? files.removeItem(at: folder.appendingPathComponent(ModelBundle.manifestDigestName))
            let manifest = folder.appendingPathComponent(ModelBundle.manifestName)
            let text = try String(contentsOf: manifest, encoding: .utf8)
            for (from, to, word) in [
                ("\"last_index\"", "\"last_place\"", "last_index"),
                ("\"pixels\"", "\"picture\"", "pixels"),
            ] {
                try Data(text.replacingOccurrences(of: from, with: to).utf8).write(to: manifest)
                let error = await failure {
                    let backend = try await openBackend(try ModelBundle.open(folder))
                    for part in ["vision", "embed", "decoder"] { try backend.load(part) }
                }
                assertOneLine(error, word)
            }
        }

        /// What the backend asks for by name is what the packages' specifications have.
        func testTheNamesAreThoseOfThePackages() throws {
            for bundle in [try Self.bundle.get(), try Self.full.get()] {
                let parts = try Json.parse(try Recorded.data(bundle, "interfaces.json")).object!
                func names(_ part: String, _ function: Int, _ side: String) -> Set<String> {
                    Set(parts[part]!.array![function].object!.objects(side).map { $0.string("name") })
                }
                XCTAssertEqual(names("vision", 0, "inputs"), ["pixels"])
                XCTAssertEqual(names("vision", 0, "outputs"), ["image_features"])
                XCTAssertEqual(names("embed", 0, "inputs"), ["input_ids"])
                XCTAssertEqual(names("embed", 0, "outputs"), ["inputs_embeds"])
                if bundle.manifest.generation != nil {
                    XCTAssertEqual(names("output_projector", 0, "inputs"), ["signal_logits"])
                    XCTAssertEqual(names("output_projector", 0, "outputs"), ["condition"])
                    XCTAssertEqual(names("generator", 0, "inputs"), ["condition", "noise"])
                    XCTAssertEqual(names("generator", 0, "outputs"), ["picture"])
                }
                for (index, function) in parts["decoder"]!.array!.enumerated() {
                    XCTAssertEqual(names("decoder", index, "states"), ["k_cache", "v_cache"])
                    XCTAssertEqual(names("decoder", index, "outputs"), ["logits"])
                    let isDecode = function.object!.string("name") == "decode"
                    XCTAssertEqual(
                        names("decoder", index, "inputs"),
                        isDecode ? ["inputs_embeds", "position_ids"] : ["inputs_embeds", "position_ids", "last_index"])
                }
            }
        }
    }
#endif
