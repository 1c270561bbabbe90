import Foundation

/// From the bytes of a `manifest.json`, which may come from anyone, to a ``Manifest`` that holds together.
public enum ManifestReader {
    static let schemaVersion = 1
    static let largest = 16 << 20
    static let again = "export the bundle or pull it again"

    /// The manifest in these bytes of the file `path`, checked for types, ranges, paths and agreement.
    ///
    /// Throws ``MobileMMError``, one line that names the file, the key, what is wrong, and the way out.
    public static func parse(_ data: Data, path: String) throws -> Manifest {
        if data.count > largest { throw MobileMMError("\(path): larger than \(largest >> 20) MB; \(again)") }
        let value: Json
        do {
            value = try Json.parse(data)
        } catch let error as JsonError {
            throw MobileMMError("\(path): \(error.message); \(again)")
        }
        guard case .object(let object) = value else {
            throw MobileMMError("\(path): must hold a JSON object, not \(value.shown); \(again)")
        }
        if let version = object["schema_version"]?.whole, version != schemaVersion {
            let wayOut =
                version > schemaVersion
                ? "newer than this app reads (\(schemaVersion)); update it" : "too old; export the model again"
            throw MobileMMError("\(path): key 'schema_version': format version \(version) is \(wayOut)")
        }
        do {
            let found = try manifest(Fields(object, at: ""))
            try checkAgreement(found)
            return found
        } catch let fault as KeyFault {
            throw MobileMMError("\(path): key \(shown(fault.key, most: 100)): \(fault.wrong); \(again)")
        }
    }
}

/// What is wrong with one key.
struct KeyFault: Error {
    let key: String
    let wrong: String

    init(_ key: String, _ wrong: String) {
        (self.key, self.wrong) = (key, wrong)
    }
}

private let largestSize = 1 << 20
private let tokens = 0...Int(Int32.max)
private let bytesOfParts = 0...(1 << 50) - 1

/// Whether it leads nowhere but to a file inside of a bundle: segments that neither begin nor end with a dot.
func isPlainPath(_ path: String) -> Bool {
    func isWord(_ byte: UInt8) -> Bool {
        switch byte {
        case UInt8(ascii: "a")...UInt8(ascii: "z"), UInt8(ascii: "A")...UInt8(ascii: "Z"): true
        case UInt8(ascii: "0")...UInt8(ascii: "9"), UInt8(ascii: "_"): true
        default: false
        }
    }
    return path.utf8.split(separator: UInt8(ascii: "/"), omittingEmptySubsequences: false).allSatisfy { segment in
        guard let first = segment.first, let last = segment.last, isWord(first) else { return false }
        return last != UInt8(ascii: ".")
            && segment.allSatisfy { isWord($0) || [UInt8]("._+-".utf8).contains($0) }
    }
}

/// One JSON object, of which every key must be taken, and none is left.
private final class Fields {
    private let object: JsonObject
    private let place: String
    private var taken: Set<String> = []

    init(_ object: JsonObject, at place: String) {
        (self.object, self.place) = (object, place)
    }

    func key(_ name: String) -> String { place.isEmpty ? name : "\(place).\(name)" }

    /// The member; null as much as missing is nil.
    func optional(_ name: String) -> Json? {
        taken.insert(name)
        guard let value = object[name], !value.isNull else { return nil }
        return value
    }

    func raw(_ name: String) throws -> Json {
        taken.insert(name)
        guard let value = object[name] else { throw KeyFault(key(name), "is missing") }
        return value
    }

    func has(_ name: String) -> Bool { object[name] != nil }

    func end() throws {
        for name in object.names where !taken.contains(name) {
            throw KeyFault(key(name), "is not known in this format version")
        }
    }

    func string(_ name: String, _ lengths: ClosedRange<Int> = 0...1 << 16) throws -> String {
        try stringOf(try raw(name), key(name), lengths)
    }

    func string(_ name: String, default value: String) throws -> String { has(name) ? try string(name) : value }

    func name(_ name: String) throws -> String { try string(name, 1...200) }

    func optionalString(_ name: String) throws -> String? { optional(name) == nil ? nil : try string(name) }

    func oneOf(_ name: String, _ known: [String]) throws -> String {
        let value = try string(name)
        if !known.contains(value) {
            throw KeyFault(key(name), "must be \(known.joined(separator: " or ")), not \(shown(value))")
        }
        return value
    }

    func int(_ name: String, _ range: ClosedRange<Int>) throws -> Int { try intOf(try raw(name), key(name), range) }

    func size(_ name: String) throws -> Int { try int(name, 1...largestSize) }

