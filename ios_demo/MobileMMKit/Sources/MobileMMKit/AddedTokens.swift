/// Tokens that are found in a text before anything else looks at it: the longest of those that begin leftmost.
struct AddedTokens {
    private struct Token {
        let id: Int
        let content: Scalars
        let singleWord, lstrip, rstrip, normalized, special: Bool

        init(_ of: JsonObject) throws {
            guard let id = of["id"]?.whole else { throw UnknownTokenizer("an added token without 'id'") }
            self.id = id
            content = try of.text("content")
            singleWord = of.flag("single_word")
            lstrip = of.flag("lstrip")
            rstrip = of.flag("rstrip")
            normalized = of.flag("normalized", default: true)
            special = of.flag("special")
        }
    }

    /// A token that was found, or text between tokens; `first` when nothing stands before it.
    struct Piece {
        let id: Int?
        let text: Scalars
        let first: Bool
    }

    let contents: [Int: Scalars]
    let special: Set<Scalars>
    private let raw: [Unicode.Scalar: [Token]]
    private let normalized: [Unicode.Scalar: [Token]]

    init(_ values: [Json], leftOut: Int?) throws {
        let tokens = try values.map { value in
            guard let of = value.object else { throw UnknownTokenizer("'added_tokens' holds no object") }
            return try Token(of)
        }.filter { $0.id != leftOut }
        contents = Dictionary(tokens.map { ($0.id, $0.content) }, uniquingKeysWith: { _, last in last })
        special = Set(tokens.filter(\.special).map(\.content))
        func byFirst(_ some: [Token]) -> [Unicode.Scalar: [Token]] {
            Dictionary(grouping: some.filter { !$0.content.isEmpty }, by: { $0.content[0] })
                .mapValues { same in same.sorted { $0.content.count > $1.content.count } }
        }
        raw = byFirst(tokens.filter { !$0.normalized })
        normalized = byFirst(tokens.filter(\.normalized))
    }

    func split(_ text: Scalars, normalized: Bool) -> [Piece] {
        let known = normalized ? self.normalized : raw
        if known.isEmpty { return text.isEmpty ? [] : [Piece(id: nil, text: text, first: true)] }
        var pieces: [Piece] = []
        var (done, at) = (0, 0)
        while at < text.count {
            guard let token = known[text[at]]?.first(where: { text[at...].starts(with: $0.content) }) else {
                at += 1
                continue
            }
            var start = at
            var end = at + token.content.count
            at = end
            if token.singleWord && !standsAlone(text, start, end) { continue }
            if token.lstrip {
                while start > done && CharacterClasses.isSpace(text[start - 1]) { start -= 1 }
            }
            if token.rstrip {
                while end < text.count && CharacterClasses.isSpace(text[end]) { end += 1 }
            }
            if start > done { pieces.append(Piece(id: nil, text: Scalars(text[done..<start]), first: done == 0)) }
            pieces.append(Piece(id: token.id, text: Scalars(text[start..<end]), first: start == 0))
            done = end
            at = max(at, end)
        }
        if done < text.count { pieces.append(Piece(id: nil, text: Scalars(text[done...]), first: done == 0)) }
        return pieces
    }

    private func standsAlone(_ text: Scalars, _ start: Int, _ end: Int) -> Bool {
        func isWord(_ scalar: Unicode.Scalar) -> Bool {
            scalar == "_" || CharacterClasses.isLetter(scalar) || CharacterClasses.isDigit(scalar)
        }
        return (start == 0 || !isWord(text[start - 1])) && (end == text.count || !isWord(text[end]))
    }
}
