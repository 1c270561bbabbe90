import Foundation

/// A run of a program that Python has recorded (`python -m tests.ios.recording`), beside what the program itself says of
/// its methods.
///
/// `MOBILEMM_RECORDING` names a folder with one of the bundle's name: `interfaces.json`, `calls.json`, and the tensors'
/// bytes.
final class Recording {
    /// What a method says to inputs that the recorded run did not have.
    struct Unexpected: LocalizedError {
        let text: String
        var errorDescription: String? { text }
    }

    private let file: URL
    private let folder: URL
    private var methods: [String: MethodMetadata]?
    private var calls: [[String: Any]] = []
    private static let stateful = "text_decoder"

    init(_ file: String) {
        self.file = URL(fileURLWithPath: file)
        let bundle = self.file.deletingLastPathComponent().deletingLastPathComponent().lastPathComponent
        folder = URL(fileURLWithPath: ProcessInfo.processInfo.environment["MOBILEMM_RECORDING"] ?? "/")
            .appendingPathComponent(bundle)
    }

    private static let types: [String: DataType] = ["float32": .float, "int64": .long, "uint8": .byte]
    private static let sizes: [DataType: Int] = [.float: 4, .long: 8, .byte: 1]

    func metadata(_ method: String) throws -> MethodMetadata {
        if methods == nil {
            guard FileManager.default.fileExists(atPath: file.path) else { throw Unexpected(text: "there is no \(file.path)") }
            func json(_ name: String) throws -> Any {
                try JSONSerialization.jsonObject(with: try Data(contentsOf: folder.appendingPathComponent(name)))
            }
            methods = (try json("interfaces.json") as! [String: [String: [[String: Any]]]]).mapValues { sides in
                func tensors(_ side: String) -> [TensorMetadata] {
                    sides[side]!.map { TensorMetadata($0["shape"] as! [Int], Self.types[$0["dtype"] as! String]!) }
                }
                return MethodMetadata(tensors("inputs"), tensors("outputs"))
            }
            calls = try json("calls.json") as! [[String: Any]]
        }
        guard let found = methods![method] else { throw Unexpected(text: "there is no method \(method)") }
        return found
    }

    func answer(_ method: String, _ inputs: [Value], _ count: inout Int) throws -> [Value] {
        let wanted = try metadata(method).inputTensorMetadata
        let tensors = inputs.compactMap(\.anyTensor)
        guard tensors.count == wanted.count, tensors.count == inputs.count else {
            throw Unexpected(text: "\(method) takes \(wanted.count) tensors")
        }
        for (index, tensor) in tensors.enumerated() {
            let most = wanted[index]!
            // A dynamic dimension may be shorter than what the program has room for, and no other.
            let fits = tensor.shape.count == most.shape.count && zip(tensor.shape, most.shape).allSatisfy { $0 <= $1 }
            if !fits || tensor.dataType != most.dataType {
                throw Unexpected(text: "input \(index) of \(method) is of another type or shape than it takes")
            }
        }
        var candidates = calls.filter { $0["method"] as! String == method }
        if method == Self.stateful {
            guard count < candidates.count else { throw Unexpected(text: "more calls than were recorded") }
            candidates = [candidates[count]]
            count += 1
        }
        for call in candidates {
            let recorded = call["inputs"] as! [[String: Any]]
            let equal = try zip(recorded, tensors).allSatisfy { try $0["shape"] as! [Int] == $1.shape && read($0) == bytes($1) }
            if !equal { continue }
            let output = call["output"] as! [String: Any]
            return [Value(AnyTensor(try read(output), output["shape"] as! [Int], Self.types[output["dtype"] as! String]!))]
        }
        throw Unexpected(text: "no recorded call of \(method) had these inputs")
    }

    private func bytes(_ tensor: AnyTensor) -> Data {
        var found = Data()
        tensor.bytes { pointer, count, type in found = Data(bytes: pointer, count: count * Self.sizes[type]!) }
        return found
    }

    private func read(_ tensor: [String: Any]) throws -> Data {
        try Data(contentsOf: folder.appendingPathComponent(tensor["file"] as! String))
    }
}
