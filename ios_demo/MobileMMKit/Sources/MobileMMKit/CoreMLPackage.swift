#if canImport(CoreML)
    import CoreML
    import CoreVideo
    import Foundation

    /// A compiled package: one MLModel for each of its functions; a state of one serves all of them.
    final class CoreMLPackage {
        let file: URL
        private let compiled: URL
        private let part: Part
        private let units: MLComputeUnits
        private var models: [String?: MLModel] = [:]

        init(_ compiled: URL, _ file: URL, _ part: Part, _ units: MLComputeUnits) {
            (self.compiled, self.file, self.part, self.units) = (compiled, file, part, units)
        }

        /// Throws ``MobileMMError`` when Core ML refuses it, or its tensors are not those of the manifest.
        func load(_ function: String?) throws { _ = try model(function) }

        /// The least and the largest size of each dimension of an input.
        func sizes(_ function: String?, _ name: String) throws -> [ClosedRange<Int>] {
            guard let constraint = try model(function).modelDescription.inputDescriptionsByName[name]?.multiArrayConstraint
            else { throw MobileMMError("\(file.path): has no input \(name)") }
            return constraint.sizes
        }

        func hasInput(_ function: String?, _ name: String) throws -> Bool {
            try model(function).modelDescription.inputDescriptionsByName[name] != nil
        }

        func makeState(_ function: String?) throws -> MLState { try model(function).makeState() }

        /// Runs a function, the only one when nil: its outputs by name.
        func run(_ inputs: [String: Tensor], _ function: String?, _ state: MLState?) throws -> [String: Tensor] {
            let model = try model(function)
            do {
                let known = model.modelDescription.inputDescriptionsByName
                var values: [String: MLFeatureValue] = [:]
                for (name, tensor) in inputs {
                    if tensor.dtype == .uint8 {
                        values[name] = MLFeatureValue(pixelBuffer: try tensor.pixelBuffer())
                    } else {
                        let wanted = known[name]?.multiArrayConstraint?.dataType.dtype
                        values[name] = MLFeatureValue(multiArray: try tensor.asFloats(wanted).multiArray())
                    }
                }
                let given = try MLDictionaryFeatureProvider(dictionary: values)
                let found: any MLFeatureProvider
                if let state {
                    found = try model.prediction(from: given, using: state)
                } else {
                    found = try model.prediction(from: given)
                }
                var outputs: [String: Tensor] = [:]
                for name in found.featureNames {
                    if let array = found.featureValue(for: name)?.multiArrayValue { outputs[name] = try Tensor(array) }
                }
                return outputs
            } catch let error as MobileMMError {
                throw error
            } catch {
                throw MobileMMError("\(file.path): Core ML failed (\(oneLine(error)))")
            }
        }

        private func model(_ function: String?) throws -> MLModel {
            if let known = models[function] { return known }
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units
            configuration.functionName = function
            let made: MLModel
            do {
                made = try MLModel(contentsOf: compiled, configuration: configuration)
            } catch {
                throw MobileMMError("\(file.path): cannot be loaded by Core ML (\(oneLine(error)))")
            }
            try checkInterface(made.modelDescription)
            models[function] = made
            return made
        }

        /// Inputs and outputs as the manifest has them; one that only some functions take may be missing.
        private func checkInterface(_ description: MLModelDescription) throws {
            for (side, specs, found) in [
                ("input", part.inputs, description.inputDescriptionsByName),
                ("output", part.outputs, description.outputDescriptionsByName),
            ] {
                for name in found.keys.sorted() where !specs.contains(where: { $0.name == name }) {
                    throw MobileMMError(
                        "\(file.path): \(side) \(shown(name)) is not in the manifest; \(ManifestReader.again)")
                }
                for spec in specs {
                    guard let feature = found[spec.name] else {
                        if side == "input" && spec.name == "last_index" { continue }
                        throw MobileMMError(
                            "\(file.path): \(side) \(shown(spec.name)) is not in the package; \(ManifestReader.again)")
                    }
                    if let wrong = mismatch(spec, feature) {
                        throw MobileMMError(
                            "\(file.path): \(side) \(shown(spec.name)) \(wrong); \(ManifestReader.again)")
                    }
                }
            }
        }

        private func mismatch(_ spec: TensorSpec, _ feature: MLFeatureDescription) -> String? {
            if let image = feature.imageConstraint {
                let wanted: [Dimension] = [.fixed(1), .fixed(3), .fixed(image.pixelsHigh), .fixed(image.pixelsWide)]
                return spec.dtype == .uint8 && spec.shape == wanted
                    ? nil : "is a picture of \(image.pixelsWide)×\(image.pixelsHigh); the manifest says otherwise"
            }
            guard let constraint = feature.multiArrayConstraint else { return "is no tensor" }
            if constraint.dataType.dtype != spec.dtype { return "is not \(spec.dtype.rawValue), as the manifest says" }
            // An output's shape may be known only when it has run.
            if constraint.shape.isEmpty { return nil }
            let sizes = constraint.sizes
            let fits =
                sizes.count == spec.shape.count
                && zip(sizes, spec.shape).allSatisfy { range, wanted in
                    wanted.size.map { range == $0...$0 } ?? true
                }
            return fits ? nil : "has the shape \(sizes); the manifest says \(spec.shape)"
        }
    }

    extension MLMultiArrayDataType {
        fileprivate var dtype: DType? {
            switch self {
            case .float32: .float32
            case .float16: .float16
            case .int32: .int32
            default: nil
            }
        }
    }

    extension MLMultiArrayConstraint {
        /// The least and the largest size of each dimension.
        fileprivate var sizes: [ClosedRange<Int>] {
            if shapeConstraint.type == .range {
                return shapeConstraint.sizeRangeForDimension.map { value in
                    let range = value.rangeValue
                    return range.location...range.location + max(range.length, 1) - 1
                }
            }
            return shape.map { $0.intValue...$0.intValue }
        }
    }

    extension Tensor {
        /// The numbers in memory that Core ML has laid out, row by row whatever its strides are.
        fileprivate convenience init(_ array: MLMultiArray) throws {
            guard let dtype = array.dataType.dtype else { throw MobileMMError("an output of an unknown type") }
            let shape = array.shape.map(\.intValue)
            let strides = array.strides.map(\.intValue)
            try self.init(dtype, shape)
            let row = shape.last ?? 1
            array.withUnsafeBytes { source in
                for outer in 0..<(row == 0 ? 0 : count / row) {
                    var (rest, from) = (outer, 0)
                    for axis in shape.indices.dropLast().reversed() {
                        from += rest % shape[axis] * strides[axis]
                        rest /= shape[axis]
                    }
                    let target = memory.baseAddress! + outer * row * dtype.bytes
                    if strides.last ?? 1 == 1 {
                        target.copyMemory(from: source.baseAddress! + from * dtype.bytes, byteCount: row * dtype.bytes)
                    } else {
                        for index in 0..<row {
                            (target + index * dtype.bytes).copyMemory(
                                from: source.baseAddress! + (from + index * strides.last!) * dtype.bytes,
                                byteCount: dtype.bytes)
                        }
                    }
                }
            }
        }

        /// Floating-point numbers in that precision; others as they are.
        fileprivate func asFloats(_ wanted: DType?) throws -> Tensor {
            switch (dtype, wanted) {
            case (.float32, .float16): try toHalves()
            case (.float16, .float32): try toFloats()
            default: self
            }
        }

        /// A copy in Core ML's own memory.
        fileprivate func multiArray() throws -> MLMultiArray {
            let type: MLMultiArrayDataType
            switch dtype {
            case .float32: type = .float32
            case .float16: type = .float16
            case .int32: type = .int32
            default: throw MobileMMError("Core ML takes no tensors of \(dtype.rawValue)")
            }
            let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: type)
            array.withUnsafeMutableBytes { target, strides in
                let row = shape.last ?? 1
                for outer in 0..<(row == 0 ? 0 : count / row) {
                    var (rest, to) = (outer, 0)
                    for axis in shape.indices.dropLast().reversed() {
                        to += rest % shape[axis] * strides[axis]
                        rest /= shape[axis]
                    }
                    (target.baseAddress! + to * dtype.bytes).copyMemory(
                        from: memory.baseAddress! + outer * row * dtype.bytes, byteCount: row * dtype.bytes)
                }
            }
            return array
        }

        /// A picture of uint8 (1, 3, height, width) as the system has pictures: blue, green, red, alpha.
        fileprivate func pixelBuffer() throws -> CVPixelBuffer {
            let (height, width) = (shape[2], shape[3])
            var made: CVPixelBuffer?
            let status = CVPixelBufferCreate(nil, width, height, kCVPixelFormatType_32BGRA, nil, &made)
            guard status == kCVReturnSuccess, let made else {
                throw MobileMMError("no memory for a picture of \(width)×\(height)")
            }
            CVPixelBufferLockBaseAddress(made, [])
            defer { CVPixelBufferUnlockBaseAddress(made, []) }
            let start = CVPixelBufferGetBaseAddress(made)!
            let bytesPerRow = CVPixelBufferGetBytesPerRow(made)
            let (plane, source) = (width * height, memory.bindMemory(to: UInt8.self))
            for y in 0..<height {
                let row = (start + y * bytesPerRow).assumingMemoryBound(to: UInt8.self)
                for x in 0..<width {
                    for channel in 0..<3 { row[4 * x + 2 - channel] = source[channel * plane + y * width + x] }
                    row[4 * x + 3] = 255
                }
            }
            return made
        }
    }
#endif
