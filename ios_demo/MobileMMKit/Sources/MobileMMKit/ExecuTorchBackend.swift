#if canImport(ExecuTorch)
    import ExecuTorch
    import Foundation
    import Synchronization

    /// ExecuTorch bundles: one program whose methods are the parts; `vision_encoder` takes one picture a call,
    /// `token_embedding` ids alone, and `text_decoder` keeps keys and values in buffers of its own.
    ///
    /// Each part has a program of its own, so that it can be given back; the file is mapped, not read, each time.
    /// Kernels and delegates are those that the app links (README).
    public final class ExecuTorchBackend: Backend, @unchecked Sendable {
        /// The methods' names, as ExecuTorch's own multimodal runner has them; it knows none that draws.
        private static let methods = [
            "vision": "vision_encoder", "embed": "token_embedding", "decoder": "text_decoder",
        ]

        public let bundle: ModelBundle
        private var programs: [String: ExecuTorchProgram] = [:]
        private let cancelled = Atomic(false)

        public init(_ bundle: ModelBundle) {
            self.bundle = bundle
        }

        public var runtime: String { "ExecuTorch" }

        public var prefillsInPieces: Bool { true }

        public func load(_ part: String) throws { _ = try program(part) }

        public func release(_ part: String) { programs[part] = nil }

        public func run(_ part: String, _ inputs: [String: Tensor]) throws -> [String: Tensor] {
            let program = try program(part)
            let listed = bundle.manifest.parts[part]!
            let made: Tensor
            switch part {
            case "vision":
                made = try lookOneByOne(inputs["pixels"], program.file.path) { try call(program, [$0]) }
            case "embed":
                let ids = try inputs["input_ids"]?.wholeNumbers() ?? []
                made = try embedWithImages(ids, inputs["image_features"], bundle.manifest.model) { known, rows in
                    _ = rows.write(try call(program, [try Tensor(ids: known)]).toFloats().floats)
                }
            default:
                let given = try listed.inputs.map { spec in
                    guard let tensor = inputs[spec.name] else {
                        throw MobileMMError("part '\(part)' was given no \(spec.name)")
                    }
                    return tensor
                }
                made = try call(program, given)
            }
            return [listed.outputs[0].name: made]
        }

        /// Each has a program of its own: keys and values are part of it.
        public func decoder() throws -> any Decoder { ExecuTorchDecoder(self, try made("decoder")) }

        /// What runs now, one call of a method, is not interrupted; nothing comes behind it.
        public func cancel() { cancelled.store(true, ordering: .sequentiallyConsistent) }

        public func resume() { cancelled.store(false, ordering: .sequentiallyConsistent) }

        func call(_ program: ExecuTorchProgram, _ inputs: [Tensor]) throws -> Tensor {
            if cancelled.load(ordering: .sequentiallyConsistent) { throw Cancelled() }
            return try program(inputs)
        }

        private func program(_ part: String) throws -> ExecuTorchProgram {
            if let known = programs[part] { return known }
            let program = try made(part)
            programs[part] = program
            return program
        }

        private func made(_ part: String) throws -> ExecuTorchProgram {
            let (file, model) = (try bundle.partFile(part), bundle.manifest.model)
            let method = Self.methods[part] ?? part
            return try ExecuTorchProgram(file, method, bundle.manifest.parts[part]!, context: model.contextLength)
        }
    }

    /// A method of a .pte file, loaded; its mutable buffers, keys and values among them, live as long as it does.
    final class ExecuTorchProgram {
        let file: URL
        private let method: String
        private let module: Module

        /// Throws ``MobileMMError`` when ExecuTorch refuses it, or its tensors are not those of the manifest.
        init(_ file: URL, _ method: String, _ part: Part, context: Int) throws {
            (self.file, self.method) = (file, method)
            module = Module(filePath: file.path, loadMode: .mmap)
            let metadata: MethodMetadata
            do {
                try module.load(method)
                metadata = try module.methodMetadata(method)
            } catch {
                throw MobileMMError("\(file.path): method '\(method)' cannot be loaded by ExecuTorch (\(oneLine(error)))")
            }
            try check("input", metadata.inputTensorMetadata, part.inputs, context)
            try check("output", metadata.outputTensorMetadata, part.outputs, context)
        }

        /// The method's output, in memory of its own.
        func callAsFunction(_ inputs: [Tensor]) throws -> Tensor {
            do {
                let given: [any ValueConvertible] = try inputs.map { tensor in
                    guard let type = tensor.dtype.executorch else {
                        throw MobileMMError("ExecuTorch is given no tensors of \(tensor.dtype.rawValue)")
                    }
                    return AnyTensor(bytesNoCopy: tensor.memory.baseAddress!, shape: tensor.shape, dataType: type)
                }
                // The runtime reads the inputs' memory while the method runs.
                let found: [Value] = try withExtendedLifetime(inputs) { try module.execute(method, given) }
                guard found.count == 1, let output = found[0].anyTensor else {
                    throw MobileMMError("\(file.path): method '\(method)' gave no tensor")
                }
                return try Tensor(output)
            } catch let error as MobileMMError {
                throw error
            } catch {
                throw MobileMMError("\(file.path): method '\(method)' failed (\(oneLine(error)))")
            }
        }

        /// A dimension with a name goes up to the context.
        private func check(_ side: String, _ found: [Int: TensorMetadata], _ specs: [TensorSpec], _ context: Int) throws {
            func refusal(_ wrong: String) -> MobileMMError {
                MobileMMError("\(file.path): method '\(method)' \(wrong); \(ManifestReader.again)")
            }
            if found.count != specs.count {
                throw refusal("has \(found.count) \(side)s, where the manifest has \(specs.count)")
            }
            for (index, spec) in specs.enumerated() {
                let sizes = spec.shape.map { $0.size ?? context }
                guard let tensor = found[index], tensor.dataType == spec.dtype.executorch, tensor.shape == sizes else {
                    let has = found[index].map { "\($0.shape)" } ?? "no tensor"
                    throw refusal(
                        "has \(has) as \(side) \(index), where the manifest has \(shown(spec.name)), \(spec.dtype.rawValue) \(sizes)"
                    )
                }
            }
        }
    }

    /// A ``Decoder`` over the method `text_decoder`, whose keys and values are buffers of fixed length.
    final class ExecuTorchDecoder: Decoder {
        private let backend: ExecuTorchBackend
        private let program: ExecuTorchProgram
        private let takesPositions: Bool
        private(set) var length = 0

        init(_ backend: ExecuTorchBackend, _ program: ExecuTorchProgram) {
            (self.backend, self.program) = (backend, program)
            takesPositions = backend.bundle.manifest.parts["decoder"]!.inputs.contains { $0.name == "position_ids" }
        }

        func decode(_ embeds: Tensor, positions: Tensor?) throws -> Values<Float> {
            let total = length + embeds.shape[1]
            let context = backend.bundle.manifest.model.contextLength
            if total > context {
                throw MobileMMError("\(total) positions are more than this model's context of \(context)")
            }
            let start = try Tensor(.int64, [1])
            start.values(Int64.self).fill(Int64(length))
            var inputs = [try embeds.toFloats(), start]
            if takesPositions { inputs.append(try positions ?? textPositions(length..<total)) }
            let logits = try backend.call(program, inputs).toFloats()
            length = total
            return logits.floats
        }

        func truncate(_ length: Int) throws {
            precondition((0...self.length).contains(length), "a cache of \(self.length) cannot be cut to \(length)")
            self.length = length
        }
    }

    extension DType {
        fileprivate var executorch: DataType? {
            switch self {
            case .float32: .float
            case .float16: .half
            case .uint8: .byte
            case .int8: .char
            case .int32: .int
            case .int64: .long
            }
        }
    }

    extension Tensor {
        /// A copy: what a method gives lies in memory that its next call writes over.
        fileprivate convenience init(_ tensor: AnyTensor) throws {
            guard let dtype = DType.allCases.first(where: { $0.executorch == tensor.dataType }) else {
                throw MobileMMError("an output of an unknown type")
            }
            guard tensor.dimensionOrder == Array(tensor.shape.indices) else {
                throw MobileMMError("an output that does not lie row by row")
            }
            try self.init(dtype, tensor.shape)
            let target = memory
            tensor.bytes { pointer, count, _ in
                target.copyMemory(from: UnsafeRawBufferPointer(start: pointer, count: count * dtype.bytes))
            }
        }
    }
#endif
