#if canImport(COnnxRuntime)
    import COnnxRuntime
    import Foundation
    import Synchronization

    /// ONNX bundles on ONNX Runtime's CPU kernels, keys and values in buffers that stay where they are.
    public final class OnnxBackend: Backend, @unchecked Sendable {
        public let bundle: ModelBundle
        private let threads: Int
        private var sessions: [String: OnnxSession] = [:]
        private let cancelled = Atomic(false)
        let library: OnnxRuntime
        private var options: OpaquePointer?

        /// `threads` 0 for as many as ONNX Runtime takes by itself. Throws ``MobileMMError`` when its library is not
        /// there, or is older than the bundle asks for.
        public init(_ bundle: ModelBundle, threads: Int = 0) throws {
            (self.bundle, self.threads) = (bundle, threads)
            library = try OnnxRuntime.shared()
            let wanted = bundle.manifest.runtimeMinVersion
            if isOlder(library.version, than: wanted) {
                throw MobileMMError(
                    "\(bundle.folder.path): needs onnxruntime \(wanted) or newer, here is \(library.version): update it")
            }
            try library.check(library.api.pointee.CreateRunOptions(&options))
        }

        deinit {
            library.api.pointee.ReleaseRunOptions(options)
        }

        public var runtime: String { "onnxruntime \(library.version)" }

        public func load(_ part: String) throws { _ = try session(part) }

        public func release(_ part: String) { sessions[part] = nil }

        public func run(_ part: String, _ inputs: [String: Tensor]) throws -> [String: Tensor] {
            let session = try session(part)
            let outputs = Dictionary(
                session.outputs.map { ($0.name, OnnxValue?.none) }, uniquingKeysWith: { first, _ in first })
            return try guarded(part) {
                let given = try inputs.mapValues { try OnnxValue($0, library) }
                return try session.run(given, outputs, options).mapValues { try $0.copied() }
            }
        }

        public func decoder() throws -> any Decoder { try OnnxDecoder(self, try session("decoder")) }

        public func cancel() {
            cancelled.store(true, ordering: .sequentiallyConsistent)
            _ = library.api.pointee.RunOptionsSetTerminate(options)
        }

        public func resume() {
            cancelled.store(false, ordering: .sequentiallyConsistent)
            _ = library.api.pointee.RunOptionsUnsetTerminate(options)
        }

        func run(
            decoder session: OnnxSession, _ inputs: [String: OnnxValue], _ outputs: [String: OnnxValue?]
        ) throws -> [String: OnnxValue] {
            try guarded("decoder") { try session.run(inputs, outputs, options) }
        }

        /// Runs a session; what it throws becomes one line, or ``Cancelled``.
        func guarded<T>(_ part: String, _ action: () throws -> T) throws -> T {
            if cancelled.load(ordering: .sequentiallyConsistent) { throw Cancelled() }
            do {
                return try action()
            } catch let failure as OnnxRuntime.Failure {
                if cancelled.load(ordering: .sequentiallyConsistent) { throw Cancelled() }
                throw MobileMMError(
                    "\(try bundle.partFile(part).path): part '\(part)' failed (\(oneLine(failure.message)))")
            }
        }

        private func session(_ part: String) throws -> OnnxSession {
            if let known = sessions[part] { return known }
            let file = try bundle.partFile(part)
            do {
                let made = try OnnxSession(file, threads: threads, library)
                try checkInterface(part, file, made)
                sessions[part] = made
                return made
            } catch let failure as OnnxRuntime.Failure {
                throw MobileMMError("\(file.path): cannot be loaded by onnxruntime (\(oneLine(failure.message)))")
            }
        }

        /// Inputs with a default value, which this runtime does not list: the last position's logits.
        private static let haveDefaults: Set = ["logits_positions"]

        /// Inputs and outputs as the manifest has them.
        private func checkInterface(_ part: String, _ file: URL, _ session: OnnxSession) throws {
            let listed = bundle.manifest.parts[part]!
            for (side, specs, found) in [
                ("input", listed.inputs, session.inputs), ("output", listed.outputs, session.outputs),
            ] {
                let byName = Dictionary(found.map { ($0.name, $0) }, uniquingKeysWith: { first, _ in first })
                var wrong = byName.keys.filter { name in !specs.contains { $0.name == name } }.sorted().first
                    .map { "\(shown($0)) is not in the manifest" }
                for spec in specs where wrong == nil {
                    guard let feature = byName[spec.name] else {
                        if !Self.haveDefaults.contains(spec.name) { wrong = "\(shown(spec.name)) is not in the graph" }
                        continue
                    }
                    let wanted = spec.shape.map { $0.size ?? -1 }
                    if feature.dtype != spec.dtype {
                        let has = feature.dtype?.rawValue ?? "of another type"
                        wrong = "\(shown(spec.name)) is \(has); the manifest says \(spec.dtype.rawValue)"
                    } else if feature.shape != wanted {
                        wrong = "\(shown(spec.name)) has the shape \(feature.shape); the manifest says \(wanted)"
                    }
                }
                if let wrong { throw MobileMMError("\(file.path): \(side) \(wrong); \(ManifestReader.again)") }
            }
        }
    }

    /// Versions such as 1.23.2, compared number by number.
    func isOlder(_ version: String, than wanted: String) -> Bool {
        let (have, want) = (numbers(version), numbers(wanted))
        for index in 0..<max(have.count, want.count) {
            let (one, other) = (index < have.count ? have[index] : 0, index < want.count ? want[index] : 0)
            if one != other { return one < other }
        }
        return false
    }

    private func numbers(_ version: String) -> [Int] {
        version.split(whereSeparator: { ".-+".contains($0) }).compactMap { Int($0) }
    }
#endif
