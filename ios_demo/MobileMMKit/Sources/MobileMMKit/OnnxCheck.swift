import Foundation

/// Checks an ONNX part as a file: what a runtime would load is looked at before it does.
///
/// Whoever makes a hostile bundle computes its hashes as well. So no weight may lie outside of the part's own files, be
/// of another size than its shape needs, or hold a NaN; no operator may load code or files; inputs and outputs are those
/// of the manifest. Twin of `onnx_check.py`. Source: the ONNX IR specification (onnx.proto, "External Data").
struct OnnxCheck {
    private static let domains: Set = ["", "ai.onnx", "com.microsoft"]
    /// Operators of these domains that load files or run code of their own.
    private static let refused: Set = ["EPContext", "PythonOp", "PythonOpGrad"]
    /// Protobuf's own limit.
    private static let largestGraph = Int(Int32.max)

    /// An element's bits, and in which list its values stand when they are no raw bytes.
    private struct ElementType {
        let name: String
        let bits: Int
        let field: Int
        let dtype: DType?

        init(_ name: String, _ bits: Int, _ field: Int, _ dtype: DType? = nil) {
            (self.name, self.bits, self.field, self.dtype) = (name, bits, field, dtype)
        }
    }

    private static let types: [Int: ElementType] = [
        1: .init("FLOAT", 32, 4, .float32), 10: .init("FLOAT16", 16, 5, .float16), 16: .init("BFLOAT16", 16, 5),
        11: .init("DOUBLE", 64, 10), 2: .init("UINT8", 8, 5, .uint8), 3: .init("INT8", 8, 5, .int8),
        4: .init("UINT16", 16, 5), 5: .init("INT16", 16, 5), 12: .init("UINT32", 32, 11), 6: .init("INT32", 32, 5, .int32),
        13: .init("UINT64", 64, 11), 7: .init("INT64", 64, 7, .int64), 9: .init("BOOL", 8, 5), 21: .init("UINT4", 4, 5),
        22: .init("INT4", 4, 5), 25: .init("UINT2", 2, 5), 26: .init("INT2", 2, 5),
    ]

    /// Throws ``MobileMMError`` naming file and tensor. With `values` also when a floating-point weight is not finite,
    /// which reads them all.
    static func check(_ folder: URL, _ manifest: Manifest, _ name: String, values: Bool = true) throws {
        let part = manifest.parts[name]!
        let file = folder.appendingPathComponent(part.file)
        let sizes = Dictionary(manifest.files.map { ($0.path, $0.bytes) }, uniquingKeysWith: { first, _ in first })
        var check = OnnxCheck(folder: folder, file: file, part: part, sizes: sizes, values: values)
        if sizes[part.file]! > largestGraph {
            try check.refuse("is larger than the 2 GB that ONNX allows without external data")
        }
        let data = try check.map(file)
        do {
            try data.withUnsafeBytes { try check.run($0) }
        } catch is ProtobufReader.Damaged {
            try check.refuse("is no ONNX model, or damaged")
        }
    }

    private let folder: URL
    private let file: URL
    private let part: Part
    private let sizes: [String: Int]
    private let values: Bool
    /// Files with external data, by their paths.
    private var outside: [String: Data] = [:]

    private init(folder: URL, file: URL, part: Part, sizes: [String: Int], values: Bool) {
        (self.folder, self.file, self.part, self.sizes, self.values) = (folder, file, part, sizes, values)
    }

    private mutating func run(_ bytes: UnsafeRawBufferPointer) throws {
        let model = try OnnxModel(bytes)
        guard let graph = model.graph, !graph.nodes.isEmpty else { try refuse("is no ONNX model (it has no graph)") }
        if let function = model.functions.first { try refuse("holds the function \(shown(function)); none is allowed") }
        if model.hasTraining { try refuse("holds training information") }
        let graphs = graph.all
        for one in graphs {
            for node in one.nodes { try checkOperator(node) }
            if let name = one.sparse.first { try refuse("tensor \(shown(name)) is sparse") }
        }
        var names: Set<String> = []
        for tensor in graph.initializers where !names.insert(tensor.name).inserted {
            try refuse("tensor \(shown(tensor.name)) stands there twice")
        }
        for one in graphs {
            let parameters = Set(one.nodes.filter(\.quantizes).flatMap { $0.inputs.dropFirst() })
            for tensor in one.initializers { try check(tensor, isScale: parameters.contains(tensor.name)) }
            for node in one.nodes {
                if node.isSparse { try refuse("node \(shown(node.name)) holds a sparse tensor") }
                let isScale = node.outputs.contains(where: parameters.contains)
                for tensor in node.tensors { try check(tensor, isScale: isScale) }
            }
        }
        for one in graphs { try checkQuantized(one) }
        try checkInterface(graph)
    }

