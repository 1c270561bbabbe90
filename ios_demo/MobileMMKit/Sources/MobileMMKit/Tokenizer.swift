import Foundation

/// A text as its code points: what tokenizers count and compare by, where Swift's `String` compares what is seen.
typealias Scalars = [Unicode.Scalar]

extension String {
    init(_ scalars: some Sequence<Unicode.Scalar>) {
        var view = String.UnicodeScalarView()
        view.append(contentsOf: scalars)
        self.init(view)
    }

    var scalars: Scalars { Scalars(unicodeScalars) }
}

/// A `tokenizer.json` of Hugging Face's tokenizers, models of the BPE kind: the same ids and the same text.
///
/// Normalizers, pre-tokenizers, decoders and post-processors are those that byte-level (GPT-2, LLaMA 3, Qwen, SmolLM)
/// and SentencePiece models (LLaMA, Gemma) use. What is unknown is refused when the file is read: it never gives other
/// ids in silence. Source: the library's documentation of its components.
public final class Tokenizer {
    private let json: JsonObject
    private let model: BytePairEncoding
    private let added: AddedTokens
    private let normalize: (Scalars) -> Scalars
    private let preTokenize: (Scalars, Bool) -> [Scalars]
    private let decoders: [([Scalars]) -> [Scalars]]
    private let before: [Int]
    private let behind: [Int]
    private let tokens: [Int: Scalars]

    /// One more than the largest id: models often have a few rows more, which stand for nothing.
    public let size: Int

    private init(_ json: JsonObject, leftOut: Int?) throws {
        self.json = json
        model = try BytePairEncoding(try json.at("model"))
        added = try AddedTokens(json["added_tokens"]?.array ?? [], leftOut: leftOut)
        normalize = try normalizer(json["normalizer"])
        preTokenize = try preTokenizer(json["pre_tokenizer"])
        decoders = try decoderSteps(json["decoder"])
        (before, behind) = try framing(json["post_processor"])
        tokens = model.tokens.merging(added.contents) { _, added in added }
        size = 1 + (tokens.keys.max() ?? -1)
    }

    private static let mostBytes = 256 << 20

    /// Throws ``MobileMMError`` naming the file for what is no tokenizer, or one that is not known here.
    public static func read(_ file: URL) throws -> Tokenizer {
        guard let data = try? Data(contentsOf: file) else { throw MobileMMError("\(file.path): cannot be read") }
        if data.count > mostBytes { throw MobileMMError("\(file.path): too large for a tokenizer") }
        do {
            guard let json = try Json.parse(data).object else { throw UnknownTokenizer("it is no JSON object") }
            return try Tokenizer(json, leftOut: nil)
        } catch let error as JsonError {
            throw MobileMMError("\(file.path): \(error.message)")
        } catch let error as UnknownTokenizer {
            throw MobileMMError("\(file.path): not a tokenizer that can be read (\(error.message))")
        }
    }

    /// The ids of a text, `special` with the tokens that the tokenizer puts around it.
    public func encode(_ text: String, special: Bool = false) -> [Int] {
        var ids = special ? before : []
        var start = 0
        for piece in added.split(text.scalars, normalized: false) {
            if let id = piece.id {
                ids.append(id)
            } else {
                // A normalizer may put something in front; what begins the text is told from what follows a token.
                for inner in added.split(normalize(piece.text), normalized: true) {
                    if let id = inner.id {
                        ids.append(id)
                    } else {
                        for word in preTokenize(inner.text, start == 0 && inner.first) { model.encode(word, into: &ids) }
                    }
                }
            }
            start += piece.text.count
        }
        return special ? ids + behind : ids
    }

    /// The text of ids, special tokens left out, and ids that stand for nothing.
    public func decode(_ ids: [Int]) -> String { String(decoded(ids)) }

    func decoded(_ ids: [Int], special: Bool = false) -> Scalars {
        var words = ids.compactMap { id in tokens[id].flatMap { !special && added.special.contains($0) ? nil : $0 } }
        if decoders.isEmpty { return Scalars(words.joined(separator: [" "])) }
        for decode in decoders { words = decode(words) }
        return words.flatMap { $0 }
    }

    /// The same tokenizer without one of its added tokens, which is then text as any other.
    public func without(_ id: Int) throws -> Tokenizer { try Tokenizer(json, leftOut: id) }
}

/// What of a tokenizer is not known here.
struct UnknownTokenizer: Error {
    let message: String

    init(_ message: String) {
        self.message = message
    }

    init(_ kind: String, _ of: JsonObject) {
        message = "the \(kind) \(of["type"]?.shown ?? "without a type") is not known here"
    }
}

extension JsonObject {
    func at(_ key: String) throws -> JsonObject {
        guard let object = self[key]?.object else { throw UnknownTokenizer("'\(key)' is missing or no object") }
        return object
    }

    func all(_ key: String) throws -> [Json] {
        guard let values = self[key]?.array else { throw UnknownTokenizer("'\(key)' is missing or no array") }
        return values
    }

    func text(_ key: String) throws -> Scalars {
        guard let text = self[key]?.string else { throw UnknownTokenizer("'\(key)' is missing or no string") }
        return text.scalars
    }

    func flag(_ key: String, default value: Bool = false) -> Bool { self[key]?.bool ?? value }

    var type: String { self["type"]?.string ?? "" }
}

/// Ids that `encode(…, special: true)` puts before and behind a text.
private func framing(_ value: Json?) throws -> ([Int], [Int]) {
    guard let of = value?.object else { return ([], []) }
    var (before, behind): ([Int], [Int]) = ([], [])
    switch of.type {
    case "ByteLevel": break
    case "Sequence":
        for inner in try of.all("processors") {
            let (first, last) = try framing(inner)
            (before, behind) = (first + before, behind + last)
        }
    case "TemplateProcessing":
        let special = try of.at("special_tokens")
        var isBehind = false
        for piece in try of.all("single").map({ $0.object ?? JsonObject() }) {
            if piece["Sequence"] != nil {
                isBehind = true
                continue
            }
            let name = String(try piece.at("SpecialToken").text("id"))
            let ids = try special.at(name).all("ids").map { id in
                guard let id = id.whole else { throw UnknownTokenizer("a special token's id is \(id.shown)") }
                return id
            }
            if isBehind { behind += ids } else { before += ids }
        }
    default: throw UnknownTokenizer("post-processor", of)
    }
    return (before, behind)
}
