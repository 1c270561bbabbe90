#if canImport(CoreML) && canImport(COnnxRuntime)
    import CoreML
    import Foundation
    import XCTest

    @testable import MobileMMKit

    /// The Core ML backend over a stand-in for Core ML, which answers from a run recorded on the reference interpreter,
    /// and knows the packages' own specifications.
    final class CoreMLTests: XCTestCase {
        private static let recording = URL(fileURLWithPath: ProcessInfo.processInfo.environment["MOBILEMM_RECORDING"]!)
        private static let bundle = Result {
            try ModelBundle.open(URL(fileURLWithPath: ProcessInfo.processInfo.environment["MOBILEMM_COREML_BUNDLE"]!))
        }

        private func turns() throws -> [JsonObject] {
            try Json.parse(try Data(contentsOf: Self.recording.appendingPathComponent("turns.json"))).array!.map { $0.object! }
        }

        private func answers(keepVision: Bool) async throws -> (ids: [[Int]], answers: [String]) {
            let bundle = try Self.bundle.get()
            let backend = try await openBackend(bundle)
            let session = try await Session(
                bundle, backend, sampling: Sampling(maxNewTokens: 65), keepVision: keepVision)
            var found: (ids: [[Int]], answers: [String]) = ([], [])
            for turn in try turns() {
                for image in turn.strings("images") { try await session.lookAt(try Vectors.picture(image)) }
                found.answers.append(try await session.reply(turn.string("text")))
                found.ids.append(await session.answerIds)
            }
            return found
        }

        func testAConversationAboutTwoPicturesIsPythonsTokenForToken() async throws {
            let wanted = try turns()
            let (ids, answers) = try await answers(keepVision: true)
            XCTAssertEqual(ids, wanted.map { $0.ints("ids") })
            XCTAssertGreaterThanOrEqual(ids.joined().count, 65)
            for (answer, turn) in zip(answers, wanted) { assertSame(answer, turn.string("answer")) }
        }

        func testReleasingTheVisionPartChangesNothing() async throws {
            let (ids, _) = try await answers(keepVision: false)
            XCTAssertEqual(ids, try turns().map { $0.ints("ids") })
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
            let folder = files.temporaryDirectory.appendingPathComponent("coreml-\(UUID())")
            defer { try? files.removeItem(at: folder) }
            try files.copyItem(at: try Self.bundle.get().folder, to: folder)
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
            let data = try Data(contentsOf: Self.recording.appendingPathComponent("interfaces.json"))
            let parts = try Json.parse(data).object!
            func names(_ part: String, _ function: Int, _ side: String) -> Set<String> {
                Set(parts[part]!.array![function].object!.objects(side).map { $0.string("name") })
            }
            XCTAssertEqual(names("vision", 0, "inputs"), ["pixels"])
            XCTAssertEqual(names("vision", 0, "outputs"), ["image_features"])
            XCTAssertEqual(names("embed", 0, "inputs"), ["input_ids"])
            XCTAssertEqual(names("embed", 0, "outputs"), ["inputs_embeds"])
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
#endif
