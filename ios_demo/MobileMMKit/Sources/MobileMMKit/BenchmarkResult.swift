import Foundation

/// What was measured, in the schema of `mobilemm bench` (`result_v1.schema.json`): read by `mobilemm compare`.
public struct BenchmarkResult: Encodable, Sendable {
    struct Condition: Encodable {
        var clockMhz: [Double] = []
        var celsius: [String: Double] = [:]
    }

    struct Machine: Encodable {
        let system, processor: String
        let cores, memory: Int
        /// Bytes a second that all cores read together; multiplications and additions a second in float32.
        let bandwidth, operations: Double
        let before, after: Condition
    }

    struct BundleFacts: Encodable {
        let name, target, digest: String
        let bytes: Int
        let parts, bits: [String: Int]
    }

    struct Settings: Encodable {
        let promptTokens, newTokens, images, runs: Int
        let threads: Int?
    }

    struct Measured: Encodable {
        let name, what, unit: String
        let runs: [Double]
    }

    let schemaVersion = 1
    let mobilemm = "0.1.0"
    let created: String
    let device, runtime: String
    let machine: Machine
    let bundle: BundleFacts
    let settings: Settings
    let figures: [Measured]
    let absent: [String: String]

    /// Measures the machine itself, which takes a second, and puts it beside the bundle's figures.
    public init(
        _ bundle: ModelBundle, _ figures: [Figure], _ settings: BenchmarkSettings, device: String, runtime: String
    ) throws {
        let format = ISO8601DateFormatter()
        format.timeZone = TimeZone(identifier: "UTC")
        created = format.string(from: Date()).replacingOccurrences(of: "Z", with: "+00:00")
        (self.device, self.runtime) = (device, runtime)
        let system = ProcessInfo.processInfo
        machine = Machine(
            system: system.operatingSystemVersionString, processor: MachineSpeed.processor,
            cores: system.activeProcessorCount, memory: Int(system.physicalMemory), bandwidth: MachineSpeed.bandwidth(),
            operations: MachineSpeed.operations(), before: Condition(), after: Condition())
        let manifest = bundle.manifest
        self.bundle = BundleFacts(
            name: manifest.model.name, target: manifest.target,
            digest: try ModelBundle.sha256(bundle.folder, ModelBundle.manifestName),
            bytes: manifest.files.reduce(0) { $0 + $1.bytes }, parts: manifest.parts.mapValues(\.bytes),
            bits: manifest.parts.mapValues(\.quantization.bits))
        self.settings = Settings(
            promptTokens: settings.promptTokens, newTokens: settings.newTokens, images: settings.images,
            runs: settings.runs, threads: settings.threads > 0 ? settings.threads : nil)
        self.figures = figures.map { Measured(name: $0.name, what: $0.what, unit: $0.unit, runs: $0.runs) }
        var absent = [
            "energy": "no counter of the processor's energy can be read",
            "load_cold": "this system cannot be asked to forget files",
            "memory": "this system does not count a process' peak",
        ]
        if manifest.parts["vision"] != nil { absent["projector"] = "it is part of the vision program" }
        self.absent = absent
    }

    /// A file for `mobilemm compare`: an array of one result.
    public func json() throws -> Data {
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        encoder.outputFormatting = [.prettyPrinted, .sortedKeys]
        return try encoder.encode([self])
    }
}

/// What all cores of this machine do together, the best of some rounds.
enum MachineSpeed {
    private static let rounds = 5
    private static let longs = 1 << 23
    private static let products = 1 << 24

    static var processor: String {
        var name = utsname()
        uname(&name)
        return withUnsafeBytes(of: &name.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
    }

    /// Units a second: each core does `count` of them.
    private static func best(_ count: Double, _ action: @Sendable () -> Double) -> Double {
        let cores = ProcessInfo.processInfo.activeProcessorCount
        var best = 0.0
        for _ in 0..<rounds {
            let begun = ContinuousClock.now
            DispatchQueue.concurrentPerform(iterations: cores) { _ in withExtendedLifetime(action()) {} }
            best = max(best, Double(cores) * count / (ContinuousClock.now - begun).seconds)
        }
        return best
    }

    /// Bytes a second, read from memory.
    static func bandwidth() -> Double {
        let values = (0..<longs).map { UInt64($0) }
        return best(8 * Double(longs)) {
            values.withUnsafeBufferPointer { Double($0.reduce(0, &+)) }
        }
    }

    /// Multiplications and additions a second in float32, as compiled code does them.
    static func operations() -> Double {
        best(2 * Double(products)) {
            var lanes = SIMD16<Float>(repeating: 1)
            for _ in 0..<products / 16 { lanes = lanes * 0.5 + 1 }
            return Double(lanes.sum())
        }
    }
}