    private func refuse(_ wrong: String) throws -> Never {
        throw MobileMMError("\(file.path): \(wrong); \(ManifestReader.again)")
    }

    private func map(_ file: URL) throws -> Data {
        guard let data = try? Data(contentsOf: file, options: .alwaysMapped) else {
            throw MobileMMError("\(file.path): cannot be read")
        }
        return data
    }

    private func checkOperator(_ node: OnnxModel.Node) throws {
        if Self.domains.contains(node.domain) && !Self.refused.contains(node.operation) { return }
        let name = node.domain.isEmpty ? node.operation : "\(node.domain).\(node.operation)"
        try refuse("operator \(shown(name)) is not allowed; those of ai.onnx and com.microsoft are")
    }

    // MARK: stored tensors

    private mutating func check(_ tensor: OnnxModel.StoredTensor, isScale: Bool) throws {
        let name = shown(tensor.name)
        guard let type = Self.types[tensor.type] else {
            try refuse("tensor \(name) has the type \(tensor.type), which is not allowed")
        }
        if tensor.dims.contains(where: { $0 < 0 }) { try refuse("tensor \(name) has a negative dimension") }
        if tensor.isSegment { try refuse("tensor \(name) is stored in segments") }
        guard let count = product(tensor.dims), let bits = product([count, type.bits]) else {
            try refuse("tensor \(name) is larger than there are numbers for")
        }
        let size = bits / 8 + (bits % 8 == 0 ? 0 : 1)
        var finite = Finite(type.name, isScale: isScale)
        if tensor.isOutside {
            let (path, offset) = try place(tensor, size)
            if values && finite != nil {
                try data(path).withUnsafeBytes { finite!.look(at: .init(rebasing: $0[offset..<offset + size])) }
            }
        } else if !tensor.external.isEmpty {
            try refuse("tensor \(name) is stored inside and outside of the file")
        } else if let raw = tensor.raw {
            if raw.count != size { try wrongSize(tensor, raw.count, "bytes", size) }
            if values { finite?.look(at: raw) }
        } else {
            // Types under a byte are packed.
            let wanted = type.field == 5 ? (product([count, min(type.bits, 8)])! + 7) / 8 : count
            let found = try listed(tensor, type, &finite)
            if found != wanted { try wrongSize(tensor, found, "values", wanted) }
        }
        if values && finite?.isBroken == true { try refuse("tensor \(name) holds NaN or infinity") }
    }

    /// How many values are listed one by one in the field of their type; each is looked at.
    private func listed(_ tensor: OnnxModel.StoredTensor, _ type: ElementType, _ finite: inout Finite?) throws -> Int {
        var (count, message) = (0, ProtobufReader(tensor.message))
        while let (field, value) = try message.next() {
            guard field == type.field else { continue }
            switch (type.field, value) {
            case (4, .fixed32(let bits)):
                count += 1
                finite?.look(UInt64(bits))
            case (10, .fixed64(let bits)):
                count += 1
                finite?.look(bits)
            case (4, .bytes(let packed)), (10, .bytes(let packed)):
                if packed.count % (type.bits / 8) != 0 { throw ProtobufReader.Damaged() }
                count += packed.count / (type.bits / 8)
                finite?.look(at: packed)
            case (4, _), (10, _): throw ProtobufReader.Damaged()
            default:
                try value.eachNumber {
                    count += 1
                    finite?.look($0 & 0xFFFF)
                }
            }
        }
        return count
    }

