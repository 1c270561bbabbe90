import Foundation

/// How the next token is chosen. Temperature 0 is greedy, and then only the repetition penalty matters.
public struct Sampling: Sendable, Equatable {
    /// The longest answer.
    public var maxNewTokens: Int
    /// What logits are divided by; 0 for greedy.
    public var temperature: Double
    /// Only the k likeliest tokens, and those as likely as the last of them; 0 for all.
    public var topK: Int
    /// Only the fewest likeliest tokens whose probabilities sum to more than this.
    public var topP: Double
    /// What the logits of tokens that were already there are divided (negative ones: multiplied) by, the prompt's
    /// included.
    public var repetitionPenalty: Double
    /// Makes the draw repeatable, anew with each answer; nil for a different one each time.
    public var seed: UInt64?
    /// Only tokens at least this many times as likely as the likeliest.
    public var minP: Double

    public init(
        maxNewTokens: Int = 256, temperature: Double = 0, topK: Int = 0, topP: Double = 1,
        repetitionPenalty: Double = 1, seed: UInt64? = nil, minP: Double = 0
    ) {
        (self.maxNewTokens, self.temperature, self.topK, self.topP) = (maxNewTokens, temperature, topK, topP)
        (self.repetitionPenalty, self.seed, self.minP) = (repetitionPenalty, seed, minP)
    }
}

/// Chooses one token after another by the same settings.
///
/// The order is that of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p; each filter
/// sees the probabilities that the one before it left, made to sum to 1 again.
public struct Sampler {
    private let sampling: Sampling
    private var random: SplitMix64
    private var scores: [Float] = []

    public init(_ sampling: Sampling) {
        self.sampling = sampling
        random = SplitMix64(sampling.seed ?? UInt64.random(in: 0...UInt64.max))
    }

    /// The token's id, for logits, of which those beyond `size` stand for nothing, and the ids of the prompt and of
    /// the answer so far.
    public mutating func choose(_ logits: Values<Float>, size: Int, seen: [Int]) -> Int {
        if sampling.temperature <= 0 && sampling.repetitionPenalty == 1 { return Self.largest(logits, size: size) }
        scores = Array(logits.prefix(size))
        if sampling.repetitionPenalty != 1 { penalize(seen) }
        if sampling.temperature <= 0 { return Self.largest(scores, size: size) }
        return draw()
    }

    /// The first of the largest.
    static func largest<Logits: RandomAccessCollection>(_ logits: Logits, size: Int) -> Int
    where Logits.Element == Float, Logits.Index == Int {
        var (best, most) = (0, logits[0])
        for id in 1..<size where logits[id] > most { (best, most) = (id, logits[id]) }
        return best
    }

    /// Source: Keskar et al. 2019, arXiv 1909.05858, section 4.1. Ids beyond the vocabulary are left out.
    private mutating func penalize(_ seen: [Int]) {
        let penalty = Float(sampling.repetitionPenalty)
        for id in Set(seen) where id < scores.count {
            scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty
        }
    }

    private mutating func draw() -> Int {
        let temperature = Float(sampling.temperature)
        for id in scores.indices { scores[id] /= temperature }
        var ids = Array(scores.indices)
        if sampling.topK >= 1 && sampling.topK < scores.count {
            let least = scores.sorted()[scores.count - sampling.topK]
            ids = ids.filter { scores[$0] >= least }
        }
        if sampling.topP < 1 { ids = nucleus(ids) }
        var shares = softmax(ids)
        if sampling.minP > 0 {
            let floor = min(sampling.minP, 1) * shares.max()!
            ids = zip(ids, shares).filter { $0.1 >= floor }.map(\.0)
            shares = softmax(ids)
        }
        let point = random.uniform() * shares.reduce(0, +)
        var total = 0.0
        for (id, share) in zip(ids, shares) {
            total += share
            if total > point { return id }
        }
        return ids.last!
    }

    private func nucleus(_ ids: [Int]) -> [Int] {
        let shares = softmax(ids)
        // Tokens below the mean share of what is cut off all go: only the others need to be sorted.
        let least = (1 - sampling.topP) / Double(ids.count)
        let likeliest = shares.indices.reduce(0) { shares[$1] > shares[$0] ? $1 : $0 }
        func isSmall(_ index: Int) -> Bool { shares[index] < least && index != likeliest }
        // A stable order, as Python's: equal shares stay as they stand.
        let some = shares.indices.filter { !isSmall($0) }.sorted { (shares[$0], $0) < (shares[$1], $1) }
        var total = shares.indices.filter(isSmall).reduce(0) { $0 + shares[$1] }
        var stays: [Int] = []
        for index in some {
            total += shares[index]
            if total > 1 - sampling.topP || index == some.last { stays.append(ids[index]) }
        }
        return stays.sorted()
    }

    private func softmax(_ ids: [Int]) -> [Double] {
        let most = Double(ids.reduce(-Float.infinity) { max($0, scores[$1]) })
        let powers = ids.map { exp(Double(scores[$0]) - most) }
        let sum = powers.reduce(0, +)
        return powers.map { $0 / sum }
    }
}

/// Random numbers by ten lines in any language. Source: Steele, Lea and Flood 2014, "Fast splittable PRNGs".
public struct SplitMix64: Sendable {
    private var state: UInt64

    public init(_ seed: UInt64) {
        state = seed
    }

    public mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var mixed = state
        mixed = (mixed ^ mixed >> 30) &* 0xBF58_476D_1CE4_E5B9
        mixed = (mixed ^ mixed >> 27) &* 0x94D0_49BB_1331_11EB
        return mixed ^ mixed >> 31
    }

    /// A number from 0 to 1, without 1: the upper 53 bits.
    public mutating func uniform() -> Double { Double(next() >> 11) * 0x1p-53 }
}
