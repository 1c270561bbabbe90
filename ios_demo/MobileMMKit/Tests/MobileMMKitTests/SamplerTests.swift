import XCTest

@testable import MobileMMKit

final class SamplerTests: XCTestCase {
    func testTheTokensThatAreDrawnArePythons() throws {
        let all = try Vectors.object("sampling.json")
        let vocabulary = all.int("vocabulary")
        let logits = try Vectors.floats("logits.f32")
        for one in all.objects("cases") {
            let sampling = Sampling(
                temperature: one.number("temperature"), topK: one.int("top_k"), topP: one.number("top_p"),
                repetitionPenalty: one.number("repetition_penalty"),
                seed: one["seed"]!.whole.map { UInt64(bitPattern: Int64($0)) }, minP: one.number("min_p"))
            var sampler = Sampler(sampling)
            var seen = [5, 6, vocabulary + 1]
            for (step, wanted) in one.ints("tokens").enumerated() {
                let row = Array(logits[step % 8 * vocabulary..<(step % 8 + 1) * vocabulary])
                let token = sampler.choose(
                    try Tensor(floats: row, [vocabulary]).floats, size: vocabulary, seen: seen)
                XCTAssertEqual(token, wanted, "\(sampling), step \(step)")
                seen.append(token)
            }
        }
    }

    func testRandomNumbersAreThoseOfThePapersGenerator() {
        var random = SplitMix64(1_234_567)
        XCTAssertEqual(random.next(), 6_457_827_717_110_365_317)
    }
}
