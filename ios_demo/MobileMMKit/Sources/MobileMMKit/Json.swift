import Foundation

/// JSON as strangers send it, read strictly: UTF-8, no key twice, no NaN, no half surrogates, not nested too deep.
public enum Json: Sendable {
    case null
    case bool(Bool)
    case whole(Int)
    /// A whole number of more than 64 bits, by the count of its digits; no key of ours takes one.
    case huge(digits: Int)
    case number(Double)
    case string(String)
    case array([Json])
    case object(JsonObject)

    static let deepest = 64

    /// Throws ``JsonError`` for whatever is not JSON in this sense.
    public static func parse(_ data: Data) throws -> Json {
        if data.starts(with: [0xEF, 0xBB, 0xBF]) {
            throw JsonError("begins with a byte order mark; it must be plain UTF-8")
        }
        guard Utf8.isValid([UInt8](data)) else { throw JsonError("is not UTF-8") }
        return try data.withUnsafeBytes { bytes in
            var parser = JsonParser(bytes: bytes)
            return try parser.whole()
        }
    }

    /// A stranger's value as part of a one-line message.
    var shown: String {
        switch self {
        case .null: "null"
        case .bool(let value): value ? "true" : "false"
        case .whole(let value): String(value)
        case .huge(let digits): "a number of \(digits) digits"
        case .number(let value): String(value)
        case .string(let text): MobileMMKit.shown(text)
        case .array: "an array"
        case .object: "an object"
        }
    }

    public var string: String? { if case .string(let text) = self { text } else { nil } }
    public var whole: Int? { if case .whole(let value) = self { value } else { nil } }
    public var bool: Bool? { if case .bool(let value) = self { value } else { nil } }
    public var array: [Json]? { if case .array(let values) = self { values } else { nil } }
    public var object: JsonObject? { if case .object(let value) = self { value } else { nil } }
    public var isNull: Bool { if case .null = self { true } else { false } }

    public var double: Double? {
        switch self {
        case .number(let value): value
        case .whole(let value): Double(value)
        default: nil
        }
    }
}

/// What is wrong with a JSON text, as the end of a sentence about its file.
public struct JsonError: Error {
    let message: String

    init(_ message: String) {
        self.message = message
    }
}

/// A text that equals another only code point by code point, where Swift's `String` takes "é" and "e\u{301}" for one.
struct ExactText: Hashable, Sendable {
    let text: String

    static func == (one: ExactText, other: ExactText) -> Bool {
        one.text.utf8.elementsEqual(other.text.utf8)
    }

    func hash(into hasher: inout Hasher) {
        var copy = text
        copy.withUTF8 { hasher.combine(bytes: UnsafeRawBufferPointer($0)) }
    }
}

/// One JSON object: its members in their order, and by name.
public struct JsonObject: Sendable {
    public private(set) var names: [String] = []
    private var members: [ExactText: Json] = [:]

    public init() {}

    public subscript(name: String) -> Json? { members[ExactText(text: name)] }

    public var count: Int { names.count }

    /// False when there is such a member already.
    mutating func add(_ name: String, _ value: Json) -> Bool {
        guard members.updateValue(value, forKey: ExactText(text: name)) == nil else { return false }
        names.append(name)
        return true
    }
}

private struct JsonParser {
    let bytes: UnsafeRawBufferPointer
    var at = 0

    mutating func whole() throws -> Json {
        let found = try value(depth: 0)
        space()
        if at < bytes.count { throw fault("something follows its end") }
        return found
    }

    private func fault(_ what: String) -> JsonError { JsonError("is not valid JSON (\(what), byte \(at))") }

    private var next: UInt8? { at < bytes.count ? bytes[at] : nil }

    private mutating func space() {
        while let byte = next, byte == 0x20 || byte == 0x0A || byte == 0x0D || byte == 0x09 { at += 1 }
    }

    private mutating func take(_ char: Unicode.Scalar) -> Bool {
        guard next == UInt8(ascii: char) else { return false }
        at += 1
        return true
    }

    private mutating func value(depth: Int) throws -> Json {
        space()
        guard let byte = next else { throw fault("it ends early") }
        switch byte {
        case UInt8(ascii: "{"), UInt8(ascii: "["):
            if depth >= Json.deepest { throw fault("nested deeper than \(Json.deepest) levels") }
            at += 1
            return byte == UInt8(ascii: "{") ? try members(depth + 1) : try elements(depth + 1)
        case UInt8(ascii: "\""): return .string(try string())
        case UInt8(ascii: "t"): return try word("true", .bool(true))
        case UInt8(ascii: "f"): return try word("false", .bool(false))
        case UInt8(ascii: "n"): return try word("null", .null)
        case UInt8(ascii: "-"), UInt8(ascii: "0")...UInt8(ascii: "9"): return try number()
        default: throw fault("a value is expected")
        }
    }

