#if canImport(COnnxRuntime)
    import Foundation

    /// A ``Decoder`` on ONNX Runtime: one conversation's keys and values.
    ///
    /// A graph whose attention writes into the buffers that it reads from gets each buffer as input and as output, and
    /// the length of `attention_mask` says how much of them counts; they are copied into buffers twice as long when
    /// they are full. Of a graph that concatenates, each step's outputs are the next step's inputs. A long prompt goes
    /// in chunks: what a step needs beside the cache stays small, and a stop need not wait.
    final class OnnxDecoder: Decoder {
        /// Positions that a cache has room for at first; it doubles when it is full.
        private static let firstLength = 1024
        /// Positions of a prompt that are run at once.
        private static let chunk = 512

        private let backend: OnnxBackend
        private let session: OnnxSession
        private let model: ModelCard
        private let concatenated: Bool
        private let past: [String]
        private let present: [String]
        private let cacheType: DType
        private let takesPositions: Bool

        private var inputs: [String: OnnxValue] = [:]
        /// Outputs that have their place, and nil for those that get one at each run.
        private var outputs: [String: OnnxValue?] = [:]
        /// Where keys and values are, in the order of `past`.
        private var caches: [Tensor] = []
        private var capacity = 0
        private var mask: Tensor
        private let logits: Tensor
        /// Whether the graph gives the last position's logits alone, and writes them into `logits`.
        private let writesLogits: Bool

        private(set) var length = 0

        init(_ backend: OnnxBackend, _ session: OnnxSession) throws {
            (self.backend, self.session) = (backend, session)
            model = backend.bundle.manifest.model
            let part = backend.bundle.manifest.parts["decoder"]!
            concatenated = part.cache == "concatenated"
            past = cacheNames("past_key_values.", model.numLayers)
            present = cacheNames("present.", model.numLayers)
            cacheType = part.inputs.first { [past] in $0.name == past[0] }!.dtype
            takesPositions = part.inputs.contains { $0.name == "position_ids" }
            mask = try Self.ones(0)
            logits = try Tensor(.float32, [1, 1, model.vocabSize])
            let spec = part.outputs.first { $0.name == "logits" }!
            writesLogits = !concatenated && spec.dtype == .float32 && spec.shape[1] == .fixed(1)
            let file = try backend.bundle.partFile("decoder")
            let missing =
                Set(["inputs_embeds", "attention_mask"]).subtracting(session.inputs.map(\.name))
                .union(Set(["logits"] + present).subtracting(session.outputs.map(\.name)))
            if !missing.isEmpty {
                throw MobileMMError("\(file.path): not a decoder, it lacks \(missing.sorted().joined(separator: ", "))")
            }
            let embedsType = part.inputs.first { $0.name == "inputs_embeds" }!.dtype
            if embedsType != .float32 { throw MobileMMError("\(file.path): takes \(embedsType.rawValue), unknown here") }
            try backend.guarded("decoder") {
                outputs["logits"] = .some(writesLogits ? try OnnxValue(logits, backend.library) : nil)
                if concatenated { for name in session.outputs.map(\.name) { outputs[name] = .some(nil) } }
                try bind(try past.map { _ in try cache(0) })
            }
        }

        func decode(_ embeds: Tensor, positions: Tensor?) throws -> Values<Float> {
            let count = embeds.shape[1]
            let before = length
            if before + count > model.contextLength {
                throw MobileMMError(
                    "\(before + count) positions are more than this model's context of \(model.contextLength)")
            }
            do {
                for start in stride(from: 0, to: count, by: Self.chunk) {
                    let range = start..<min(start + Self.chunk, count)
                    try run(try embeds.slice(axis: 1, range), try positions?.slice(axis: 2, range))
                }
                return logits.floats
            } catch {
                if concatenated && length != before { try truncate(before) } else { length = before }
                throw error
            }
        }

        private func run(_ embeds: Tensor, _ positions: Tensor?) throws {
            let count = embeds.shape[1]
            let total = length + count
            try reserve(total)
            let mask = try backend.guarded("decoder") {
                inputs["inputs_embeds"] = try OnnxValue(embeds, backend.library)
                if takesPositions {
                    inputs["position_ids"] = try OnnxValue(
                        try positions ?? textPositions(length..<total), backend.library)
                }
                return try OnnxValue(self.mask, shape: [1, total], backend.library)
            }
            inputs["attention_mask"] = mask
            let found = try backend.run(decoder: session, inputs, outputs)
            try backend.guarded("decoder") {
                if concatenated { try bind(try present.map { try found[$0]!.copied() }) }
                if !writesLogits { try keepLast(try found["logits"]!.copied()) }
            }
            length = total
        }

        func truncate(_ length: Int) throws {
            precondition((0...self.length).contains(length), "a cache of \(self.length) cannot be cut to \(length)")
            if concatenated && length < self.length {
                try backend.guarded("decoder") { try bind(try caches.map { try resized($0, to: length, keeping: length) }) }
            }
            self.length = length
        }

        /// Room for that many positions.
        private func reserve(_ total: Int) throws {
            if mask.count < total { mask = try Self.ones(room(total)) }
            if concatenated || total <= capacity { return }
            let wanted = room(max(total, Self.firstLength))
            try backend.guarded("decoder") { try bind(try caches.map { try resized($0, to: wanted, keeping: length) }) }
            capacity = wanted
        }

        private func bind(_ tensors: [Tensor]) throws {
            caches = tensors
            for (index, tensor) in tensors.enumerated() {
                let value = try OnnxValue(tensor, backend.library)
                inputs[past[index]] = value
                if !concatenated { outputs[present[index]] = value }
            }
        }

        /// The last position's logits in float32, wherever the graph leaves them.
        private func keepLast(_ found: Tensor) throws {
            let all = try found.toFloats().floats
            _ = logits.floats.write(all[(all.count - model.vocabSize)...])
        }

        private func cache(_ positions: Int) throws -> Tensor {
            try Tensor(cacheType, [1, model.numKeyValueHeads, positions, model.headDim])
        }

        private func resized(_ from: Tensor, to positions: Int, keeping count: Int) throws -> Tensor {
            let found = try cache(positions)
            let row = model.headDim * cacheType.bytes
            for head in 0..<model.numKeyValueHeads {
                (found.memory.baseAddress! + head * positions * row).copyMemory(
                    from: from.memory.baseAddress! + head * from.shape[2] * row, byteCount: count * row)
            }
            return found
        }

        /// The next power of two, but no more than the context.
        private func room(_ total: Int) -> Int {
            var power = 1
            while power < total { power *= 2 }
            return max(min(power, model.contextLength), total)
        }

        private static func ones(_ count: Int) throws -> Tensor {
            let found = try Tensor(.int64, [count])
            found.values(Int64.self).fill(1)
            return found
        }
    }
#endif