    private func wrongSize(_ tensor: OnnxModel.StoredTensor, _ found: Int, _ unit: String, _ wanted: Int) throws -> Never {
        let dims = tensor.dims.prefix(8).map(String.init).joined(separator: ", ")
        try refuse("tensor \(shown(tensor.name)) has \(found) \(unit); its shape \(dims) needs \(wanted)")
    }

    /// File and offset of a tensor outside of the .onnx file, after a check that it lies there whole.
    private func place(_ tensor: OnnxModel.StoredTensor, _ size: Int) throws -> (String, Int) {
        let entries = Dictionary(tensor.external, uniquingKeysWith: { _, last in last })
        let location = entries["location"] ?? ""
        let path = (part.file.split(separator: "/").dropLast().map(String.init) + [location]).joined(separator: "/")
        guard !location.hasPrefix("/"), path != part.file, part.files.contains(path), let whole = sizes[path] else {
            try refuse("tensor \(shown(tensor.name)) lies in \(shown(location)), which is no file of this part")
        }
        func number(_ key: String, _ fallback: Int) throws -> Int {
            guard let text = entries[key] else { return fallback }
            guard !text.isEmpty, text.utf8.count < 19, text.utf8.allSatisfy({ (48...57).contains($0) }) else {
                try refuse("tensor \(shown(tensor.name)): external data's \(key) is \(shown(text))")
            }
            return Int(text)!
        }
        let (offset, length) = (try number("offset", 0), try number("length", size))
        if length != size { try wrongSize(tensor, length, "bytes", size) }
        if offset > whole || length > whole - offset {
            try refuse("tensor \(shown(tensor.name)) reaches beyond the end of \(shown(path)), which has \(whole) bytes")
        }
        return (path, offset)
    }

    private mutating func data(_ path: String) throws -> Data {
        if let known = outside[path] { return known }
        let found = try map(folder.appendingPathComponent(path))
        // Whoever shortens the file now has changed it behind the check of its size.
        if found.count != sizes[path] { try refuse("its file \(shown(path)) is changing") }
        outside[path] = found
        return found
    }

    /// Looks for NaN and infinity. An additive mask, of zeros and −∞ alone, is what it looks like.
    private struct Finite {
        private let bits: Int
        /// Set in NaN and infinity, all of them.
        private let exponent: UInt64
        private let minusInfinity: UInt64
        private var infinite = false
        private var isMask: Bool

        /// Nil for types that hold finite numbers only.
        init?(_ type: String, isScale: Bool) {
            switch type {
            case "FLOAT": (bits, exponent, minusInfinity) = (32, 0x7F80_0000, 0xFF80_0000)
            case "FLOAT16": (bits, exponent, minusInfinity) = (16, 0x7C00, 0xFC00)
            case "BFLOAT16": (bits, exponent, minusInfinity) = (16, 0x7F80, 0xFF80)
            case "DOUBLE": (bits, exponent, minusInfinity) = (64, 0x7FF0 << 48, 0xFFF0 << 48)
            default: return nil
            }
            isMask = !isScale
        }

        var isBroken: Bool { infinite && !isMask }

        mutating func look(_ value: UInt64) {
            if value & exponent == exponent { infinite = true }
            if value != 0 && value != minusInfinity { isMask = false }
        }

        mutating func look(at bytes: UnsafeRawBufferPointer) {
            switch bits {
            case 16: look(at: bytes, UInt16.self)
            case 32: look(at: bytes, UInt32.self)
            default: look(at: bytes, UInt64.self)
            }
        }

        private mutating func look<T: FixedWidthInteger & UnsignedInteger>(at bytes: UnsafeRawBufferPointer, _: T.Type) {
            let (mask, least, width) = (T(exponent), T(minusInfinity), T.bitWidth / 8)
            var (broken, other): (T, T) = (0, 0)
            for at in stride(from: 0, to: bytes.count - width + 1, by: width) {
                let value = T(littleEndian: bytes.loadUnaligned(fromByteOffset: at, as: T.self))
                broken |= value & mask == mask ? 1 : 0
                other |= value == 0 || value == least ? 0 : 1
            }
            if broken != 0 { infinite = true }
            if other != 0 { isMask = false }
        }
    }

