/// The steps from tokens to text; empty where the tokenizer has none.
func decoderSteps(_ value: Json?) throws -> [([Scalars]) -> [Scalars]] {
    guard let of = value?.object else { return [] }
    switch of.type {
    case "Sequence": return try of.all("decoders").flatMap(decoderSteps)
    case "ByteLevel": return [{ [ByteLevel.decode($0)] }]
    case "Replace":
        let replace = try replacement(of)
        return [{ $0.map(replace) }]
    case "ByteFallback": return [byteFallback]
    case "Fuse": return [{ [$0.flatMap { $0 }] }]
    case "Strip": return [try strip(of)]
    case "Metaspace": return [try metaspace(of)]
    default: throw UnknownTokenizer("decoder", of)
    }
}

private let bytesByToken = Dictionary(uniqueKeysWithValues: (UInt8(0)...255).map { (BytePairEncoding.byteToken($0), $0) })

/// Runs of `<0xE4>` become characters, or one replacement character a byte where they are no UTF-8.
private func byteFallback(_ words: [Scalars]) -> [Scalars] {
    var found: [Scalars] = []
    var run: [UInt8] = []
    func end() {
        if run.isEmpty { return }
        if Utf8.isValid(run) {
            found.append(String(decoding: run, as: UTF8.self).scalars)
        } else {
            found += run.map { _ in [Utf8.replacement] }
        }
        run = []
    }
    for word in words {
        // Their digits may be small letters as well.
        let isByte = word.count == 6 && word.starts(with: "<0x".scalars)
        if isByte, let byte = bytesByToken[word.enumerated().map { $0 < 3 ? $1 : upper($1) }] {
            run.append(byte)
        } else {
            end()
            found.append(word)
        }
    }
    end()
    return found
}

private func upper(_ scalar: Unicode.Scalar) -> Unicode.Scalar {
    ("a"..."f").contains(scalar) ? Unicode.Scalar(scalar.value - 32)! : scalar
}

private func strip(_ of: JsonObject) throws -> ([Scalars]) -> [Scalars] {
    let content = try of.text("content")
    guard content.count == 1 else { throw UnknownTokenizer("'Strip' of \(shown(String(content))) is not known here") }
    let (start, stop) = (of["start"]?.whole ?? 0, of["stop"]?.whole ?? 0)
    return { words in
        words.map { word in
            let first = word.prefix(max(start, 0)).prefix { $0 == content[0] }.count
            let last = word.suffix(max(stop, 0)).reversed().prefix { $0 == content[0] }.count
            return first + last >= word.count ? [] : Scalars(word[first..<word.count - last])
        }
    }
}

private func metaspace(_ of: JsonObject) throws -> ([Scalars]) -> [Scalars] {
    let mark = try of.text("replacement")
    let scheme = of["prepend_scheme"]?.string ?? (of.flag("add_prefix_space", default: true) ? "always" : "never")
    return { words in
        words.enumerated().map { replaced($1, mark, by: $0 == 0 && scheme != "never" ? [] : [" "]) }
    }
}

/// UTF-8 whose faults become the same number of replacement characters on every runtime.
enum Utf8 {
    static let replacement: Unicode.Scalar = "\u{FFFD}"

    static func isValid(_ bytes: [UInt8]) -> Bool {
        var at = 0
        while at < bytes.count {
            let length = sequence(bytes, at)
            if length <= 0 { return false }
            at += length
        }
        return true
    }

    /// One replacement character for each longest beginning of a character that breaks off, and each other byte.
    ///
    /// Source: the Unicode standard, section 3.9, "substitution of maximal subparts".
    static func lossy(_ bytes: [UInt8]) -> Scalars {
        var text: Scalars = []
        var (start, at) = (0, 0)
        while at < bytes.count {
            let length = sequence(bytes, at)
            if length > 0 {
                at += length
                continue
            }
            text += String(decoding: bytes[start..<at], as: UTF8.self).unicodeScalars
            text.append(replacement)
            at -= length
            start = at
        }
        return text + String(decoding: bytes[start...], as: UTF8.self).unicodeScalars
    }

    /// The length of the character that begins there; where there is none, how many bytes are wrong, negative.
    private static func sequence(_ bytes: [UInt8], _ at: Int) -> Int {
        let first = bytes[at]
        let length: Int
        switch first {
        case 0x00...0x7F: return 1
        case 0xC2...0xDF: length = 2
        case 0xE0...0xEF: length = 3
        case 0xF0...0xF4: length = 4
        default: return -1
        }
        for index in 1..<length {
            guard at + index < bytes.count else { return -index }
            var allowed: ClosedRange<UInt8> = 0x80...0xBF
            if index == 1 {
                switch first {
                case 0xE0: allowed = 0xA0...0xBF
                case 0xED: allowed = 0x80...0x9F
                case 0xF0: allowed = 0x90...0xBF
                case 0xF4: allowed = 0x80...0x8F
                default: break
                }
            }
            if !allowed.contains(bytes[at + index]) { return -index }
        }
        return length
    }
}
