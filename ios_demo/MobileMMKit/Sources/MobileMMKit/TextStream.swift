/// Takes one token after another and gives the text that is safe to show: whole characters, and no stop string.
///
/// New tokens are decoded behind the ones that gave the last piece, so that the pieces join to what decoding the whole
/// answer gives. What might be the beginning of a stop string is held back until it is known not to be one.
struct TextStream {
    private let decode: ([Int]) -> Scalars
    private let stop: [Scalars]
    private var ids: [Int] = []
    // Tokens of the last piece are ids[before..<sent].
    private var before = 0
    private var sent = 0
    private var held: Scalars = []

    /// Whether a stop string is complete.
    private(set) var stopped = false

    /// - Parameters:
    ///   - decode: ids → text, without special tokens.
    ///   - stop: strings that end the answer, themselves not part of it.
    init(_ decode: @escaping ([Int]) -> Scalars, stop: [String] = []) {
        self.decode = decode
        self.stop = stop.filter { !$0.isEmpty }.map(\.scalars)
    }

    /// The text that this token completes, often empty.
    mutating func put(_ token: Int) -> String {
        if stopped { return "" }
        ids.append(token)
        let fresh = fresh()
        // The bytes of an unfinished character decode to replacement characters.
        if fresh.isEmpty || fresh.last == Utf8.replacement { return "" }
        (before, sent) = (sent, ids.count)
        return release(fresh)
    }

    /// What was held back, once no more tokens come.
    mutating func end() -> String {
        if stopped { return "" }
        let text = release(fresh())
        (before, sent) = (ids.count, ids.count)
        defer { held = [] }
        return text + String(held)
    }

    private func fresh() -> Scalars {
        let known = decode(Array(ids[before..<sent]))
        return Scalars(decode(Array(ids[before...])).dropFirst(known.count))
    }

    private mutating func release(_ fresh: Scalars) -> String {
        let text = held + fresh
        if let end = stop.compactMap({ Self.place(of: $0, in: text) }).min() {
            stopped = true
            held = []
            return String(text[..<end])
        }
        let kept = stop.map { Self.overlap(text, $0) }.max() ?? 0
        held = Scalars(text.suffix(kept))
        return String(text.dropLast(kept))
    }

    private static func place(of string: Scalars, in text: Scalars) -> Int? {
        guard string.count <= text.count else { return nil }
        return (0...text.count - string.count).first { text[$0...].starts(with: string) }
    }

    /// The length of the longest end of `text` with which `string` begins.
    private static func overlap(_ text: Scalars, _ string: Scalars) -> Int {
        let most = min(text.count, string.count - 1)
        return stride(from: most, to: 0, by: -1).first { text.suffix($0).elementsEqual(string.prefix($0)) } ?? 0
    }
}