    func optionalSize(_ name: String) throws -> Int? { optional(name) == nil ? nil : try size(name) }

    func double(_ name: String) throws -> Double { try doubleOf(try raw(name), key(name)) }

    func optionalDouble(_ name: String) throws -> Double? { optional(name) == nil ? nil : try double(name) }

    func bool(_ name: String, default value: Bool) throws -> Bool {
        guard has(name) else { return value }
        let found = try raw(name)
        guard let bool = found.bool else { throw KeyFault(key(name), "must be true or false, not \(found.shown)") }
        return bool
    }

    func path(_ name: String) throws -> String { try pathOf(try raw(name), key(name)) }

    func object(_ name: String) throws -> JsonObject { try objectOf(try raw(name), key(name)) }

    func fields(_ name: String) throws -> Fields { Fields(try object(name), at: key(name)) }

    /// `fields`, where null stands for nil, but the key must be there.
    func nullableFields(_ name: String) throws -> Fields? { try raw(name).isNull ? nil : try fields(name) }

    func optionalFields(_ name: String) throws -> Fields? { optional(name) == nil ? nil : try fields(name) }

    func list<T>(
        _ name: String, _ counts: ClosedRange<Int> = 0...Int.max, each: (Json, String) throws -> T
    ) throws -> [T] {
        try listOf(try raw(name), key(name), counts, each: each)
    }

    func tokenIds(_ name: String) throws -> [Int] { try list(name) { try intOf($0, $1, tokens) } }

    /// Each member by its name.
    func members<T>(_ name: String, each: (Json, String) throws -> T) throws -> [String: T] {
        let object = try object(name)
        var found: [String: T] = [:]
        for member in object.names {
            let value = try each(object[member]!, "\(key(name)).\(member)")
            if found.updateValue(value, forKey: member) != nil { throw KeyFault(key(name), "two members look alike") }
        }
        return found
    }
}

private func listOf<T>(
    _ value: Json, _ key: String, _ counts: ClosedRange<Int>, each: (Json, String) throws -> T
) throws -> [T] {
    guard let values = value.array else { throw KeyFault(key, "must be an array, not \(value.shown)") }
    if !counts.contains(values.count) {
        let wanted = "\(counts.lowerBound) to \(counts.upperBound)"
        throw KeyFault(key, "has \(values.count) elements, where \(wanted) are expected")
    }
    return try values.enumerated().map { try each($0.element, "\(key).\($0.offset)") }
}

private func stringOf(_ value: Json, _ key: String, _ lengths: ClosedRange<Int>) throws -> String {
    guard let text = value.string else { throw KeyFault(key, "must be a string, not \(value.shown)") }
    let length = text.unicodeScalars.count
    if !lengths.contains(length) {
        let wanted = "\(lengths.lowerBound) to \(lengths.upperBound)"
        throw KeyFault(key, "has \(length) characters, where \(wanted) are expected")
    }
    return text
}

private func intOf(_ value: Json, _ key: String, _ range: ClosedRange<Int>) throws -> Int {
    guard let number = value.whole else { throw KeyFault(key, "must be a whole number, not \(value.shown)") }
    if !range.contains(number) {
        throw KeyFault(key, "must be from \(range.lowerBound) to \(range.upperBound), not \(number)")
    }
    return number
}

private func doubleOf(_ value: Json, _ key: String) throws -> Double {
    guard let number = value.double else { throw KeyFault(key, "must be a number, not \(value.shown)") }
    return number
}

private func scaleOf(_ value: Json, _ key: String) throws -> Float {
    let number = try doubleOf(value, key)
    if abs(number) > 1e9 { throw KeyFault(key, "must be from -1e9 to 1e9, not \(number)") }
    return Float(number)
}

private func pathOf(_ value: Json, _ key: String) throws -> String {
    let path = try stringOf(value, key, 1...200)
    if !isPlainPath(path) {
        throw KeyFault(
            key, "\(shown(path)) is no plain path inside the bundle (letters, digits and . _ + - / only)")
    }
    return path
}

private func objectOf(_ value: Json, _ key: String) throws -> JsonObject {
    guard let object = value.object else { throw KeyFault(key, "must be an object, not \(value.shown)") }
    return object
}

private func fieldsOf(_ value: Json, _ key: String) throws -> Fields { Fields(try objectOf(value, key), at: key) }

/// Reads an object whose keys must all be known.
private func whole<T>(_ of: Fields, _ read: (Fields) throws -> T) throws -> T {
    let found = try read(of)
    try of.end()
    return found
}

