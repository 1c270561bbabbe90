/// A tokenizer's model: characters joined pair by pair, the pair that training joined first before the others.
///
/// Source: Sennrich et al. 2016, arXiv 1508.07909, section 3.2; bytes in place of unknown characters as SentencePiece
/// has them.
final class BytePairEncoding {
    private struct Pair: Hashable {
        let left, right: Int32
    }

    private struct Merge {
        let rank: Int
        let id: Int
    }

    let tokens: [Int: Scalars]
    private let ids: [Scalars: Int]
    private let merges: [Pair: Merge]
    private let unknown: Int?
    private let byteFallback, fuseUnknown, ignoreMerges: Bool
    private var cache: [Scalars: [Int]] = [:]

    private static let cachedWords = 10_000
    private static let cachedLength = 64
    private static let gone = -1

    init(_ of: JsonObject) throws {
        // Old files leave the type out.
        if of["type"] != nil && of.type != "BPE" { throw UnknownTokenizer("model", of) }
        if let dropout = of["dropout"], !dropout.isNull, dropout.double != 0 {
            throw UnknownTokenizer("'dropout' gives other ids each time")
        }
        for key in ["continuing_subword_prefix", "end_of_word_suffix"] where !(of[key]?.string ?? "").isEmpty {
            throw UnknownTokenizer("'\(key)' is not known here")
        }
        let vocabulary = try of.at("vocab")
        var ids: [Scalars: Int] = [:]
        ids.reserveCapacity(vocabulary.count)
        for text in vocabulary.names {
            let value = vocabulary[text]!
            guard let id = value.whole, (0..<Int(Int32.max)).contains(id) else {
                throw UnknownTokenizer("'vocab' maps to \(value.shown)")
            }
            ids[text.scalars] = id
        }
        var merges: [Pair: Merge] = [:]
        let pairs = try of.all("merges")
        merges.reserveCapacity(pairs.count)
        for (rank, merge) in pairs.enumerated() {
            let (left, right) = try Self.parts(merge)
            guard let joined = ids[left + right], let one = ids[left], let two = ids[right] else {
                throw UnknownTokenizer("merge \(rank) (\(shown(String(left))), \(shown(String(right)))) is not in the vocabulary")
            }
            merges[Pair(left: Int32(one), right: Int32(two))] = Merge(rank: rank, id: joined)
        }
        if let name = of["unk_token"]?.string {
            guard let id = ids[name.scalars] else { throw UnknownTokenizer("'unk_token' is not in the vocabulary") }
            unknown = id
        } else {
            unknown = nil
        }
        (byteFallback, fuseUnknown) = (of.flag("byte_fallback"), of.flag("fuse_unk"))
        ignoreMerges = of.flag("ignore_merges")
        tokens = Dictionary(ids.map { ($0.value, $0.key) }, uniquingKeysWith: { first, _ in first })
        (self.ids, self.merges) = (ids, merges)
    }

    /// Old files have "a b", new ones ["a", "b"].
    private static func parts(_ merge: Json) throws -> (Scalars, Scalars) {
        if let pair = merge.array, pair.count == 2, let left = pair[0].string, let right = pair[1].string {
            return (left.scalars, right.scalars)
        }
        let words = merge.string?.scalars.split(separator: " ", omittingEmptySubsequences: false) ?? []
        if words.count != 2 { throw UnknownTokenizer("a merge is \(merge.shown)") }
        return (Scalars(words[0]), Scalars(words[1]))
    }

    /// Adds the ids of one word, as the pre-tokenizer gives it.
    func encode(_ word: Scalars, into found: inout [Int]) {
        if word.isEmpty { return }
        if let known = cache[word] {
            found += known
            return
        }
        let encoded: [Int]
        if ignoreMerges, let whole = ids[word] { encoded = [whole] } else { encoded = merged(symbols(word)) }
        if word.count <= Self.cachedLength {
            if cache.count >= Self.cachedWords { cache.removeAll() }
            cache[word] = encoded
        }
        found += encoded
    }

    static func byteToken(_ byte: UInt8) -> Scalars {
        "<0x\(byte < 16 ? "0" : "")\(String(byte, radix: 16, uppercase: true))>".scalars
    }

    /// Each character's id; of an unknown one its bytes' or the unknown token's, where the model has them.
    private func symbols(_ word: Scalars) -> [Int] {
        var found: [Int] = []
        var lastUnknown = false
        for scalar in word {
            if let id = ids[[scalar]] {
                found.append(id)
                lastUnknown = false
                continue
            }
            let bytes = byteFallback ? Array(UTF8.encode(scalar)!).map { ids[Self.byteToken($0)] } : [nil]
            if !bytes.contains(nil) {
                found += bytes.map { $0! }
                lastUnknown = false
            } else if let unknown, !(fuseUnknown && lastUnknown) {
                found.append(unknown)
                lastUnknown = true
            }
        }
        return found
    }

    private struct Candidate {
        let rank, left, right, id, first, second: Int

        func isBefore(_ other: Candidate) -> Bool { (rank, left) < (other.rank, other.left) }
    }

    /// The smallest first: a binary heap.
    private struct Queue {
        private var heap: [Candidate] = []

        mutating func add(_ candidate: Candidate) {
            heap.append(candidate)
            var place = heap.count - 1
            while place > 0, heap[place].isBefore(heap[(place - 1) / 2]) {
                heap.swapAt(place, (place - 1) / 2)
                place = (place - 1) / 2
            }
        }

        mutating func poll() -> Candidate? {
            guard let best = heap.first else { return nil }
            let last = heap.removeLast()
            if heap.isEmpty { return best }
            heap[0] = last
            var place = 0
            while true {
                var least = place
                for child in [2 * place + 1, 2 * place + 2] where child < heap.count && heap[child].isBefore(heap[least]) {
                    least = child
                }
                if least == place { return best }
                heap.swapAt(place, least)
                place = least
            }
        }
    }

    private func merged(_ given: [Int]) -> [Int] {
        var symbols = given
        let count = symbols.count
        if count < 2 { return symbols }
        var next = (0..<count).map { $0 + 1 < count ? $0 + 1 : -1 }
        var previous = (0..<count).map { $0 - 1 }
        var queue = Queue()
        func consider(_ left: Int, _ right: Int) {
            guard left >= 0, right >= 0,
                let merge = merges[Pair(left: Int32(symbols[left]), right: Int32(symbols[right]))]
            else { return }
            queue.add(
                Candidate(
                    rank: merge.rank, left: left, right: right, id: merge.id, first: symbols[left],
                    second: symbols[right]))
        }
        for index in 0..<count - 1 { consider(index, index + 1) }
        while let best = queue.poll() {
            // One of the two may have been joined with another meanwhile.
            if symbols[best.left] != best.first || next[best.left] != best.right || symbols[best.right] != best.second {
                continue
            }
            symbols[best.left] = best.id
            symbols[best.right] = Self.gone
            next[best.left] = next[best.right]
            if next[best.right] >= 0 { previous[next[best.right]] = best.left }
            consider(previous[best.left], best.left)
            consider(best.left, next[best.left])
        }
        return symbols.filter { $0 != Self.gone }
    }
}
