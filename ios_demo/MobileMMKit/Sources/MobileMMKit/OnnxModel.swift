/// What is looked at of an ONNX file before a runtime loads it. Tensors stay where they lie in the file.
///
/// Source: onnx.proto. Reading throws ``ProtobufReader/Damaged``.
struct OnnxModel {
    var graph: Graph?
    var functions: [String] = []
    var hasTraining = false

    struct Graph {
        var nodes: [Node] = []
        var initializers: [StoredTensor] = []
        var sparse: [String] = []
        var inputs: [Feature] = []
        var outputs: [Feature] = []
    }

    struct Node {
        var name = ""
        var operation = ""
        var domain = ""
        var inputs: [String] = []
        var outputs: [String] = []
        var numbers: [String: Int] = [:]
        var tensors: [StoredTensor] = []
        var graphs: [Graph] = []
        var isSparse = false
    }

    struct StoredTensor {
        var name = ""
        var dims: [Int] = []
        var type = 0
        var isSegment = false
        var isOutside = false
        var raw: UnsafeRawBufferPointer?
        var external: [(key: String, value: String)] = []
        /// The message itself, for the values that are listed one by one.
        let message: UnsafeRawBufferPointer
    }

    /// An input or output of a graph; the type nil for what is no tensor, the shape where there is none.
    struct Feature {
        var name = ""
        var type: Int?
        var shape: [Int?]?
    }

    private static let deepest = 32

    init(_ bytes: UnsafeRawBufferPointer) throws {
        var message = ProtobufReader(bytes)
        while let (field, value) = try message.next() {
            switch field {
            case 7:
                // Of two, protobuf makes one.
                if graph != nil { throw ProtobufReader.Damaged() }
                graph = try Graph(value.bytes(), 0)
            case 20: hasTraining = true
            case 25: functions.append(try Self.name(value.bytes(), at: 1))
            default: break
            }
        }
    }

    fileprivate static func name(_ bytes: UnsafeRawBufferPointer, at wanted: Int) throws -> String {
        var (message, name) = (ProtobufReader(bytes), "")
        while let (field, value) = try message.next() { if field == wanted { name = try value.text() } }
        return name
    }
}

extension OnnxModel.Graph {
    fileprivate init(_ bytes: UnsafeRawBufferPointer, _ depth: Int) throws {
        if depth >= OnnxModel.deepest { throw ProtobufReader.Damaged() }
        var message = ProtobufReader(bytes)
        while let (field, value) = try message.next() {
            switch field {
            case 1: nodes.append(try OnnxModel.Node(value.bytes(), depth))
            case 5: initializers.append(try OnnxModel.StoredTensor(value.bytes()))
            case 11: inputs.append(try OnnxModel.Feature(value.bytes()))
            case 12: outputs.append(try OnnxModel.Feature(value.bytes()))
            case 15: sparse.append(try Self.sparseName(value.bytes()))
            default: break
            }
        }
    }

    private static func sparseName(_ bytes: UnsafeRawBufferPointer) throws -> String {
        var (message, name) = (ProtobufReader(bytes), "")
        while let (field, value) = try message.next() { if field == 1 { name = try OnnxModel.name(value.bytes(), at: 8) } }
        return name
    }

    /// Itself and the graphs inside of its nodes (If, Loop, Scan).
    var all: [OnnxModel.Graph] { [self] + nodes.flatMap { $0.graphs.flatMap(\.all) } }
}

extension OnnxModel.Node {
    fileprivate init(_ bytes: UnsafeRawBufferPointer, _ depth: Int) throws {
        var message = ProtobufReader(bytes)
        while let (field, value) = try message.next() {
            switch field {
            case 1: inputs.append(try value.text())
            case 2: outputs.append(try value.text())
            case 3: name = try value.text()
            case 4: operation = try value.text()
            case 5: try attribute(value.bytes(), depth)
            case 7: domain = try value.text()
            default: break
            }
        }
    }

    private mutating func attribute(_ bytes: UnsafeRawBufferPointer, _ depth: Int) throws {
        var message = ProtobufReader(bytes)
        var (name, number) = ("", 0)
        while let (field, value) = try message.next() {
            switch field {
            case 1: name = try value.text()
            case 3: number = try value.int()
            case 5, 10: tensors.append(try OnnxModel.StoredTensor(value.bytes()))
            case 6, 11: graphs.append(try OnnxModel.Graph(value.bytes(), depth + 1))
            case 22, 23: isSparse = true
            default: break
            }
        }
        numbers[name] = number
    }

    /// Whether what it reads behind its first input are scales and the like.
    var quantizes: Bool {
        let lower = operation.lowercased()
        return ["quantize", "nbits", "integer", "qlinear", "qgemm"].contains { lower.contains($0) }
    }
}

extension OnnxModel.StoredTensor {
    fileprivate init(_ bytes: UnsafeRawBufferPointer) throws {
        message = bytes
        var reader = ProtobufReader(bytes)
        while let (field, value) = try reader.next() {
            switch field {
            case 1: try value.eachNumber { dims.append(Int(truncatingIfNeeded: $0)) }
            case 2: type = Int(Int32(truncatingIfNeeded: try value.int()))
            case 3: isSegment = true
            case 8: name = try value.text()
            case 9: raw = try value.bytes()
            case 13:
                var (entry, key, text) = (ProtobufReader(try value.bytes()), "", "")
                while let (field, value) = try entry.next() {
                    if field == 1 { key = try value.text() }
                    if field == 2 { text = try value.text() }
                }
                external.append((key, text))
            case 14: isOutside = try value.int() == 1
            default: break
            }
        }
    }
}

extension OnnxModel.Feature {
    fileprivate init(_ bytes: UnsafeRawBufferPointer) throws {
        var message = ProtobufReader(bytes)
        while let (field, value) = try message.next() {
            if field == 1 { name = try value.text() }
            if field == 2 {
                var type = ProtobufReader(try value.bytes())
                while let (field, value) = try type.next() { if field == 1 { try tensor(value.bytes()) } }
            }
        }
    }

    private mutating func tensor(_ bytes: UnsafeRawBufferPointer) throws {
        var message = ProtobufReader(bytes)
        type = type ?? 0
        while let (field, value) = try message.next() {
            if field == 1 { type = try value.int() }
            if field == 2 {
                var (dimensions, sizes) = (ProtobufReader(try value.bytes()), [Int?]())
                while let (field, value) = try dimensions.next() {
                    if field == 1 { sizes.append(try Self.size(value.bytes())) }
                }
                shape = (shape ?? []) + sizes
            }
        }
    }

    /// A number, or nil for a dimension with a name.
    private static func size(_ bytes: UnsafeRawBufferPointer) throws -> Int? {
        var (message, size) = (ProtobufReader(bytes), Int?.none)
        while let (field, value) = try message.next() {
            if field == 1 { size = try value.int() }
            if field == 2 { size = nil }
        }
        return size
    }
}
