/// The fields of a protobuf message, one after the other, read where they lie.
///
/// Source: protobuf's wire format. Groups, which nothing here has, are refused.
struct ProtobufReader {
    /// What is no such message.
    struct Damaged: Error {}

    enum Value {
        case number(UInt64)
        case fixed32(UInt32)
        case fixed64(UInt64)
        case bytes(UnsafeRawBufferPointer)
    }

    let bytes: UnsafeRawBufferPointer
    private var at = 0

    /// The memory must outlive the reader.
    init(_ bytes: UnsafeRawBufferPointer) {
        self.bytes = bytes
    }

    var isAtEnd: Bool { at == bytes.count }

    /// The next field and its number; nil at the end.
    mutating func next() throws -> (field: Int, value: Value)? {
        if isAtEnd { return nil }
        let key = try number()
        guard key >> 3 > 0, key >> 3 < 1 << 29 else { throw Damaged() }
        let field = Int(key >> 3)
        switch key & 7 {
        case 0: return (field, .number(try number()))
        case 1: return (field, .fixed64(try fixed()))
        case 5: return (field, .fixed32(try fixed()))
        case 2: return (field, .bytes(try take(try number())))
        default: throw Damaged()
        }
    }

    mutating func number() throws -> UInt64 {
        var value: UInt64 = 0
        for shift in stride(from: UInt64(0), to: 64, by: 7) {
            guard at < bytes.count else { throw Damaged() }
            let byte = bytes[at]
            at += 1
            value |= UInt64(byte & 0x7F) << shift
            if byte < 0x80 { return value }
        }
        throw Damaged()
    }

    mutating func fixed<T: FixedWidthInteger>() throws -> T {
        T(littleEndian: try take(UInt64(T.bitWidth / 8)).loadUnaligned(as: T.self))
    }

    private mutating func take(_ count: UInt64) throws -> UnsafeRawBufferPointer {
        guard count <= UInt64(bytes.count - at) else { throw Damaged() }
        let found = UnsafeRawBufferPointer(rebasing: bytes[at..<at + Int(count)])
        at += Int(count)
        return found
    }
}

extension ProtobufReader.Value {
    /// Throws ``ProtobufReader/Damaged`` for a field of another type; so do the others.
    func bytes() throws -> UnsafeRawBufferPointer {
        guard case .bytes(let found) = self else { throw ProtobufReader.Damaged() }
        return found
    }

    func text() throws -> String { String(decoding: try bytes(), as: UTF8.self) }

    func int() throws -> Int {
        guard case .number(let found) = self else { throw ProtobufReader.Damaged() }
        return Int(truncatingIfNeeded: found)
    }

    /// Of a repeated field of whole numbers: one, or several packed.
    func eachNumber(_ body: (UInt64) -> Void) throws {
        if case .number(let one) = self { return body(one) }
        var reader = ProtobufReader(try bytes())
        while !reader.isAtEnd { body(try reader.number()) }
    }
}
