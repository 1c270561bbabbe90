import Foundation

/// How it is measured; the keys of `mobilemm bench`'s settings.
public struct BenchmarkSettings: Sendable {
    public var promptTokens = 144
    public var newTokens = 64
    public var images = 1
    public var runs = 5
    /// 0: what the runtime takes by itself.
    public var threads = 0

    public init() {}
}

/// One thing measured, in the words of `mobilemm bench`: `pp144` reads 144 tokens, `tg64` writes 64.
public struct Figure: Sendable, Identifiable {
    public let name: String
    public let what: String
    public let unit: String
    public let runs: [Double]

    public var id: String { name }

    /// Half of the runs were above it.
    public var median: Double {
        let sorted = runs.sorted()
        return (sorted[(sorted.count - 1) / 2] + sorted[sorted.count / 2]) / 2
    }
}

/// Measures a bundle on this device: the figures of `mobilemm bench`, in its schema (`result_v1.schema.json`).
public actor Benchmark {
    public static let question = "What is in this picture?"
    private let bundle: ModelBundle
    private let backend: any Backend
    private let settings: BenchmarkSettings
    private let thread = ComputeThread()
    private let model: ModelCard
    private var figures: [Figure] = []

    public init(_ bundle: ModelBundle, _ backend: any Backend, _ settings: BenchmarkSettings = BenchmarkSettings()) {
        (self.bundle, self.backend, self.settings) = (bundle, backend, settings)
        model = bundle.manifest.model
    }

    public nonisolated var unownedExecutor: UnownedSerialExecutor { thread.asUnownedSerialExecutor() }

    /// All figures; `report` hears what is being measured. Throws ``Cancelled`` when the backend is cancelled.
    public func run(report: @Sendable (String) -> Void = { _ in }) async throws -> [Figure] {
        figures = []
        backend.resume()
        report("Loading")
        for part in bundle.manifest.parts.keys { backend.release(part) }
        let seconds = try measured {
            for part in bundle.manifest.parts.keys.sorted() where part != "decoder" { try backend.load(part) }
            _ = try backend.decoder()
        }
        figures.append(Figure(name: "load_warm", what: "load, files in memory", unit: "s", runs: [seconds]))
        if let rule = bundle.manifest.image, settings.images > 0 {
            report("Looking at pictures")
            try await pictures(rule)
        }
        let decoder = try backend.decoder()
        report("Reading a prompt")
        try prefill(decoder)
        report("Writing")
        try decode(decoder)
        if let generator = try PictureGenerator.open(bundle, backend, steps: nil) {
            report("Drawing")
            try draw(generator)
        }
        return figures
    }

    private func measured(_ action: () throws -> Void) rethrows -> Double {
        let begun = ContinuousClock.now
        try action()
        return (ContinuousClock.now - begun).seconds
    }

    /// Seconds of each run; one more before them warms up.
    private func times(_ action: (Int) throws -> Void) rethrows -> [Double] {
        Array(try (0...settings.runs).map { index in try measured { try action(index) } }.dropFirst())
    }

    private func pictures(_ rule: ImageRule) async throws {
        let processor = ImageProcessor(rule)
        let photos = (0..<2 * (settings.runs + 1) * settings.images).map(photograph)
        var pixels: [Tensor] = []
        let resizing = try times { index in
            let tensor = try Tensor(.uint8, [1, 3, rule.height, rule.width])
            tensor.memory.copyBytes(from: try processor.toPixels(photos[index]))
            pixels.append(tensor)
        }
        figures.append(Figure(name: "resize", what: "photo: resize", unit: "s", runs: resizing))
        let looking = try times { _ = try backend.run("vision", ["pixels": pixels[$0]]) }
        figures.append(Figure(name: "vision", what: "photo: encoder and projector", unit: "s", runs: looking))
        let session = try await Session(bundle, backend, sampling: Sampling(maxNewTokens: 1))
        var first: [Double] = []
        for index in 0...settings.runs {
            await session.reset()
            let begun = ContinuousClock.now
            for picture in 0..<settings.images {
                let offset = (settings.runs + 1 + index) * settings.images + picture
                try await session.lookAt(photos[offset % photos.count])
            }
            _ = try await session.reply(Self.question)
            first.append((ContinuousClock.now - begun).seconds)
        }
        figures.append(
            Figure(name: "ttft", what: "photo's pixels to first token", unit: "s", runs: Array(first.dropFirst())))
    }

    /// A picture of the size of a phone's preview, another one for each seed.
    private func photograph(_ seed: Int) -> PixelRaster {
        var random = SplitMix64(UInt64(seed))
        let (width, height) = (1280, 960)
        let colors = (0..<64).map { _ in UInt32(truncatingIfNeeded: random.next()) | 0xFF00_0000 }
        var pixels: [UInt32] = []
        pixels.reserveCapacity(width * height)
        for y in 0..<height {
            for x in 0..<width {
                let square: Int = y / 120 * 8 + x / 160
                pixels.append(colors[square])
            }
        }
        return PixelRaster(width: width, height: height, pixels: pixels)
    }

    private func prefill(_ decoder: any Decoder) throws {
        let ids = ids()
        let seconds = try times { _ in
            try decoder.truncate(0)
            _ = try decoder.decode(try embed(backend, model, ids), positions: nil)
        }
        figures.append(
            Figure(
                name: "pp\(settings.promptTokens)", what: "read a prompt", unit: "tok/s",
                runs: seconds.map { Double(settings.promptTokens) / $0 }))
    }

    /// Behind the prompt: embedding, step and greedy choice of each token.
    private func decode(_ decoder: any Decoder) throws {
        let ids = ids()
        var (each, rates): ([Double], [Double]) = ([], [])
        for turn in 0...settings.runs {
            try decoder.truncate(0)
            var logits = try decoder.decode(try embed(backend, model, ids), positions: nil)
            var steps: [Double] = []
            for _ in 0..<settings.newTokens {
                let begun = ContinuousClock.now
                let token = Sampler.largest(logits, size: model.vocabSize)
                logits = try decoder.decode(try embed(backend, model, [token]), positions: nil)
                steps.append((ContinuousClock.now - begun).seconds)
            }
            // The first run warms up.
            if turn == 0 { continue }
            each += steps
            rates.append(Double(settings.newTokens) / steps.reduce(0, +))
        }
        figures.append(Figure(name: "tg\(settings.newTokens)", what: "write", unit: "tok/s", runs: rates))
        figures.append(Figure(name: "token", what: "write one token", unit: "s", runs: each))
    }

    /// What a picture takes does not depend on what it shows. Steps that are one program share its time alike.
    private func draw(_ generator: PictureGenerator) throws {
        let signals = try generator.signals()
        signals.floats.fill(0)
        var steps: [Double] = []
        let seconds = try times { index in
            if !generator.isStepwise {
                _ = try generator.draw(signals, seed: UInt64(index))
                return
            }
            let condition = try generator.condition(signals)
            var begun = ContinuousClock.now
            let latents = try generator.latents(condition, seed: UInt64(index)) { _, _ in
                // The first run warms up.
                if index > 0 { steps.append((ContinuousClock.now - begun).seconds) }
                begun = .now
            }
            _ = try generator.decode(latents)
        }
        if !generator.isStepwise { steps = seconds.map { $0 / Double(generator.steps) } }
        figures.append(Figure(name: "draw", what: "draw a picture", unit: "s", runs: seconds))
        figures.append(Figure(name: "draw_step", what: "draw: one step", unit: "s", runs: steps))
    }

    private func ids() -> [Int] {
        var random = SplitMix64(0)
        let special = Set(model.eosTokenIds + [model.imageTokenId])
        var found: [Int] = []
        while found.count < settings.promptTokens {
            let id = Int(random.next() % UInt64(model.vocabSize))
            if !special.contains(id) { found.append(id) }
        }
        return found
    }
}
