import Foundation

/// A text made ready for the cuts; it may change characters, and put some in front.
func normalizer(_ value: Json?) throws -> (Scalars) -> Scalars {
    guard let of = value?.object else { return { $0 } }
    switch of.type {
    case "Sequence":
        let each = try of.all("normalizers").map(normalizer)
        return { text in each.reduce(text) { $1($0) } }
    case "Prepend":
        let prefix = try of.text("prepend")
        return { $0.isEmpty ? $0 : prefix + $0 }
    case "Replace": return try replacement(of)
    case "NFC": return { String($0).precomposedStringWithCanonicalMapping.scalars }
    case "NFD": return { String($0).decomposedStringWithCanonicalMapping.scalars }
    case "NFKC": return { String($0).precomposedStringWithCompatibilityMapping.scalars }
    case "NFKD": return { String($0).decomposedStringWithCompatibilityMapping.scalars }
    default: throw UnknownTokenizer("normalizer", of)
    }
}

func replacement(_ of: JsonObject) throws -> (Scalars) -> Scalars {
    let pattern = try of.at("pattern")
    let content = try of.text("content")
    if let literal = pattern["String"]?.string?.scalars { return { replaced($0, literal, by: content) } }
    // What SentencePiece's models do to a space that a text begins with.
    if pattern["Regex"]?.string == #"\A "# { return { $0.first == " " ? content + $0.dropFirst() : $0 } }
    throw UnknownTokenizer("'Replace' by the regular expression \(pattern["Regex"]?.shown ?? "?") is not known here")
}

func replaced(_ text: Scalars, _ pattern: Scalars, by content: Scalars) -> Scalars {
    literalPieces(text, pattern).flatMap { $0.matched ? content : $0.text }
}

/// A text cut into the words that the model joins within; `first` when nothing of the whole text stands before it.
func preTokenizer(_ value: Json?) throws -> (_ text: Scalars, _ first: Bool) -> [Scalars] {
    guard let of = value?.object else { return { text, _ in [text] } }
    switch of.type {
    case "Sequence":
        let each = try of.all("pretokenizers").map(preTokenizer)
        return { text, first in
            each.reduce([text]) { words, cut in
                words.enumerated().flatMap { cut($0.element, first && $0.offset == 0) }
            }
        }
    case "ByteLevel": return try byteLevel(of)
    case "Digits":
        let individual = of.flag("individual_digits")
        return { text, _ in digits(text, individual: individual) }
    case "Split": return try split(of)
    case "Metaspace": return try metaspace(of)
    default: throw UnknownTokenizer("pre-tokenizer", of)
    }
}

/// GPT-2's words: Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.2.
private let byteLevelWords = #"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#

private func byteLevel(_ of: JsonObject) throws -> (Scalars, Bool) -> [Scalars] {
    let prefix = of.flag("add_prefix_space", default: true)
    let cut = of.flag("use_regex", default: true) ? try ClassedPattern(byteLevelWords) : nil
    return { given, _ in
        let text = prefix && given.first != " " ? [" "] + given : given
        let words = cut?.pieces(text).map(\.text) ?? [text]
        return words.map(ByteLevel.encode)
    }
}

private func digits(_ text: Scalars, individual: Bool) -> [Scalars] {
    var words: [Scalars] = []
    var inDigits = false
    for scalar in text {
        let isDigit = CharacterClasses.isDigit(scalar)
        if words.isEmpty || isDigit != inDigits || (isDigit && individual) {
            words.append([scalar])
        } else {
            words[words.count - 1].append(scalar)
        }
        inDigits = isDigit
    }
    return words
}

private func split(_ of: JsonObject) throws -> (Scalars, Bool) -> [Scalars] {
    let pattern = try of.at("pattern")
    let cut: (Scalars) -> [Cut]
    if let regex = pattern["Regex"]?.string {
        cut = try ClassedPattern(regex).pieces
    } else if let string = pattern["String"]?.string?.scalars {
        cut = { literalPieces($0, string) }
    } else {
        throw UnknownTokenizer("'Split' has no pattern")
    }
    let name = String(try of.text("behavior"))
    guard let behavior = Behavior(rawValue: name) else {
        throw UnknownTokenizer("'Split' with the behavior \(shown(name)) is not known here")
    }
    let invert = of.flag("invert")
    return { text, _ in arrange(cut(text).map { Cut(text: $0.text, matched: $0.matched != invert) }, behavior) }
}

private func metaspace(_ of: JsonObject) throws -> (Scalars, Bool) -> [Scalars] {
    let mark = try of.text("replacement")
    let prepend = of["prepend_scheme"]?.string ?? (of.flag("add_prefix_space", default: true) ? "always" : "never")
    let isCut = of.flag("split", default: true)
    return { given, first in
        var text = replaced(given, [" "], by: mark)
        if !text.starts(with: mark) && (prepend == "always" || (prepend == "first" && first)) { text = mark + text }
        return isCut ? arrange(literalPieces(text, mark), .mergedWithNext) : [text]
    }
}

/// A piece of a text, and whether the pattern matched it or it stands between matches.
struct Cut {
    let text: Scalars
    let matched: Bool
}

