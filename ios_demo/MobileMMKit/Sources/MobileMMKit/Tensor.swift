import Foundation

/// What a tensor's numbers are, by their names in the manifest.
public enum DType: String, CaseIterable, Sendable {
    case float32, float16, uint8, int8, int32, int64

    public var bytes: Int {
        switch self {
        case .float32, .int32: 4
        case .float16: 2
        case .uint8, .int8: 1
        case .int64: 8
        }
    }
}

/// Numbers in memory that a runtime reads and writes where they are, row by row in the machine's byte order.
///
/// Whoever holds a tensor may write into it: it belongs to one session at a time.
public final class Tensor: @unchecked Sendable {
    public let dtype: DType
    public let shape: [Int]
    public let memory: UnsafeMutableRawBufferPointer

    /// Zeros. Throws ``MobileMMError`` for more bytes than there are numbers for.
    public init(_ dtype: DType, _ shape: [Int]) throws {
        var bytes = dtype.bytes
        for size in shape {
            let (product, overflows) = bytes.multipliedReportingOverflow(by: size)
            if overflows || size < 0 || product > Int(Int32.max) {
                throw MobileMMError("a tensor of \(shape) \(dtype.rawValue) is too large")
            }
            bytes = product
        }
        (self.dtype, self.shape) = (dtype, shape)
        memory = .allocate(byteCount: max(bytes, 1), alignment: 64)
        memory.initializeMemory(as: UInt8.self, repeating: 0)
    }

    deinit {
        memory.deallocate()
    }

    public convenience init(ids: [Int]) throws {
        try self.init(.int64, [1, ids.count])
        let values = values(Int64.self)
        for (index, id) in ids.enumerated() { values[index] = Int64(id) }
    }

    public var count: Int { shape.reduce(1, *) }

    /// The numbers in place. `Element` must be of the tensor's own size.
    public func values<Element>(_: Element.Type) -> Values<Element> {
        precondition(MemoryLayout<Element>.size == dtype.bytes, "a tensor of \(dtype.rawValue)")
        return Values(tensor: self)
    }

    /// Of a tensor of float32.
    public var floats: Values<Float> {
        precondition(dtype == .float32, "a tensor of \(dtype.rawValue)")
        return values(Float.self)
    }

    /// Places `range` of one axis; the whole is itself.
    func slice(axis: Int, _ range: Range<Int>) throws -> Tensor {
        if range == 0..<shape[axis] { return self }
        var sizes = shape
        sizes[axis] = range.count
        let found = try Tensor(dtype, sizes)
        let inner = shape[(axis + 1)...].reduce(dtype.bytes, *)
        let piece = range.count * inner
        for outer in 0..<shape[..<axis].reduce(1, *) {
            let from = memory.baseAddress! + (outer * shape[axis] + range.lowerBound) * inner
            (found.memory.baseAddress! + outer * piece).copyMemory(from: from, byteCount: piece)
        }
        return found
    }
}

/// A tensor's numbers in place; they keep it alive.
public struct Values<Element>: RandomAccessCollection {
    private let tensor: Tensor
    private let memory: UnsafeMutableBufferPointer<Element>

    fileprivate init(tensor: Tensor) {
        self.tensor = tensor
        let start = tensor.memory.baseAddress!.assumingMemoryBound(to: Element.self)
        memory = UnsafeMutableBufferPointer(start: start, count: tensor.count)
    }

    public var startIndex: Int { 0 }
    public var endIndex: Int { memory.count }

    public subscript(index: Int) -> Element {
        get { memory[index] }
        nonmutating set { memory[index] = newValue }
    }

    public func withContiguousStorageIfAvailable<R>(_ body: (UnsafeBufferPointer<Element>) throws -> R) rethrows -> R? {
        try withExtendedLifetime(tensor) { try body(UnsafeBufferPointer(memory)) }
    }

    func fill(_ value: Element) { memory.update(repeating: value) }

    /// Writes them from `start` on; the place behind the last.
    func write(_ values: some Sequence<Element>, from start: Int = 0) -> Int {
        var at = start
        for value in values {
            memory[at] = value
            at += 1
        }
        return at
    }
}

extension Tensor {
    /// A tensor of float32 with these numbers.
    convenience init(floats: [Float], _ shape: [Int]) throws {
        try self.init(.float32, shape)
        precondition(floats.count == count, "\(floats.count) numbers for a shape of \(shape)")
        _ = self.floats.write(floats)
    }

    /// The same numbers in float32; itself where it has them.
    func toFloats() throws -> Tensor {
        if dtype == .float32 { return self }
        let found = try Tensor(.float32, shape)
        let target = found.floats
        switch dtype {
        case .float16:
            let source = values(UInt16.self)
            for index in 0..<count { target[index] = float(half: source[index]) }
        case .int64: for (index, value) in values(Int64.self).enumerated() { target[index] = Float(value) }
        case .int32: for (index, value) in values(Int32.self).enumerated() { target[index] = Float(value) }
        case .int8: for (index, value) in values(Int8.self).enumerated() { target[index] = Float(value) }
        case .uint8: for (index, value) in values(UInt8.self).enumerated() { target[index] = Float(value) }
        case .float32: break
        }
        return found
    }

    /// Numbers of float32 as float16, rounded to the nearest, ties to even.
    func toHalves() throws -> Tensor {
        if dtype == .float16 { return self }
        let found = try Tensor(.float16, shape)
        let (source, target) = (floats, found.values(UInt16.self))
        for index in 0..<count { target[index] = half(source[index]) }
        return found
    }
}

// Swift's own Float16 is missing on Macs of Intel's. Source: IEEE 754-2019, sections 3.4 and 4.3.1.

func float(half bits: UInt16) -> Float {
    let sign: Float = bits & 0x8000 == 0 ? 1 : -1
    let (exponent, fraction) = (Int(bits >> 10 & 0x1F), Float(bits & 0x3FF))
    switch exponent {
    case 0: return sign * fraction * 0x1p-24
    case 31: return fraction == 0 ? sign * .infinity : .nan
    default: return sign * Float(sign: .plus, exponent: exponent - 25, significand: 1024 + fraction)
    }
}

func half(_ value: Float) -> UInt16 {
    let sign: UInt16 = value.sign == .minus ? 0x8000 : 0
    let magnitude = value.magnitude
    if value.isNaN { return sign | 0x7E00 }
    if magnitude >= 65520 { return sign | 0x7C00 }
    // Subnormal numbers are whole multiples of 2⁻²⁴, others have eleven bits.
    let exponent = max(magnitude == 0 ? -14 : Int(magnitude.exponent), -14)
    let units = (magnitude * Float(sign: .plus, exponent: 10 - exponent, significand: 1)).rounded(.toNearestOrEven)
    // A carry out of the fraction goes into the exponent, as it should.
    return sign | UInt16(Int(units) + (exponent + 14) << 10)
}
