import Foundation

/// Whether an ONNX part refers to its own files alone, and inside of them: looked at without a runtime.
///
/// Source: onnx.proto3 (ModelProto, GraphProto, TensorProto, "external_data") and protobuf's wire format.
enum OnnxCheck {
    private static let largestGraph = 512 << 20
    private static let deepest = 32

    private enum Kind { case model, graph, node, function, attribute, tensor, sparseTensor }

    /// The fields that lead to tensors.
    private static func inner(_ kind: Kind, _ field: Int) -> Kind? {
        switch (kind, field) {
        case (.model, 7): .graph
        case (.model, 25): .function
        case (.graph, 1), (.function, 7): .node
        case (.graph, 5), (.attribute, 5), (.attribute, 10), (.sparseTensor, 1), (.sparseTensor, 2): .tensor
        case (.graph, 15): .sparseTensor
        case (.node, 5): .attribute
        case (.attribute, 6), (.attribute, 11): .graph
        default: nil
        }
    }

    private static let externalData = 13

    /// Throws ``MobileMMError`` naming the part's file.
    static func check(_ folder: URL, _ manifest: Manifest, _ name: String) throws {
        let part = manifest.parts[name]!
        let file = folder.appendingPathComponent(part.file)
        let sizes = Dictionary(manifest.files.map { ($0.path, $0.bytes) }, uniquingKeysWith: { first, _ in first })
        if sizes[part.file]! > largestGraph {
            throw refusal(file, "its graph is larger than \(largestGraph >> 20) MB")
        }
        func parent(_ path: String) -> String { path.split(separator: "/").dropLast().joined(separator: "/") }
        var known: [String: Int] = [:]
        for path in part.files where path != part.file && parent(path) == parent(part.file) {
            known[String(path.split(separator: "/").last!)] = sizes[path]!
        }
        guard let data = try? Data(contentsOf: file, options: .alwaysMapped) else {
            throw MobileMMError("\(file.path): cannot be read")
        }
        do {
            try data.withUnsafeBytes { bytes in
                try walk(Wire(bytes: bytes), .model, 0) { try external(file, known, $0) }
            }
        } catch is Wire.Damaged {
            throw refusal(file, "is not an ONNX file, or damaged")
        }
    }

    private static func walk(_ given: Wire, _ kind: Kind, _ depth: Int, external: ([String: String]) throws -> Void) throws {
        if depth >= deepest { throw Wire.Damaged() }
        var wire = given
        var entries: [String: String] = [:]
        while !wire.bytes.isEmpty {
            guard let (field, body) = try wire.next() else { continue }
            if kind == .tensor && field == externalData {
                let (key, value) = try body.keyAndValue()
                entries[key] = value
            } else if let next = inner(kind, field) {
                try walk(body, next, depth + 1, external: external)
            }
        }
        if !entries.isEmpty { try external(entries) }
    }

    private static func external(_ file: URL, _ known: [String: Int], _ entries: [String: String]) throws {
        let location = entries["location"] ?? ""
        guard let size = known[location] else {
            throw refusal(file, "a tensor's data is in \(shown(location)), which is no file of this part")
        }
        let offset = entries["offset"].map { Int($0) ?? -1 } ?? 0
        let length = entries["length"].map { Int($0) ?? -1 } ?? 0
        if offset < 0 || length < 0 || offset > size || length > size - offset {
            throw refusal(file, "a tensor's data reaches beyond the end of \(shown(location))")
        }
    }

    private static func refusal(_ file: URL, _ wrong: String) -> MobileMMError {
        MobileMMError("\(file.path): \(wrong); \(ManifestReader.again)")
    }

    /// Protobuf's fields one after the other, of which only nested ones are given.
    private struct Wire {
        struct Damaged: Error {}

        var bytes: Slice<UnsafeRawBufferPointer>

        init(bytes: UnsafeRawBufferPointer) {
            self.bytes = bytes[...]
        }

        mutating func next() throws -> (Int, Wire)? {
            let key = try varint()
            guard key >> 3 > 0, key >> 3 <= UInt64(Int32.max) else { throw Damaged() }
            switch key & 7 {
            case 0: _ = try varint()
            case 1: _ = try take(8)
            case 5: _ = try take(4)
            case 2:
                var inner = self
                inner.bytes = try take(try varint())
                return (Int(key >> 3), inner)
            default: throw Damaged()
            }
            return nil
        }

        private mutating func take(_ count: UInt64) throws -> Slice<UnsafeRawBufferPointer> {
            guard count <= UInt64(bytes.count) else { throw Damaged() }
            let found = bytes.prefix(Int(count))
            bytes = bytes.dropFirst(Int(count))
            return found
        }

        /// Of a StringStringEntryProto.
        func keyAndValue() throws -> (String, String) {
            var wire = self
            var found = ["", ""]
            while !wire.bytes.isEmpty {
                guard let (field, body) = try wire.next() else { continue }
                if field == 1 || field == 2 { found[field - 1] = String(decoding: body.bytes, as: UTF8.self) }
            }
            return (found[0], found[1])
        }

        private mutating func varint() throws -> UInt64 {
            var value: UInt64 = 0
            for shift in stride(from: UInt64(0), to: 64, by: 7) {
                guard let byte = bytes.popFirst() else { throw Damaged() }
                value |= UInt64(byte & 0x7F) << shift
                if byte < 0x80 { return value }
            }
            throw Damaged()
        }
    }
}