private func manifest(_ of: Fields) throws -> Manifest {
    _ = try of.int("schema_version", 1...1)
    let runtime = try of.fields("runtime")
    let found = Manifest(
        createdBy: try of.members("created_by") { try stringOf($0, $1, 0...Int.max) },
        target: try of.oneOf("target", ["onnx", "coreml", "executorch"]),
        runtimeName: try runtime.name("name"),
        runtimeMinVersion: try runtime.name("min_version"),
        model: try whole(try of.fields("model"), model),
        parts: try of.members("parts") { value, key in
            _ = try stringOf(.string(String(key.dropFirst("parts.".count))), "parts", 1...200)
            return try whole(try fieldsOf(value, key), part)
        },
        image: try of.nullableFields("image").map { try whole($0, image) },
        prompt: try whole(try of.fields("prompt"), prompt),
        generation: try of.optionalFields("generation").map { try whole($0, generation) },
        golden: try of.list("golden") { try whole(try fieldsOf($0, $1), golden) },
        conversations: try of.list("conversations") { try whole(try fieldsOf($0, $1), conversation) },
        benchmarks: of.has("benchmarks") ? try of.list("benchmarks", each: objectOf) : [],
        files: try of.list("files", 1...10_000) { try whole(try fieldsOf($0, $1), file) }
    )
    try runtime.end()
    try of.end()
    return found
}

private func model(_ of: Fields) throws -> ModelCard {
    ModelCard(
        name: try of.name("name"),
        family: try of.name("family"),
        license: try of.string("license", default: ""),
        contextLength: try of.size("context_length"),
        hiddenSize: try of.size("hidden_size"),
        vocabSize: try of.size("vocab_size"),
        numLayers: try of.size("num_layers"),
        numAttentionHeads: try of.size("num_attention_heads"),
        numKeyValueHeads: try of.size("num_key_value_heads"),
        headDim: try of.size("head_dim"),
        numImageTokens: try of.int("num_image_tokens", 0...largestSize),
        imageTokenId: try of.int("image_token_id", tokens),
        bosTokenId: try of.raw("bos_token_id").isNull ? nil : try of.int("bos_token_id", tokens),
        eosTokenIds: try of.tokenIds("eos_token_ids"),
        padTokenId: try of.int("pad_token_id", tokens)
    )
}

private func part(_ of: Fields) throws -> Part {
    Part(
        file: try of.path("file"),
        files: try of.list("files", 1...Int.max, each: pathOf),
        inputs: try of.list("inputs", 1...Int.max) { try whole(try fieldsOf($0, $1), tensor) },
        outputs: try of.list("outputs", 1...Int.max) { try whole(try fieldsOf($0, $1), tensor) },
        quantization: try whole(try of.fields("quantization"), quantization),
        bytes: try of.int("bytes", 1...bytesOfParts.upperBound),
        parameters: try of.int("parameters", bytesOfParts),
        peakMemory: try of.int("peak_memory", bytesOfParts),
        fingerprint: try sha256(of, "fingerprint"),
        parity: try of.optionalFields("parity").map { try whole($0, parity) },
        cache: of.optional("cache") == nil ? nil : try of.oneOf("cache", ["shared", "concatenated"])
    )
}

private func tensor(_ of: Fields) throws -> TensorSpec {
    TensorSpec(
        name: try of.name("name"),
        dtype: DType(rawValue: try of.oneOf("dtype", DType.allCases.map(\.rawValue)))!,
        shape: try of.list("shape") { value, key in
            value.whole == nil
                ? .named(try stringOf(value, key, 1...200)) : .fixed(try intOf(value, key, 0...1 << 31))
        }
    )
}

private func quantization(_ of: Fields) throws -> Quantization {
    let bits = try of.int("bits", 4...32)
    if ![4, 6, 8, 16, 32].contains(bits) {
        throw KeyFault(of.key("bits"), "must be 4, 6, 8, 16 or 32, not \(bits)")
    }
    return Quantization(
        bits: bits,
        blockSize: try of.optionalSize("block_size"),
        symmetric: try of.bool("symmetric", default: true),
        method: of.has("method") ? try of.name("method") : "none",
        activations: of.has("activations")
            ? try of.oneOf("activations", ["float32", "float16", "int8", "int8-static"]) : "float32",
        exceptions: of.has("exceptions")
            ? try of.members("exceptions") { try intOf($0, $1, Int.min...Int.max) } : [:]
    )
}

private func parity(_ of: Fields) throws -> Parity {
    Parity(
        cosine: try of.double("cosine"),
        snrDb: try of.double("snr_db"),
        maxAbsError: try of.double("max_abs_error"),
        conversionDb: try of.double("conversion_db"),
        top1: try of.optionalDouble("top1"),
        nearTies: try of.optionalDouble("near_ties"),
        kl: try of.optionalDouble("kl"),
        layers: of.optional("layers") == nil ? nil : try of.list("layers", each: doubleOf)
    )
}

