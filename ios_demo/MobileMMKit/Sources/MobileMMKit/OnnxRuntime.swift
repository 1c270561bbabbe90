#if canImport(COnnxRuntime)
    import COnnxRuntime
    import Foundation

    /// ONNX Runtime's C API, out of the library that lies at `MOBILEMM_ONNXRUNTIME` or where the system looks for it.
    final class OnnxRuntime: @unchecked Sendable {
        /// What the library says of a call that failed.
        struct Failure: Error {
            let message: String
        }

        static let variable = "MOBILEMM_ONNXRUNTIME"
        private static let opened = Result { try OnnxRuntime() }

        /// The one of this process. Throws ``MobileMMError`` when there is no such library.
        static func shared() throws -> OnnxRuntime { try opened.get() }

        let version: String
        let api: UnsafePointer<OrtApi>
        private(set) var environment: OpaquePointer!
        private(set) var memory: OpaquePointer!

        private init() throws {
            let given = ProcessInfo.processInfo.environment[Self.variable]
            let names = given.map { [$0] } ?? ["libonnxruntime.so", "libonnxruntime.so.1"]
            guard let library = names.lazy.compactMap({ dlopen($0, RTLD_NOW) }).first,
                let symbol = dlsym(library, "OrtGetApiBase")
            else {
                throw MobileMMError(
                    "\(names.joined(separator: ", ")): ONNX Runtime cannot be opened; set \(Self.variable) to its"
                        + " libonnxruntime.so, which the Python package onnxruntime has in its folder capi")
            }
            typealias GetApiBase = @convention(c) () -> UnsafePointer<OrtApiBase>?
            let base = unsafeBitCast(symbol, to: GetApiBase.self)()!
            version = String(cString: base.pointee.GetVersionString()!)
            guard let api = base.pointee.GetApi(UInt32(ORT_API_VERSION)) else {
                throw MobileMMError("\(names[0]): is onnxruntime \(version), older than this program knows; update it")
            }
            self.api = api
            // What goes wrong is thrown; the log would say it again.
            try check(api.pointee.CreateEnv(ORT_LOGGING_LEVEL_FATAL, "mobilemm", &environment))
            try check(api.pointee.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory))
        }

        /// Throws ``Failure`` when a call has failed.
        func check(_ status: OpaquePointer?) throws {
            guard let status else { return }
            defer { api.pointee.ReleaseStatus(status) }
            throw Failure(message: String(cString: api.pointee.GetErrorMessage(status)!))
        }

        static let types: [(DType, ONNXTensorElementDataType)] = [
            (.float32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT), (.float16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16),
            (.uint8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8), (.int8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8),
            (.int32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32), (.int64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64),
        ]

        /// Type and shape behind an OrtTensorTypeAndShapeInfo; a dynamic dimension is -1, under any name.
        func description(_ info: OpaquePointer?) throws -> (dtype: DType?, shape: [Int]) {
            var type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED
            try check(api.pointee.GetTensorElementType(info, &type))
            var count = 0
            try check(api.pointee.GetDimensionsCount(info, &count))
            var sizes = [Int64](repeating: 0, count: count)
            try check(api.pointee.GetDimensions(info, &sizes, count))
            return (Self.types.first { $0.1 == type }?.0, sizes.map(Int.init))
        }
    }

    /// A tensor as ONNX Runtime holds it: over memory of ours, which it keeps, or of its own.
    final class OnnxValue {
        let pointer: OpaquePointer
        private let runtime: OnnxRuntime
        private let tensor: Tensor?

        /// `shape` where it is not the tensor's own: the first part of its memory.
        init(_ tensor: Tensor, shape: [Int]? = nil, _ runtime: OnnxRuntime) throws {
            let sizes = (shape ?? tensor.shape).map(Int64.init)
            let bytes = sizes.reduce(tensor.dtype.bytes) { $0 * Int($1) }
            let type = OnnxRuntime.types.first { $0.0 == tensor.dtype }!.1
            var made: OpaquePointer?
            try runtime.check(
                runtime.api.pointee.CreateTensorWithDataAsOrtValue(
                    runtime.memory, tensor.memory.baseAddress, bytes, sizes, sizes.count, type, &made))
            (pointer, self.runtime, self.tensor) = (made!, runtime, tensor)
        }

        /// One that a run has made.
        init(taking pointer: OpaquePointer, _ runtime: OnnxRuntime) {
            (self.pointer, self.runtime, tensor) = (pointer, runtime, nil)
        }

        deinit {
            runtime.api.pointee.ReleaseValue(pointer)
        }

        /// The numbers, in memory of ours.
        func copied() throws -> Tensor {
            var info: OpaquePointer?
            try runtime.check(runtime.api.pointee.GetTensorTypeAndShape(pointer, &info))
            defer { runtime.api.pointee.ReleaseTensorTypeAndShapeInfo(info) }
            let (dtype, shape) = try runtime.description(info)
            guard let dtype else { throw OnnxRuntime.Failure(message: "an output of an unknown type") }
            let found = try Tensor(dtype, shape)
            var data: UnsafeMutableRawPointer?
            try runtime.check(runtime.api.pointee.GetTensorMutableData(pointer, &data))
            if found.count > 0, let data {
                found.memory.baseAddress!.copyMemory(from: data, byteCount: found.count * dtype.bytes)
            }
            return found
        }
    }

    /// A loaded graph.
    final class OnnxSession {
        struct Feature {
            let name: String
            let dtype: DType?
            let shape: [Int]
        }

        private(set) var inputs: [Feature] = []
        private(set) var outputs: [Feature] = []
        private let runtime: OnnxRuntime
        private var pointer: OpaquePointer?
        /// Names as C has them, as long as the session lives.
        private var names: [String: UnsafeMutablePointer<CChar>] = [:]

        init(_ file: URL, threads: Int, _ runtime: OnnxRuntime) throws {
            self.runtime = runtime
            let api = runtime.api.pointee
            var options: OpaquePointer?
            try runtime.check(api.CreateSessionOptions(&options))
            defer { api.ReleaseSessionOptions(options) }
            try runtime.check(api.SetSessionExecutionMode(options, ORT_SEQUENTIAL))
            try runtime.check(api.SetInterOpNumThreads(options, 1))
            if threads > 0 { try runtime.check(api.SetIntraOpNumThreads(options, Int32(threads))) }
            try runtime.check(api.CreateSession(runtime.environment, file.path, options, &pointer))
            inputs = try features(
                api.SessionGetInputCount, api.SessionGetInputName, api.SessionGetInputTypeInfo)
            outputs = try features(
                api.SessionGetOutputCount, api.SessionGetOutputName, api.SessionGetOutputTypeInfo)
        }

        deinit {
            if let pointer { runtime.api.pointee.ReleaseSession(pointer) }
            names.values.forEach { free($0) }
        }

        private typealias Count = @convention(c) (OpaquePointer?, UnsafeMutablePointer<Int>?) -> OpaquePointer?
        private typealias Name = @convention(c) (
            OpaquePointer?, Int, UnsafeMutablePointer<OrtAllocator>?,
            UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?
        ) -> OpaquePointer?
        private typealias Info = @convention(c) (
            OpaquePointer?, Int, UnsafeMutablePointer<OpaquePointer?>?
        ) -> OpaquePointer?

        private func features(_ countOf: Count, _ nameOf: Name, _ infoOf: Info) throws -> [Feature] {
            let api = runtime.api.pointee
            var allocator: UnsafeMutablePointer<OrtAllocator>?
            try runtime.check(api.GetAllocatorWithDefaultOptions(&allocator))
            var count = 0
            try runtime.check(countOf(pointer, &count))
            return try (0..<count).map { index in
                var text: UnsafeMutablePointer<CChar>?
                try runtime.check(nameOf(pointer, index, allocator, &text))
                let name = String(cString: text!)
                try runtime.check(api.AllocatorFree(allocator, text))
                var info: OpaquePointer?
                try runtime.check(infoOf(pointer, index, &info))
                defer { api.ReleaseTypeInfo(info) }
                var tensor: OpaquePointer?
                try runtime.check(api.CastTypeInfoToTensorInfo(info, &tensor))
                guard tensor != nil else { return Feature(name: name, dtype: nil, shape: []) }
                let (dtype, shape) = try runtime.description(tensor)
                return Feature(name: name, dtype: dtype, shape: shape)
            }
        }

        private func c(_ name: String) -> UnsafePointer<CChar>? {
            if let known = names[name] { return UnsafePointer(known) }
            let made = strdup(name)!
            names[name] = made
            return UnsafePointer(made)
        }

        /// Runs the graph. An output given a value is written there; the others are returned, by name.
        func run(
            _ inputs: [String: OnnxValue], _ outputs: [String: OnnxValue?], _ options: OpaquePointer?
        ) throws -> [String: OnnxValue] {
            let given = Array(inputs)
            let wanted = Array(outputs)
            var results = wanted.map { $0.value?.pointer }
            let failure = runtime.api.pointee.Run(
                pointer, options, given.map { c($0.key) }, given.map { $0.value.pointer }, given.count,
                wanted.map { c($0.key) }, wanted.count, &results)
            var found: [String: OnnxValue] = [:]
            for (index, output) in wanted.enumerated() where output.value == nil {
                if let result = results[index] { found[output.key] = OnnxValue(taking: result, runtime) }
            }
            try runtime.check(failure)
            return found
        }
    }
#endif
