import Foundation

/// Reads safetensors files: a header in JSON, then the numbers. Source: the format's README.
enum SafeTensors {
    private static let largest = 256 << 20
    private static let dtypes: [String: DType] = [
        "F32": .float32, "F16": .float16, "U8": .uint8, "I8": .int8, "I32": .int32, "I64": .int64,
    ]

    /// All tensors by name. Throws ``MobileMMError`` naming the file for what is no such file, or damaged.
    static func read(_ file: URL) throws -> [String: Tensor] {
        guard let data = try? Data(contentsOf: file, options: .alwaysMapped) else {
            throw MobileMMError("\(file.path): cannot be read")
        }
        if data.count > largest { throw MobileMMError("\(file.path): too large for golden vectors") }
        guard let found = try tensors(data) else {
            throw MobileMMError("\(file.path): is no safetensors file, or damaged")
        }
        return found
    }

    private static func tensors(_ data: Data) throws -> [String: Tensor]? {
        guard data.count >= 8 else { return nil }
        let length = data.withUnsafeBytes { UInt64(littleEndian: $0.loadUnaligned(as: UInt64.self)) }
        guard length >= 2, length <= UInt64(data.count - 8) else { return nil }
        let start = 8 + Int(length)
        guard let header = (try? Json.parse(data.subdata(in: 8..<start)))?.object else { return nil }
        var found: [String: Tensor] = [:]
        for name in header.names where name != "__metadata__" {
            guard let entry = header[name]?.object, let dtype = entry["dtype"]?.string.flatMap({ dtypes[$0] }),
                let shape = entry["shape"]?.array?.map(\.whole), !shape.contains(nil),
                let places = entry["data_offsets"]?.array?.compactMap(\.whole), places.count == 2
            else { return nil }
            let tensor = try Tensor(dtype, shape.map { $0! })
            let bytes = tensor.count * dtype.bytes
            guard places[0] >= 0, places[1] >= places[0], places[1] <= data.count - start,
                places[1] - places[0] == bytes
            else { return nil }
            data.withUnsafeBytes { all in
                tensor.memory.copyMemory(from: .init(rebasing: all[start + places[0]..<start + places[1]]))
            }
            found[name] = tensor
        }
        return found
    }
}