private func image(_ of: Fields) throws -> ImageRule {
    ImageRule(
        height: try of.size("height"),
        width: try of.size("width"),
        strategy: try of.oneOf("strategy", ["stretch", "pad", "crop"]),
        filter: try of.oneOf("filter", ["nearest", "bilinear", "bicubic", "lanczos"]),
        padColor: of.has("pad_color") ? try of.list("pad_color", 3...3) { try intOf($0, $1, 0...255) } : [0, 0, 0],
        shortestEdge: try of.optionalSize("shortest_edge"),
        positionGrid: of.optional("position_grid") == nil
            ? nil : try of.list("position_grid", 2...2) { try intOf($0, $1, 1...largestSize) }
    )
}

private func prompt(_ of: Fields) throws -> Prompt {
    Prompt(
        tokenizer: of.has("tokenizer") ? try of.path("tokenizer") : "tokenizer.json",
        begin: try of.string("begin"),
        system: try of.nullableFields("system").map { try whole($0, turn) },
        user: try whole(try of.fields("user"), turn),
        assistant: try whole(try of.fields("assistant"), turn),
        generation: try of.string("generation"),
        laterUser: try of.optionalFields("later_user").map { try whole($0, turn) },
        userAfterSystem: try of.optionalFields("user_after_system").map { try whole($0, turn) },
        imagePrefix: try of.string("image_prefix", default: ""),
        imageSuffix: try of.string("image_suffix", default: ""),
        strip: of.has("strip") ? try of.oneOf("strip", ["none", "text", "content"]) : "none",
        addBos: try of.bool("add_bos", default: false),
        stop: of.has("stop") ? try of.list("stop") { try stringOf($0, $1, 0...1 << 16) } : [],
        examples: of.has("examples") ? try of.list("examples") { try whole(try fieldsOf($0, $1), example) } : []
    )
}

private func turn(_ of: Fields) throws -> Turn {
    Turn(
        prefix: try of.string("prefix"),
        suffix: try of.string("suffix"),
        prefixBeforeImage: try of.optionalString("prefix_before_image"),
        text: try of.bool("text", default: true)
    )
}

private func example(_ of: Fields) throws -> RenderedExample {
    RenderedExample(
        messages: try of.list("messages", each: objectOf),
        rendered: try of.string("rendered"),
        inputIds: try of.tokenIds("input_ids")
    )
}

private func generation(_ of: Fields) throws -> Generation {
    let noise = try of.fields("noise")
    _ = try noise.oneOf("rule", [Noise.rule])
    let found = Generation(
        signalTokenIds: try of.list("signal_token_ids", 1...64) { try intOf($0, $1, tokens) },
        height: try of.size("height"),
        width: try of.size("width"),
        steps: try of.size("steps"),
        noiseShape: try noise.list("shape", 1...8) { try intOf($0, $1, 1...largestSize) },
        schedules: of.optional("schedules") == nil
            ? nil
            : try of.list("schedules", 1...Generation.mostSteps) { value, key in
                try listOf(value, key, 1...Generation.mostSteps) { try listOf($0, $1, 5...5, each: scaleOf) }
            }
    )
    try noise.end()
    return found
}

private func golden(_ of: Fields) throws -> Golden {
    Golden(file: try of.path("file"), part: try of.name("part"), floorDb: try of.double("floor_db"))
}

private func conversation(_ of: Fields) throws -> GoldenConversation {
    GoldenConversation(
        image: try of.raw("image").isNull ? nil : try of.path("image"),
        prompt: try of.string("prompt"),
        inputIds: try of.tokenIds("input_ids"),
        answerIds: try of.tokenIds("answer_ids"),
        answer: try of.string("answer"),
        pytorchAnswer: try of.optionalString("pytorch_answer")
    )
}

private func file(_ of: Fields) throws -> BundleFile {
    BundleFile(
        path: try of.path("path"), bytes: try of.int("bytes", 0...(1 << 40) - 1), sha256: try sha256(of, "sha256"))
}

private func sha256(_ of: Fields, _ name: String) throws -> String {
    let value = try of.string(name)
    let digits = [UInt8]("0123456789abcdef".utf8)
    if value.utf8.count != 64 || !value.utf8.allSatisfy(digits.contains) {
        throw KeyFault(of.key(name), "must be 64 hexadecimal digits, not \(shown(value))")
    }
    return value
}
