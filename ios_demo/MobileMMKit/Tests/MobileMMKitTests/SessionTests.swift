import Foundation
import Synchronization
import XCTest

@testable import MobileMMKit

final class SessionTests: XCTestCase {
    func testGreedyAnswersAboutFiftyPicturesArePythonsTokenForToken() async throws {
        let cases = try Vectors.object("answers.json").objects("pictures")
        XCTAssertGreaterThanOrEqual(cases.count, 50)
        let session = try await Vectors.session(Sampling(maxNewTokens: 24))
        for one in cases {
            await session.reset()
            try await session.lookAt(try Vectors.picture(one.string("image")))
            var text = ""
            for try await piece in session.stream(one.string("question")) { text += piece.text }
            let ids = await session.answerIds
            XCTAssertEqual(ids, one.ints("ids"), one.string("name"))
            assertSame(text, one.string("text"))
        }
    }

    func testConversationsOfSeveralTurnsArePythonsAndSoIsWhatTheCacheSaves() async throws {
        for one in try Vectors.object("answers.json").objects("conversations") {
            let sampling = Sampling(
                maxNewTokens: 20, temperature: one.number("temperature"), topP: one.number("top_p"),
                seed: one["seed"]!.whole.map(UInt64.init))
            let session = try await Vectors.session(sampling, system: one.string("system"))
            for turn in one.objects("turns") {
                for image in turn.strings("images") { try await session.lookAt(try Vectors.picture(image)) }
                assertSame(try await session.reply(turn.string("text")), turn.string("answer"))
                let (ids, stats) = (await session.answerIds, await session.stats!)
                XCTAssertEqual(ids, turn.ints("ids"))
                XCTAssertEqual(stats.promptTokens, turn.int("prompt_tokens"))
                XCTAssertEqual(stats.cachedTokens, turn.int("cached_tokens"))
            }
        }
    }

    fileprivate static let story = "Tell me a long story about a house."

    func testAnAnswerThatIsStoppedEndsWhereItIsAndTheConversationGoesOn() async throws {
        let whole = try await Vectors.session(Sampling(maxNewTokens: 40)).reply(SessionTests.story)
        let session = try await Vectors.session(Sampling(maxNewTokens: 40))
        var said = ""
        for try await piece in session.stream(SessionTests.story) {
            said += piece.text
            if said.count > 12 { session.cancel() }
        }
        XCTAssertTrue(whole.hasPrefix(said) && said.count < whole.count && said.count > 12, said)
        let last = await session.messages.last!.text
        XCTAssertEqual(last, said)
        let more = try await session.reply("Go on.")
        XCTAssertFalse(more.isEmpty)
        // The cache is taken up where the answer was stopped.
        let (stats, messages) = (await session.stats!, await session.messages)
        XCTAssertGreaterThan(stats.cachedTokens, 25)
        XCTAssertEqual(messages.count, 4)
    }

    func testAnAnswerThatNobodyReadsOnStops() async throws {
        let session = try await Vectors.session(Sampling(maxNewTokens: 400))
        for try await _ in session.stream(SessionTests.story) { break }
        // What comes next waits until the answer has ended.
        let before = ContinuousClock.now
        let stats = await session.stats
        XCTAssertLessThan((ContinuousClock.now - before).seconds, 5)
        XCTAssertLessThan(stats?.newTokens ?? 0, 100)
    }

    func testACancelledTaskStopsBeforeAndWhileItAnswers() async throws {
        let session = try await Vectors.session(Sampling(maxNewTokens: 400))
        let long = String(repeating: "A house stands on a hill. ", count: 300)
        let task = Task { try await session.reply(long) }
        try await Task.sleep(for: .milliseconds(300))
        let told = ContinuousClock.now
        task.cancel()
        let said = try await task.value
        XCTAssertEqual(said, "")
        XCTAssertLessThan((ContinuousClock.now - told).seconds, 3)
        let unsaid = Task {
            withUnsafeCurrentTask { $0?.cancel() }
            return try await session.reply(SessionTests.story)
        }
        let nothing = try await unsaid.value
        XCTAssertEqual(nothing, "")
        let count = await session.messages.count
        XCTAssertEqual(count, 0)
        let answer = try await Vectors.session(Sampling(maxNewTokens: 5)).reply("And now?")
        XCTAssertFalse(answer.isEmpty)
    }