    /// That MatMulNBits' weights have the sizes that its attributes say: the kernel goes by those.
    private func checkQuantized(_ graph: OnnxModel.Graph) throws {
        let counts = Dictionary(
            graph.initializers.map { ($0.name, product($0.dims)!) }, uniquingKeysWith: { _, last in last })
        for node in graph.nodes where node.operation == "MatMulNBits" {
            let (rows, columns) = (node.numbers["N"] ?? 0, node.numbers["K"] ?? 0)
            let (bits, block) = (node.numbers["bits"] ?? 4, node.numbers["block_size"] ?? 0)
            if min(rows, columns, block) < 1 || ![2, 4, 8].contains(bits) || node.inputs.count < 3 {
                try refuse("node \(shown(node.name)): MatMulNBits with K, N, bits or block_size out of range")
            }
            func packed(_ count: Int) -> Int? { product([count, bits]).map { ($0 - 1) / 8 + 1 } }
            let blocks = (columns - 1) / block + 1
            let each = product([rows, blocks])
            let wanted: [Int: [Int?]] = [
                1: [packed(block).flatMap { product([rows, blocks, $0]) }],
                2: [each],
                // Zero points packed, or of the scales' type.
                3: [packed(blocks).flatMap { product([rows, $0]) }, each],
                5: [rows],
            ]
            for (index, sizes) in wanted.sorted(by: { $0.key < $1.key }) where index < node.inputs.count {
                guard let count = counts[node.inputs[index]], !sizes.contains(count) else { continue }
                try refuse(
                    "tensor \(shown(node.inputs[index])) has \(count) elements, which is not what node"
                        + " \(shown(node.name)) needs (K \(columns), N \(rows), \(bits) bits, blocks of \(block))")
            }
        }
    }

    // MARK: inputs and outputs

    /// As the manifest has them; an input with a default value need not be listed.
    private func checkInterface(_ graph: OnnxModel.Graph) throws {
        let defaults = Set(graph.initializers.map(\.name))
        for (side, specs, features, optional) in [
            ("input", part.inputs, graph.inputs, defaults), ("output", part.outputs, graph.outputs, []),
        ] {
            let found = Dictionary(features.map { ($0.name, $0) }, uniquingKeysWith: { first, _ in first })
            if found.count < features.count { try refuse("two \(side)s have one name") }
            for feature in features where !optional.contains(feature.name) {
                if specs.contains(where: { $0.name == feature.name }) { continue }
                try refuse("\(side) \(shown(feature.name)) is not in the manifest")
            }
            for spec in specs {
                guard let feature = found[spec.name] else {
                    try refuse("\(side) \(shown(spec.name)) is not in the graph")
                }
                try check(side, spec, feature)
            }
        }
    }

    /// A number is the same number in both; a dynamic dimension is one in both, under any name.
    private func check(_ side: String, _ spec: TensorSpec, _ feature: OnnxModel.Feature) throws {
        let name = "\(side) \(shown(spec.name))"
        guard let type = feature.type else { try refuse("\(name) is no tensor") }
        let known = Self.types[type]
        if known?.dtype != spec.dtype {
            try refuse("\(name) is \(known?.name ?? "of an unknown type"); the manifest says \(spec.dtype.rawValue)")
        }
        guard let shape = feature.shape else { try refuse("\(name) has no shape") }
        if shape != spec.shape.map(\.size) {
            func text(_ sizes: [Int?]) -> String {
                sizes.prefix(8).map { $0.map(String.init) ?? "any" }.joined(separator: ", ")
            }
            try refuse("\(name) has the shape \(text(shape)); the manifest says \(text(spec.shape.map(\.size)))")
        }
    }
}

/// Of sizes that are not negative; nil when there are no numbers for it.
func product(_ sizes: [Int]) -> Int? {
    if sizes.contains(0) { return 0 }
    return sizes.reduce(1) { (all: Int?, size) in
        guard let (found, overflows) = all?.multipliedReportingOverflow(by: size), !overflows else { return nil }
        return found
    }
}
