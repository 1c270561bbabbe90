// A stand-in for ExecuTorch's module of this name: what MobileMMKit uses of it, with the same signatures, and what of the
// rest could be mistaken for it.
//
// A program answers from a run that was recorded on the real runtime (see Recording): a method with buffers takes the
// calls that were recorded, bit by bit and in their order, another any of them.

import Foundation

public enum DataType: Int8, Sendable {
    case byte, char, short, int, long, half, float, double
}

public enum ShapeDynamism: UInt8, Sendable {
    case dynamicBound, `static`, dynamicUnbound
}

public enum ModuleLoadMode: Int, Sendable {
    case file, mmap, mmapUseMlock, mmapUseMlockIgnoreErrors
}

public protocol Scalar {
    static var dataType: DataType { get }
}

extension Float: Scalar {
    public static var dataType: DataType { .float }
}

public protocol ValueConvertible {
    func asValue() -> Value
}

public protocol ValueSequenceConstructible {
    static func from(_ values: [Value]) throws -> Self
}

public final class AnyTensor: NSObject, ValueConvertible, ValueSequenceConstructible {
    public let shape: [Int]
    public let dataType: DataType
    private let pointer: UnsafeMutableRawPointer
    /// Where the memory is its own.
    private let data: NSMutableData?

    public init(
        bytesNoCopy pointer: UnsafeMutableRawPointer, shape: [Int], strides: [Int] = [], dimensionOrder: [Int] = [],
        dataType: DataType, shapeDynamism: ShapeDynamism = .dynamicBound
    ) {
        (self.pointer, self.shape, self.dataType, data) = (pointer, shape, dataType, nil)
    }

    init(_ data: Data, _ shape: [Int], _ dataType: DataType) {
        let own = NSMutableData(data: data)
        (pointer, self.shape, self.dataType, self.data) = (own.mutableBytes, shape, dataType, own)
    }

    public var dimensionOrder: [Int] { Array(shape.indices) }
    public var count: Int { shape.reduce(1, *) }

    public func bytes(_ handler: (UnsafeRawPointer, Int, DataType) -> Void) { handler(pointer, count, dataType) }

    public func asValue() -> Value { Value(self) }

    public static func from(_ values: [Value]) throws -> AnyTensor { values[0].anyTensor! }
}

public final class Tensor<T: Scalar> {
    public let anyTensor: AnyTensor

    public init(_ tensor: AnyTensor) {
        anyTensor = tensor
    }
}

public final class Value: NSObject, ValueConvertible {
    public let anyTensor: AnyTensor?

    public init(_ tensor: AnyTensor) {
        anyTensor = tensor
    }

    public var isTensor: Bool { anyTensor != nil }

    public func asValue() -> Value { self }
}

public final class TensorMetadata: NSObject {
    public let shape: [Int]
    public let dataType: DataType

    init(_ shape: [Int], _ dataType: DataType) {
        (self.shape, self.dataType) = (shape, dataType)
    }
}

public final class MethodMetadata: NSObject {
    public let inputTensorMetadata: [Int: TensorMetadata]
    public let outputTensorMetadata: [Int: TensorMetadata]

    init(_ inputs: [TensorMetadata], _ outputs: [TensorMetadata]) {
        func indexed(_ some: [TensorMetadata]) -> [Int: TensorMetadata] {
            Dictionary(uniqueKeysWithValues: some.enumerated().map { ($0.offset, $0.element) })
        }
        (inputTensorMetadata, outputTensorMetadata) = (indexed(inputs), indexed(outputs))
    }
}

open class Module: NSObject {
    private let recording: Recording
    private var loaded: Set<String> = []
    /// How many calls of the recorded run have changed the buffers.
    private var calls = 0

    public init(filePath: String, loadMode: ModuleLoadMode) {
        recording = Recording(filePath)
    }

    public convenience init(filePath: String) {
        self.init(filePath: filePath, loadMode: .file)
    }

    open func load(_ methodName: String) throws {
        _ = try recording.metadata(methodName)
        loaded.insert(methodName)
    }

    open func isLoaded(_ methodName: String) -> Bool { loaded.contains(methodName) }

    open func methodMetadata(_ methodName: String) throws -> MethodMetadata { try recording.metadata(methodName) }
}

extension Module {
    public func execute(_ method: String, _ inputs: [ValueConvertible]) throws -> [Value] {
        if !isLoaded(method) { try load(method) }
        return try recording.answer(method, inputs.map { $0.asValue() }, &calls)
    }

    public func execute(_ method: String, _ inputs: ValueConvertible...) throws -> [Value] { try execute(method, inputs) }

    public func execute<Output: ValueSequenceConstructible>(_ method: String, _ inputs: [ValueConvertible]) throws -> Output {
        try Output.from(try execute(method, inputs) as [Value])
    }
}