    func testAPromptInChunksSaysWhatAPromptInOnePieceSays() async throws {
        let sentence = "The quick brown fox jumps over the lazy dog near a house and a tree. "
        let text = String(repeating: sentence, count: 45)
        let session = try await Vectors.session(Sampling(maxNewTokens: 8))
        _ = try await session.reply(text)
        let (ids, stats) = (await session.answerIds, await session.stats!)
        XCTAssertGreaterThan(stats.promptTokens, 600)
        // Through a cache that holds some of it already, the same prompt must lead to the same place.
        let other = try await Vectors.session(Sampling(maxNewTokens: 8))
        _ = try await other.reply(String(text.prefix(1000)))
        await other.reset()
        _ = try await other.reply(text)
        let again = await other.answerIds
        XCTAssertEqual(again, ids)
    }

    func testAPromptThatIsTooLongIsToldAndTheConversationStaysAsItWas() async throws {
        let session = try await Vectors.session()
        let error = await failure { try await session.reply(String(repeating: "house ", count: 9000)) }
        XCTAssertTrue("\(error!)".contains("context is 8192"), "\(error!)")
        let count = await session.messages.count
        XCTAssertEqual(count, 0)
    }

    func testWhatIsComputedHoldsUpNoOtherTask() async throws {
        // Three answers at once, on bundles' own backends, would take all of Swift's threads on two cores.
        let bundle = try Vectors.bundle.get()
        let answers = try await withThrowingTaskGroup(of: String.self) { group in
            for _ in 0..<3 {
                group.addTask {
                    let backend = try OnnxBackend(bundle, threads: 1)
                    return try await Session(bundle, backend, sampling: Sampling(maxNewTokens: 48)).reply("Hello")
                }
            }
            var longest = 0.0
            for _ in 0..<20 {
                let before = ContinuousClock.now
                try await Task.sleep(for: .milliseconds(10))
                longest = max(longest, (ContinuousClock.now - before).seconds)
            }
            XCTAssertLessThan(longest, 4)
            return try await group.reduce(into: []) { $0.append($1) }
        }
        XCTAssertEqual(Set(answers).count, 1)
    }

    func testPicturesAreLookedAtBeforeTheDecoderIsLoadedSoThatMemoryNeedNotHoldBoth() async throws {
        let bundle = try ModelBundle.open(Vectors.file("tiny-onnx"))
        for keepVision in [true, false] {
            let backend = CountingBackend(try OnnxBackend(bundle, threads: 1))
            let session = try await Session(
                bundle, backend, sampling: Sampling(maxNewTokens: 2), keepVision: keepVision)
            for _ in 0..<2 {
                try await session.lookAt(PixelRaster(width: 4, height: 4, pixels: (0..<16).map { $0 * 0x0F_0F0F }))
                _ = try await session.reply("abc")
            }
            let given = keepVision ? [] : ["release vision"]
            let calls = backend.calls.withLock { $0.filter { $0 != "run embed" } }
            // The same picture is not looked at again.
            XCTAssertEqual(
                calls, ["load vision", "run vision"] + given + ["load embed", "decoder"] + given + ["load embed"])
        }
    }
}

/// A backend whose calls are written down.
private final class CountingBackend: Backend {
    private let backend: OnnxBackend
    let calls = Mutex<[String]>([])

    init(_ backend: OnnxBackend) {
        self.backend = backend
    }

    var runtime: String { backend.runtime }

    private func note(_ call: String) { calls.withLock { $0.append(call) } }

    func load(_ part: String) throws {
        note("load \(part)")
        try backend.load(part)
    }

    func release(_ part: String) {
        note("release \(part)")
        backend.release(part)
    }

    func run(_ part: String, _ inputs: [String: Tensor]) throws -> [String: Tensor] {
        note("run \(part)")
        return try backend.run(part, inputs)
    }

    func decoder() throws -> any Decoder {
        note("decoder")
        return try backend.decoder()
    }

    func cancel() { backend.cancel() }

    func resume() { backend.resume() }
}
