// A stand-in for Apple's module of this name: what MobileMMKit uses of it, with the same signatures.
//
// Arrays are real. A model answers from a run that was recorded on mobilemm's reference interpreter (see Recording):
// it takes exactly the inputs that were given there, bit for bit, and in their order, and gives what came of them.

@_exported import CoreVideo
@_exported import Foundation

public enum MLComputeUnits: Int, Sendable {
    case cpuOnly = 0
    case cpuAndGPU = 1
    case all = 2
    case cpuAndNeuralEngine = 3
}

open class MLModelConfiguration: NSObject {
    open var computeUnits: MLComputeUnits = .all
    open var functionName: String?
}

public enum MLMultiArrayDataType: Int, @unchecked Sendable {
    case double = 65600
    case float32 = 65568
    case float16 = 65552
    case int32 = 131104

    var bytes: Int { rawValue & 0xFFFF == 64 ? 8 : rawValue & 0xFF == 16 ? 2 : 4 }
}

/// Its rows are padded, as those of an array in a pixel buffer are.
open class MLMultiArray: NSObject {
    public let shape: [NSNumber]
    public let strides: [NSNumber]
    public let dataType: MLMultiArrayDataType
    private let memory: UnsafeMutableRawBufferPointer

    public init(shape: [NSNumber], dataType: MLMultiArrayDataType) throws {
        (self.shape, self.dataType) = (shape, dataType)
        var strides = [1]
        for (index, size) in shape.dropFirst().reversed().enumerated() {
            strides.insert(strides[0] * (index == 0 ? (size.intValue + 31) / 32 * 32 : size.intValue), at: 0)
        }
        self.strides = strides.map { NSNumber(value: $0) }
        let count = (shape.first?.intValue ?? 1) * strides[0]
        memory = .allocate(byteCount: max(count * dataType.bytes, 1), alignment: 64)
        memory.initializeMemory(as: UInt8.self, repeating: 0x7E)
    }

    deinit {
        memory.deallocate()
    }

    public func withUnsafeBytes<R>(_ body: (UnsafeRawBufferPointer) throws -> R) rethrows -> R {
        try body(UnsafeRawBufferPointer(memory))
    }

    public func withUnsafeMutableBytes<R>(_ body: (UnsafeMutableRawBufferPointer, [Int]) throws -> R) rethrows -> R {
        try body(memory, strides.map(\.intValue))
    }
}

open class MLFeatureValue: NSObject {
    public let multiArrayValue: MLMultiArray?
    public let imageBufferValue: CVPixelBuffer?

    public init(multiArray value: MLMultiArray) {
        (multiArrayValue, imageBufferValue) = (value, nil)
    }

    public init(pixelBuffer value: CVPixelBuffer) {
        (multiArrayValue, imageBufferValue) = (nil, value)
    }
}

public protocol MLFeatureProvider {
    var featureNames: Set<String> { get }
    func featureValue(for featureName: String) -> MLFeatureValue?
}

open class MLDictionaryFeatureProvider: NSObject, MLFeatureProvider {
    private let values: [String: MLFeatureValue]

    public init(dictionary: [String: Any]) throws {
        values = dictionary.mapValues { $0 as! MLFeatureValue }
    }

    public var featureNames: Set<String> { Set(values.keys) }

    public func featureValue(for featureName: String) -> MLFeatureValue? { values[featureName] }
}

public enum MLMultiArrayShapeConstraintType: Int, @unchecked Sendable {
    case unspecified = 1
    case enumerated = 2
    case range = 3
}

open class MLMultiArrayShapeConstraint: NSObject {
    public let type: MLMultiArrayShapeConstraintType
    public let sizeRangeForDimension: [NSValue]

    init(_ type: MLMultiArrayShapeConstraintType, _ ranges: [NSRange]) {
        (self.type, sizeRangeForDimension) = (type, ranges.map { NSValue(range: $0) })
    }
}

open class MLMultiArrayConstraint: NSObject {
    public let shape: [NSNumber]
    public let dataType: MLMultiArrayDataType
    public let shapeConstraint: MLMultiArrayShapeConstraint

    init(_ shape: [Int], _ dataType: MLMultiArrayDataType, _ ranges: [NSRange]?) {
        (self.shape, self.dataType) = (shape.map { NSNumber(value: $0) }, dataType)
        shapeConstraint = MLMultiArrayShapeConstraint(ranges == nil ? .unspecified : .range, ranges ?? [])
    }

