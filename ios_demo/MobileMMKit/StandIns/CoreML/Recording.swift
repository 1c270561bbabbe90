import CoreVideo
import Foundation

/// A run of a package that Python has recorded (`python -m tests.ios.recording`), beside what its specification says.
///
/// `MOBILEMM_RECORDING` names a folder with one of the bundle's name: `interfaces.json`, `calls.json`, and the tensors'
/// bytes.
final class Recording {
    struct Function {
        let name: String
        let description: MLModelDescription
        let operations: [String]
    }

    /// What a model says to inputs that the recorded run did not have.
    struct Unexpected: LocalizedError {
        let text: String
        var errorDescription: String? { text }
    }

    let functions: [Function]
    private let part: String
    private let calls: [[String: Any]]
    private let folder: URL

    static func of(_ compiled: URL) throws -> Recording {
        let lines = try String(contentsOf: compiled, encoding: .utf8).split(separator: "\n").map(String.init)
        return try Recording(lines[0], lines[1])
    }

    /// "Compiles" a package: a file with the names of the bundle and of the part.
    static func compile(_ package: URL) throws -> URL {
        guard FileManager.default.fileExists(atPath: package.path) else {
            throw Unexpected(text: "there is no \(package.path)")
        }
        let made = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID()).mlmodelc")
        let bundle = package.deletingLastPathComponent().deletingLastPathComponent().lastPathComponent
        try Data("\(bundle)\n\(package.deletingPathExtension().lastPathComponent)".utf8).write(to: made)
        return made
    }

    private init(_ bundle: String, _ part: String) throws {
        self.part = part
        guard let path = ProcessInfo.processInfo.environment["MOBILEMM_RECORDING"] else {
            throw Unexpected(text: "MOBILEMM_RECORDING is not set")
        }
        let folder = URL(fileURLWithPath: path).appendingPathComponent(bundle)
        self.folder = folder
        func json(_ name: String) throws -> Any {
            try JSONSerialization.jsonObject(with: try Data(contentsOf: folder.appendingPathComponent(name)))
        }
        let interfaces = try json("interfaces.json") as! [String: [[String: Any]]]
        guard let found = interfaces[part] else { throw Unexpected(text: "no part \(part) was recorded") }
        functions = found.map { function in
            func features(_ side: String) -> [MLFeatureDescription] {
                (function[side] as! [[String: Any]]).map(Self.feature)
            }
            return Function(
                name: function["name"] as! String,
                description: MLModelDescription(features("inputs"), features("outputs"), features("states")),
                operations: function["operations"] as! [String])
        }
        calls = (try json("calls.json") as! [[String: Any]]).filter { $0["part"] as! String == part }
    }

    private static let types: [String: MLMultiArrayDataType] = ["float16": .float16, "float32": .float32, "int32": .int32]

    private static func feature(_ of: [String: Any]) -> MLFeatureDescription {
        let name = of["name"] as! String
        let shape = of["shape"] as! [Int]
        if of["image"] as! Bool { return MLFeatureDescription(name, nil, MLImageConstraint(shape[2], shape[3])) }
        let ranges = (of["ranges"] as? [[Int]])?.map { NSRange(location: $0[0], length: $0[1] - $0[0] + 1) }
        let type = types[of["dtype"] as! String]!
        return MLFeatureDescription(name, MLMultiArrayConstraint(shape, type, ranges), nil)
    }

    func function(_ name: String?) throws -> Function {
        guard let name else { return functions[0] }
        guard let found = functions.first(where: { $0.name == name }) else {
            throw Unexpected(text: "there is no function \(name)")
        }
        return found
    }

    /// With a state the calls must come as they were recorded; without one, any of them may.
    func answer(_ function: Function, _ input: any MLFeatureProvider, _ state: MLState?) throws -> any MLFeatureProvider {
        try check(function, input, state)
        let given = Dictionary(uniqueKeysWithValues: try input.featureNames.map { ($0, try bytes(input.featureValue(for: $0)!)) })
        var candidates = calls
        if let state {
            guard state.calls < calls.count else { throw Unexpected(text: "more calls than were recorded") }
            candidates = [calls[state.calls]]
            state.calls += 1
        }
        let place = state.map { "call \($0.calls - 1) of \(part)" } ?? part
        for call in candidates {
            if let name = call["function"] as? String, name != function.name {
                if state != nil { throw Unexpected(text: "\(place) is of \(name), not \(function.name)") }
                continue
            }
            let wanted = call["inputs"] as! [String: [String: Any]]
            let wrong = try Set(wanted.keys).union(given.keys).sorted().first { name in
                try wanted[name].map { try read($0) } != given[name]
            }
            if let wrong {
                if state != nil { throw Unexpected(text: "\(place): input \(wrong) is not what was recorded") }
                continue
            }
            return try MLDictionaryFeatureProvider(dictionary: try (call["outputs"] as! [String: [String: Any]]).mapValues(value))
        }
        throw Unexpected(text: "\(place): no recorded call had these inputs")
    }

    /// Names, types and shapes as the specification has them, and a state where it has states.
    private func check(_ function: Function, _ input: any MLFeatureProvider, _ state: MLState?) throws {
        let wanted = function.description.inputDescriptionsByName
        if input.featureNames != Set(wanted.keys) {
            throw Unexpected(text: "\(function.name) of \(part) takes \(wanted.keys.sorted()), not \(input.featureNames.sorted())")
        }
        if function.description.stateDescriptionsByName.isEmpty != (state == nil) {
            throw Unexpected(text: "\(function.name) of \(part) was given \(state == nil ? "no state" : "a state")")
        }
        for (name, feature) in wanted {
            let value = input.featureValue(for: name)!
            let fits =
                if let image = feature.imageConstraint {
                    value.imageBufferValue.map { ($0.height, $0.width) == (image.pixelsHigh, image.pixelsWide) } ?? false
                } else {
                    value.multiArrayValue.map { feature.multiArrayConstraint!.takes($0) } ?? false
                }
            if !fits { throw Unexpected(text: "\(name) of \(part) is of another type or shape than it takes") }
        }
    }

    private func read(_ tensor: [String: Any]) throws -> Data {
        try Data(contentsOf: folder.appendingPathComponent(tensor["file"] as! String))
    }

    /// A tensor's numbers without its padding; a picture's as (3, height, width).
    private func bytes(_ value: MLFeatureValue) throws -> Data {
        if let image = value.imageBufferValue {
            var planes = Data()
            for channel in 0..<3 {
                for y in 0..<image.height {
                    for x in 0..<image.width { planes.append(image.memory[y * image.bytesPerRow + 4 * x + 2 - channel]) }
                }
            }
            return planes
        }
        let array = value.multiArrayValue!
        var found = Data()
        array.withUnsafeBytes { memory in
            Self.rows(array) { found.append(contentsOf: memory[$0]) }
        }
        return found
    }

    private func value(_ tensor: [String: Any]) throws -> MLFeatureValue {
        let shape = (tensor["shape"] as! [Int]).map { NSNumber(value: $0) }
        let array = try MLMultiArray(shape: shape, dataType: Self.types[tensor["dtype"] as! String]!)
        let data = try read(tensor)
        array.withUnsafeMutableBytes { memory, _ in
            var at = 0
            Self.rows(array) { place in
                data.copyBytes(to: UnsafeMutableRawBufferPointer(rebasing: memory[place]), from: at..<at + place.count)
                at += place.count
            }
        }
        return MLFeatureValue(multiArray: array)
    }

    /// Where each row of an array lies, in bytes.
    private static func rows(_ array: MLMultiArray, _ each: (Range<Int>) -> Void) {
        let (shape, strides) = (array.shape.map(\.intValue), array.strides.map(\.intValue))
        let row = shape.last ?? 1
        for outer in 0..<shape.dropLast().reduce(1, *) {
            var (rest, start) = (outer, 0)
            for axis in shape.indices.dropLast().reversed() {
                start += rest % shape[axis] * strides[axis]
                rest /= shape[axis]
            }
            each(start * array.dataType.bytes..<(start + row) * array.dataType.bytes)
        }
    }
}