    private mutating func word(_ word: String, _ value: Json) throws -> Json {
        guard bytes[at...].starts(with: word.utf8) else { throw fault("a value is expected") }
        at += word.utf8.count
        return value
    }

    private mutating func members(_ depth: Int) throws -> Json {
        var found = JsonObject()
        space()
        if take("}") { return .object(found) }
        while true {
            space()
            guard next == UInt8(ascii: "\"") else { throw fault("a key is expected") }
            let key = try string()
            space()
            if !take(":") { throw fault("a colon is expected") }
            if !found.add(key, try value(depth: depth)) { throw fault("key \(shown(key)) stands there twice") }
            space()
            if take("}") { return .object(found) }
            if !take(",") { throw fault("a comma is expected") }
        }
    }

    private mutating func elements(_ depth: Int) throws -> Json {
        var found: [Json] = []
        space()
        if take("]") { return .array(found) }
        while true {
            found.append(try value(depth: depth))
            space()
            if take("]") { return .array(found) }
            if !take(",") { throw fault("a comma is expected") }
        }
    }

    private mutating func string() throws -> String {
        at += 1
        var found: [UInt8] = []
        while true {
            let start = at
            while let byte = next, byte != UInt8(ascii: "\""), byte != UInt8(ascii: "\\"), byte >= 0x20 { at += 1 }
            guard let byte = next else { throw fault("a string does not end") }
            let run = UnsafeRawBufferPointer(rebasing: bytes[start..<at])
            at += 1
            if byte == UInt8(ascii: "\"") {
                if found.isEmpty { return String(decoding: run, as: UTF8.self) }
                found += run
                return String(decoding: found, as: UTF8.self)
            }
            found += run
            guard byte == UInt8(ascii: "\\") else { throw fault("a control character in a string") }
            found += Array(String(Character(try escaped())).utf8)
        }
    }

    private mutating func escaped() throws -> Unicode.Scalar {
        guard let byte = next else { throw fault("a string does not end") }
        at += 1
        switch Unicode.Scalar(byte) {
        case "\"", "\\", "/": return Unicode.Scalar(byte)
        case "b": return "\u{8}"
        case "f": return "\u{C}"
        case "n": return "\n"
        case "r": return "\r"
        case "t": return "\t"
        case "u":
            let first = try unit()
            if let scalar = Unicode.Scalar(first) { return scalar }
            guard first < 0xDC00, take("\\"), take("u") else { throw fault("half a surrogate pair in a string") }
            let second = try unit()
            guard (0xDC00..<0xE000).contains(second) else { throw fault("half a surrogate pair in a string") }
            return Unicode.Scalar(0x10000 + (first - 0xD800) << 10 + (second - 0xDC00))!
        default: throw fault("an unknown escape")
        }
    }

    private mutating func unit() throws -> UInt32 {
        let digits = bytes[at..<min(at + 4, bytes.count)]
        guard digits.count == 4, digits.allSatisfy({ Character(Unicode.Scalar($0)).isHexDigit }) else {
            throw fault("\\u without four digits")
        }
        at += 4
        return UInt32(String(decoding: digits, as: UTF8.self), radix: 16)!
    }

    private mutating func number() throws -> Json {
        let start = at
        _ = take("-")
        try digits(leadingZero: false)
        var isWhole = true
        if take(".") {
            isWhole = false
            try digits(leadingZero: true)
        }
        if next == UInt8(ascii: "e") || next == UInt8(ascii: "E") {
            isWhole = false
            at += 1
            if !take("+") { _ = take("-") }
            try digits(leadingZero: true)
        }
        let text = String(decoding: bytes[start..<at], as: UTF8.self)
        if isWhole { return Int(text).map(Json.whole) ?? .huge(digits: text.count) }
        guard let number = Double(text), number.isFinite else { throw fault("\(shown(text)) is no finite number") }
        return .number(number)
    }

    private mutating func digits(leadingZero: Bool) throws {
        let start = at
        while let byte = next, (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) { at += 1 }
        if at == start { throw fault("a digit is expected") }
        if !leadingZero && bytes[start] == UInt8(ascii: "0") && at > start + 1 { throw fault("a number begins with 0") }
    }
}