    func takes(_ array: MLMultiArray) -> Bool {
        let given = array.shape.map(\.intValue)
        let ranges = shapeConstraint.sizeRangeForDimension.map(\.rangeValue)
        let allowed = ranges.isEmpty ? shape.map { NSRange(location: $0.intValue, length: 1) } : ranges
        return array.dataType == dataType && given.count == allowed.count
            && zip(given, allowed).allSatisfy { $0 >= $1.location && $0 < $1.location + $1.length }
    }
}

open class MLImageConstraint: NSObject {
    public let pixelsHigh: Int
    public let pixelsWide: Int

    init(_ high: Int, _ wide: Int) {
        (pixelsHigh, pixelsWide) = (high, wide)
    }
}

open class MLFeatureDescription: NSObject {
    public let name: String
    public let multiArrayConstraint: MLMultiArrayConstraint?
    public let imageConstraint: MLImageConstraint?

    init(_ name: String, _ array: MLMultiArrayConstraint?, _ image: MLImageConstraint?) {
        (self.name, multiArrayConstraint, imageConstraint) = (name, array, image)
    }
}

open class MLModelDescription: NSObject {
    public let inputDescriptionsByName: [String: MLFeatureDescription]
    public let outputDescriptionsByName: [String: MLFeatureDescription]
    public let stateDescriptionsByName: [String: MLFeatureDescription]

    init(_ inputs: [MLFeatureDescription], _ outputs: [MLFeatureDescription], _ states: [MLFeatureDescription]) {
        func byName(_ some: [MLFeatureDescription]) -> [String: MLFeatureDescription] {
            Dictionary(uniqueKeysWithValues: some.map { ($0.name, $0) })
        }
        (inputDescriptionsByName, outputDescriptionsByName) = (byName(inputs), byName(outputs))
        stateDescriptionsByName = byName(states)
    }
}

/// A conversation's keys and values: here how many calls of the recorded run have changed them.
public final class MLState {
    var calls = 0
}

open class MLModelAsset: NSObject {
    private let recording: Recording

    public init(url compiledModelURL: URL) throws {
        recording = try Recording.of(compiledModelURL)
    }

    public var functionNames: [String] { get async throws { recording.functions.map(\.name) } }
}

open class MLModel: NSObject {
    private let recording: Recording
    private let function: Recording.Function

    public init(contentsOf url: URL, configuration: MLModelConfiguration) throws {
        recording = try Recording.of(url)
        function = try recording.function(configuration.functionName)
    }

    public class func compileModel(at modelURL: URL) async throws -> URL { try Recording.compile(modelURL) }

    public var modelDescription: MLModelDescription { function.description }

    public func makeState() -> MLState { MLState() }

    public func prediction(from input: any MLFeatureProvider) throws -> any MLFeatureProvider {
        try recording.answer(function, input, nil)
    }

    public func prediction(from inputFeatures: any MLFeatureProvider, using state: MLState) throws -> any MLFeatureProvider {
        try recording.answer(function, inputFeatures, state)
    }
}

public enum MLComputeDevice {
    case cpu(MLCPUComputeDevice)
    case gpu(MLGPUComputeDevice)
    case neuralEngine(MLNeuralEngineComputeDevice)
}

open class MLCPUComputeDevice: NSObject {}
open class MLGPUComputeDevice: NSObject {}
open class MLNeuralEngineComputeDevice: NSObject {}

public enum MLModelStructure {
    public struct Program {
        public struct Operation {
            public let operatorName: String
            public let blocks: [Block]
        }

        public struct Block {
            public let operations: [Operation]
        }

        public struct Function {
            public let block: Block
        }

        public let functions: [String: Function]
    }

    case program(Program)
    case unsupported
}

public final class MLComputePlan {
    public struct DeviceUsage {
        public let supported: [MLComputeDevice]
        public let preferred: MLComputeDevice
    }

    public let modelStructure: MLModelStructure

    private init(_ recording: Recording) {
        // The reference interpreter has one processor.
        let functions = recording.functions.map { function in
            let operations = function.operations.map { MLModelStructure.Program.Operation(operatorName: $0, blocks: []) }
            return (function.name, MLModelStructure.Program.Function(block: .init(operations: operations)))
        }
        modelStructure = .program(.init(functions: Dictionary(uniqueKeysWithValues: functions)))
    }

    public class func load(contentsOf url: URL, configuration: MLModelConfiguration) async throws -> MLComputePlan {
        MLComputePlan(try Recording.of(url))
    }

    public func deviceUsage(for operation: MLModelStructure.Program.Operation) -> DeviceUsage? {
        let device = MLComputeDevice.cpu(MLCPUComputeDevice())
        return operation.operatorName == "const" ? nil : DeviceUsage(supported: [device], preferred: device)
    }
}