func literalPieces(_ text: Scalars, _ string: Scalars) -> [Cut] {
    guard let first = string.first else { return text.isEmpty ? [] : [Cut(text: text, matched: false)] }
    var pieces: [Cut] = []
    var (done, at) = (0, 0)
    while at + string.count <= text.count {
        guard text[at] == first, text[at...].starts(with: string) else {
            at += 1
            continue
        }
        if at > done { pieces.append(Cut(text: Scalars(text[done..<at]), matched: false)) }
        pieces.append(Cut(text: string, matched: true))
        at += string.count
        done = at
    }
    if done < text.count { pieces.append(Cut(text: Scalars(text[done...]), matched: false)) }
    return pieces
}

private enum Behavior: String {
    case removed = "Removed"
    case isolated = "Isolated"
    case mergedWithPrevious = "MergedWithPrevious"
    case mergedWithNext = "MergedWithNext"
    case contiguous = "Contiguous"
}

private func arrange(_ cuts: [Cut], _ behavior: Behavior) -> [Scalars] {
    var words: [Scalars] = []
    switch behavior {
    case .removed: words = cuts.filter { !$0.matched }.map(\.text)
    case .isolated: words = cuts.map(\.text)
    case .contiguous:
        var last: Bool?
        for cut in cuts {
            if cut.matched == last { words[words.count - 1] += cut.text } else { words.append(cut.text) }
            last = cut.matched
        }
    case .mergedWithPrevious:
        var lastMatched = false
        for cut in cuts {
            if cut.matched && !lastMatched && !words.isEmpty {
                words[words.count - 1] += cut.text
            } else {
                words.append(cut.text)
            }
            lastMatched = cut.matched
        }
    case .mergedWithNext:
        var lastMatched = false
        for cut in cuts.reversed() {
            if cut.matched && !lastMatched && !words.isEmpty {
                words[words.count - 1] = cut.text + words[words.count - 1]
            } else {
                words.append(cut.text)
            }
            lastMatched = cut.matched
        }
        words.reverse()
    }
    return words.filter { !$0.isEmpty }
}

/// A tokenizer's regular expression, whose `\s`, `\p{L}` and `\p{N}` mean the same on every version of the system.
///
/// The text is matched through a copy of it, in which each character beyond ASCII is replaced by one that stands for
/// its class and that every version classes alike. That is the same as long as the expression names no others.
struct ClassedPattern {
    private let pattern: NSRegularExpression

    init(_ expression: String) throws {
        var others = expression
        for known in [#"\p{L}"#, #"\p{N}"#, #"\P{L}"#, #"\P{N}"#, #"\p{^L}"#, #"\p{^N}"#] {
            others = others.replacingOccurrences(of: known, with: "")
        }
        let unknown = [#"\\[pPwWdDbBxuXhHR]"#, #"\[\["#, "&&", #"[^\x00-\x7F]"#].joined(separator: "|")
        if others.range(of: unknown, options: .regularExpression) != nil {
            throw UnknownTokenizer("the regular expression \(shown(expression)) is not known here")
        }
        guard let pattern = try? NSRegularExpression(pattern: expression) else {
            throw UnknownTokenizer("the regular expression \(shown(expression)) is not valid")
        }
        self.pattern = pattern
    }

    func pieces(_ text: Scalars) -> [Cut] {
        // One unit of UTF-16 for each code point: places in it are places in the text.
        let classed = String(text.map(Self.representative))
        var pieces: [Cut] = []
        var done = 0
        func add(_ start: Int, _ end: Int, _ matched: Bool) {
            if end > start { pieces.append(Cut(text: Scalars(text[start..<end]), matched: matched)) }
        }
        pattern.enumerateMatches(in: classed, range: NSRange(location: 0, length: text.count)) { match, _, _ in
            guard let range = match?.range else { return }
            add(done, range.location, false)
            add(range.location, range.location + range.length, true)
            done = range.location + range.length
        }
        add(done, text.count, false)
        return pieces
    }

    private static func representative(_ scalar: Unicode.Scalar) -> Unicode.Scalar {
        if scalar.value < 128 { return scalar }
        if CharacterClasses.isLetter(scalar) { return "ª" }
        if CharacterClasses.isNumber(scalar) { return "²" }
        return CharacterClasses.isSpace(scalar) ? "\u{B}" : "§"
    }
}

/// Bytes as printable characters, so that a vocabulary of texts can hold any of them.
enum ByteLevel {
    private static let scalars: Scalars = {
        var other: UInt32 = 255
        return (UInt32(0)...255).map { byte in
            let printable = 0x21...0x7E ~= byte || 0xA1...0xAC ~= byte || 0xAE...0xFF ~= byte
            if !printable { other += 1 }
            return Unicode.Scalar(printable ? byte : other)!
        }
    }()
    private static let bytes = Dictionary(uniqueKeysWithValues: scalars.enumerated().map { ($1, UInt8($0)) })

    static func encode(_ word: Scalars) -> Scalars { String(word).utf8.map { scalars[Int($0)] } }

    /// The text of tokens; one that holds other characters stands for itself, as added tokens do.
    static func decode(_ words: [Scalars]) -> Scalars {
        var out: [UInt8] = []
        for word in words {
            let decoded = word.map { bytes[$0] }
            if decoded.contains(nil) { out += String(word).utf8 } else { out += decoded.map { $0! } }
        }
        return Utf8.lossy(out)
    }
}
