#if canImport(CoreML)
    import CoreML
    import Foundation
    import Synchronization

    /// Core ML bundles: `vision` takes one picture a call, `embed` ids alone, and `decoder` has functions over one
    /// state, `prefill` for a fixed number of positions (or several, `prefill_LENGTH`) and `decode` for one.
    ///
    /// Packages are compiled for this device when the bundle is opened; a part's weights are in memory from ``load(_:)``
    /// to ``release(_:)``. Predictions run on the thread that calls, never the main one when a ``Session`` does.
    public final class CoreMLBackend: Backend, @unchecked Sendable {
        public let bundle: ModelBundle
        private let units: MLComputeUnits
        private let compiled: [String: URL]
        private let functions: [String]
        private var packages: [String: CoreMLPackage] = [:]
        private let cancelled = Atomic(false)

        /// Compiles what is not compiled yet; the compiled packages are kept in the caches' folder, by their hashes.
        ///
        /// Throws ``MobileMMError`` for packages that Core ML refuses, and a decoder that lacks its functions.
        public static func open(_ bundle: ModelBundle, units: MLComputeUnits = .all) async throws -> CoreMLBackend {
            var compiled: [String: URL] = [:]
            for name in bundle.manifest.parts.keys { compiled[name] = try await compile(bundle, name) }
            let file = try bundle.partFile("decoder")
            let functions: [String]
            do {
                functions = try await MLModelAsset(url: compiled["decoder"]!).functionNames
            } catch {
                throw MobileMMError("\(file.path): its functions cannot be read by Core ML (\(oneLine(error)))")
            }
            if !functions.contains("decode") || !functions.contains(where: { $0.hasPrefix("prefill") }) {
                let names = functions.sorted().joined(separator: ", ")
                throw MobileMMError("\(file.path): not a decoder, it has the functions \(names)")
            }
            return CoreMLBackend(bundle, units, compiled, functions)
        }

        private init(_ bundle: ModelBundle, _ units: MLComputeUnits, _ compiled: [String: URL], _ functions: [String]) {
            (self.bundle, self.units, self.compiled, self.functions) = (bundle, units, compiled, functions)
        }

        private static func compile(_ bundle: ModelBundle, _ name: String) async throws -> URL {
            let files = FileManager.default
            let part = bundle.manifest.parts[name]!
            let hashes = bundle.manifest.files.filter { part.files.contains($0.path) }.map(\.sha256).sorted()
            let key = Sha256.of([UInt8](hashes.joined().utf8))
            let kept = files.urls(for: .cachesDirectory, in: .userDomainMask)[0]
                .appendingPathComponent("org.mobilemm/\(key).mlmodelc")
            if files.fileExists(atPath: kept.path) { return kept }
            let file = try bundle.partFile(name)
            do {
                let made = try await MLModel.compileModel(at: file)
                try files.createDirectory(at: kept.deletingLastPathComponent(), withIntermediateDirectories: true)
                try files.moveItem(at: made, to: kept)
            } catch {
                throw MobileMMError("\(file.path): cannot be compiled by Core ML (\(oneLine(error)))")
            }
            return kept
        }

        public var runtime: String { "Core ML of \(ProcessInfo.processInfo.operatingSystemVersionString)" }

        public func load(_ part: String) throws {
            let package = try package(part)
            for function in part == "decoder" ? functions.map(Optional.some) : [nil] { try package.load(function) }
        }

        public func release(_ part: String) { packages[part] = nil }

        public func run(_ part: String, _ inputs: [String: Tensor]) throws -> [String: Tensor] {
            try check()
            let package = try package(part)
            switch part {
            case "vision": return ["image_features": try look(package, inputs["pixels"])]
            case "embed": return ["inputs_embeds": try embed(package, inputs["input_ids"], inputs["image_features"])]
            default: return try package.run(inputs, nil, nil)
            }
        }

        public func decoder() throws -> any Decoder {
            try load("decoder")
            return try CoreMLDecoder(self, try package("decoder"), functions)
        }

        /// What runs now, one step, is not interrupted; nothing comes behind it.
        public func cancel() { cancelled.store(true, ordering: .sequentiallyConsistent) }

        public func resume() { cancelled.store(false, ordering: .sequentiallyConsistent) }

        func check() throws {
            if cancelled.load(ordering: .sequentiallyConsistent) { throw Cancelled() }
        }

        /// How many of a part's operations run on which processor: as Core ML plans it on this device.
        public func plan(_ part: String) async throws -> [String: Int] {
            guard let url = compiled[part] else { throw MobileMMError("there is no part \(shown(part))") }
            let configuration = MLModelConfiguration()
            configuration.computeUnits = units
            let plan = try await MLComputePlan.load(contentsOf: url, configuration: configuration)
            guard case .program(let program) = plan.modelStructure else { return [:] }
            var counts: [String: Int] = [:]
            func count(_ block: MLModelStructure.Program.Block) {
                for operation in block.operations {
                    if let usage = plan.deviceUsage(for: operation) { counts[name(usage.preferred), default: 0] += 1 }
                    operation.blocks.forEach(count)
                }
            }
            program.functions.values.forEach { count($0.block) }
            return counts
        }

        private func name(_ device: MLComputeDevice) -> String {
            switch device {
            case .cpu: "CPU"
            case .gpu: "GPU"
            case .neuralEngine: "Neural Engine"
            @unknown default: "other"
            }
        }

        private func package(_ part: String) throws -> CoreMLPackage {
            if let known = packages[part] { return known }
            guard let url = compiled[part] else { throw MobileMMError("there is no part \(shown(part))") }
            let made = CoreMLPackage(url, try bundle.partFile(part), bundle.manifest.parts[part]!, units)
            packages[part] = made
            return made
        }

        private func look(_ package: CoreMLPackage, _ pixels: Tensor?) throws -> Tensor {
            try lookOneByOne(pixels, package.file.path) { picture in
                try check()
                return try output("image_features", of: "vision", in: try package.run(["pixels": picture], nil, nil))
            }
        }

        private func embed(_ package: CoreMLPackage, _ ids: Tensor?, _ features: Tensor?) throws -> Tensor {
            let longest = try package.sizes(nil, "input_ids")[1].upperBound
            return try embedWithImages(try ids?.wholeNumbers() ?? [], features, bundle.manifest.model) { known, rows in
                var at = 0
                for start in stride(from: 0, to: known.count, by: longest) {
                    let piece = known[start..<min(start + longest, known.count)]
                    let input = try Tensor(.int32, [1, piece.count])
                    _ = input.values(Int32.self).write(piece.map(Int32.init))
                    let found = try package.run(["input_ids": input], nil, nil)
                    at = rows.write(try output("inputs_embeds", of: "embed", in: found).floats, from: at)
                }
            }
        }
    }

    /// A ``Decoder``: the package, and one conversation's states.
    ///
    /// Long inputs go through `prefill` in pieces of its length; where there are several of it, the smallest that holds
    /// what is left is taken. Rows behind a shorter piece are padding: what they write lies behind the cache's end,
    /// where it is overwritten before anything sees it.
    final class CoreMLDecoder: Decoder {
        /// From as many positions on, a call of `prefill`, which always computes its full length, is worth it.
        private static let prefillFrom = 6
        private static let decode = "decode"

        private let backend: CoreMLBackend
        private let package: CoreMLPackage
        private let contextLength: Int
        private let state: MLState
        /// The functions for many positions, the fewest first.
        private let prefill: [(width: Int, function: String)]
        private let takesRope: Bool
        private(set) var length = 0

        init(_ backend: CoreMLBackend, _ package: CoreMLPackage, _ functions: [String]) throws {
            (self.backend, self.package) = (backend, package)
            contextLength = backend.bundle.manifest.model.contextLength
            prefill = try functions.filter { $0.hasPrefix("prefill") }
                .map { (try package.sizes($0, "inputs_embeds")[1].upperBound, $0) }.sorted { $0.0 < $1.0 }
            takesRope = try package.hasInput(Self.decode, "rope_position_ids")
            state = try package.makeState(Self.decode)
        }

        func decode(_ embeds: Tensor, positions: Tensor?) throws -> Values<Float> {
            let count = embeds.shape[1]
            let total = length + count
            if total > contextLength {
                throw MobileMMError("\(total) positions are more than this model's context of \(contextLength)")
            }
            let rope = takesRope ? try positions ?? textPositions(length..<total) : nil
            let halves = try embeds.toFloats().toHalves()
            var logits: Tensor?
            var start = 0
            while start < count {
                let chosen = choose(count - start, from: length + start)
                let stop = min(start + (chosen?.width ?? count), count)
                if let chosen, stop - start >= Self.prefillFrom {
                    logits = try call(halves, rope, start..<stop, chosen.width, chosen.function)
                } else {
                    for place in start..<stop { logits = try call(halves, rope, place..<place + 1, 1, Self.decode) }
                }
                start = stop
            }
            length = total
            return logits!.floats
        }

        func truncate(_ length: Int) throws {
            precondition((0...self.length).contains(length), "a cache of \(self.length) cannot be cut to \(length)")
            self.length = length
        }

        /// The function for `count` positions from `first` on; its whole length must fit into the states.
        private func choose(_ count: Int, from first: Int) -> (width: Int, function: String)? {
            let fitting = prefill.filter { first + $0.width <= contextLength }
            return fitting.first { $0.width >= count } ?? fitting.last
        }

        /// Logits of the last of these places; rows behind them are as it is.
        private func call(
            _ halves: Tensor, _ rope: Tensor?, _ places: Range<Int>, _ width: Int, _ function: String
        ) throws -> Tensor {
            try backend.check()
            let rows = (0..<width).map { min(places.lowerBound + $0, places.upperBound - 1) }
            let hidden = halves.shape[2]
            let embeds = try Tensor(.float16, [1, width, hidden])
            let (source, target) = (halves.values(UInt16.self), embeds.values(UInt16.self))
            for (index, row) in rows.enumerated() {
                _ = target.write(source[row * hidden..<(row + 1) * hidden], from: index * hidden)
            }
            let positions = try Tensor(.int32, [1, width])
            _ = positions.values(Int32.self).write((0..<width).map { Int32(length + places.lowerBound + $0) })
            var inputs = ["inputs_embeds": embeds, "position_ids": positions]
            if let rope {
                let all = try rope.wholeNumbers()
                let count = rope.shape[2]
                let picked = try Tensor(.int32, [3, 1, width])
                _ = picked.values(Int32.self).write((0..<3).flatMap { line in rows.map { Int32(all[line * count + $0]) } })
                inputs["rope_position_ids"] = picked
            }
            if function != Self.decode {
                let last = try Tensor(.int32, [1])
                last.values(Int32.self).fill(Int32(places.count - 1))
                inputs["last_index"] = last
            }
            return try output("logits", of: "decoder", in: try package.run(inputs, function, state))
        }
    }
#endif
