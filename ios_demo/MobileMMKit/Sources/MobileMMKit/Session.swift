import Synchronization

/// A picture as the vision part takes it: uint8 (3, height, width), and the hash of these pixels.
public struct Picture: Sendable {
    public let pixels: [UInt8]
    public let key: String
}

/// What was said, with its pictures.
public struct Said: Sendable {
    public let role: String
    public let text: String
    public let pictures: [Picture]

    public init(role: String, text: String, pictures: [Picture] = []) {
        (self.role, self.text, self.pictures) = (role, text, pictures)
    }
}

/// A picture that the model has drawn.
public struct Drawing: Sendable {
    public let picture: PixelRaster
    /// Of the noise that it was drawn from.
    public let seed: UInt64
    /// That output projector and generator took.
    public let seconds: Double
    /// The signal tokens as text, for the conversation's memory.
    let signal: String
}

/// A picture on its way, behind one of its steps.
public struct Sketch: Sendable {
    public let picture: PixelRaster
    public let step: Int
    /// How many there are.
    public let steps: Int
}

/// A part of an answer: whole characters that join to its text, a picture, or what comes before it.
public enum Piece: Sendable {
    case text(String)
    case drawing(Drawing)
    case sketch(Sketch)

    /// Empty for a picture.
    public var text: String { if case .text(let text) = self { text } else { "" } }
}

/// What one answer took. Times in seconds; loading of parts is not part of the others.
///
/// `ttft` is from the question to the first token, pictures included. The first token comes from the prefill, so
/// `decodeSeconds` is that of `decodeSteps` further ones.
public struct Stats: Sendable {
    public let promptTokens: Int
    public internal(set) var cachedTokens = 0
    public internal(set) var newTokens = 0
    public internal(set) var loadSeconds = 0.0
    public internal(set) var imageSeconds = 0.0
    public internal(set) var prefillSeconds = 0.0
    public internal(set) var decodeSeconds = 0.0
    public internal(set) var ttft = 0.0
    public internal(set) var drawingSeconds = 0.0
    public internal(set) var decodeSteps = 0

    init(promptTokens: Int) {
        self.promptTokens = promptTokens
    }

    /// Tokens a second that were read.
    public var prefillRate: Double {
        prefillSeconds > 0 ? Double(promptTokens - cachedTokens) / prefillSeconds : 0
    }

    /// Tokens a second that were written.
    public var decodeRate: Double { decodeSeconds > 0 ? Double(decodeSteps) / decodeSeconds : 0 }
}

/// One conversation with a bundle, over whatever runs it.
///
/// Each turn renders and tokenizes the whole conversation, and prefills only what the cache does not hold already: so
/// what is said never depends on how the cache came about. All of it happens on a thread of the session's own;
/// ``cancel()`` may come from any.
public actor Session {
    public let bundle: ModelBundle
    public let sampling: Sampling
    private let backend: any Backend
    private let system: String?
    private let keepVision: Bool
    private let sketches: Bool
    private let generator: PictureGenerator?
    private let thread = ComputeThread()
    private let model: ModelCard
    private let tokenizer: PromptTokenizer
    private let logitsSize: Int

    /// What was said so far, the system prompt first.
    public private(set) var messages: [Said] = []
    /// Pictures that go with what is said next.
    public private(set) var pending: [Picture] = []
    /// Of the last answer.
    public private(set) var stats: Stats?
    /// Of the last answer, its end token apart.
    public private(set) var answerIds: [Int] = []

    private var decoder: (any Decoder)?
    /// Features of the pictures used last, the oldest first.
    private var features: [(key: String, rows: Tensor)] = []
    private static let maxFeatures = 16

    // What the cache holds: ids, perhaps more of them than the decoder has taken in; and pictures.
    private var cached: [Int] = []
    private var shown: [String] = []
    private var nextPosition = 0

    /// - Parameters:
    ///   - backend: what runs the bundle's parts; sessions that share one must not answer at the same time.
    ///   - system: a system prompt, where the model's template takes one.
    ///   - keepVision: false gives the vision part's memory back behind each question about a new picture, and that of
    ///     the parts that draw behind each drawing.
    ///   - steps: of a drawing; nil: those that the bundle was made for. Throws ``MobileMMError`` for others than the
    ///     bundle draws in.
    ///   - sketches: whether a drawing that is made step by step comes as a ``Sketch`` first behind each step but the
    ///     last. Each takes a run of the part that decodes latents.
    public init(
        _ bundle: ModelBundle, _ backend: any Backend, sampling: Sampling = Sampling(), system: String? = nil,
        keepVision: Bool = true, steps: Int? = nil, sketches: Bool = false
    ) async throws {
        (self.bundle, self.backend, self.sampling) = (bundle, backend, sampling)
        (self.system, self.keepVision, self.sketches) = (system, keepVision, sketches)
        generator = try PictureGenerator.open(bundle, backend, steps: steps)
        let prompt = bundle.manifest.prompt
        model = bundle.manifest.model
        tokenizer = PromptTokenizer(
            try Tokenizer.read(try bundle.file(prompt.tokenizer)), prompt, imageTokenId: model.imageTokenId,
            numImageTokens: model.numImageTokens)
        logitsSize = min(tokenizer.size, model.vocabSize)
        forget()
    }

    public nonisolated var unownedExecutor: UnownedSerialExecutor { thread.asUnownedSerialExecutor() }

    // MARK: what is said

    /// Forgets all that was said and shown.
    public func reset() { forget() }

    private func forget() {
        pending = []
        messages = system.map { [Said(role: "system", text: $0)] } ?? []
    }

    /// Takes up a conversation that was kept: what comes behind the system prompt.
    public func restore(_ messages: [Said]) {
        forget()
        self.messages += messages
    }

    /// Shows a picture; it goes with what is said next. Throws ``MobileMMError`` when there is nothing that takes one.
    public func lookAt(_ picture: sending any Raster) throws { pending.append(try prepare(picture)) }

    /// As the vision part takes it. Throws ``MobileMMError`` when the bundle takes no pictures.
    private func prepare(_ picture: any Raster) throws -> Picture {
        guard let rule = bundle.manifest.image else {
            throw MobileMMError("\(bundle.folder.path): this bundle takes no pictures")
        }
        let pixels = try ImageProcessor(rule).toPixels(picture)
        return Picture(pixels: pixels, key: Sha256.of(pixels))
    }

    /// The answer's text in one piece; ends where it is when the task is cancelled. Throws as ``stream(_:)`` does.
    public func reply(_ text: String) async throws -> String {
        let stop = Stop()
        return try await withTaskCancellationHandler {
            try answer(text, stop) { _ in }
        } onCancel: {
            stop.now(backend)
        }
    }

    /// The answer to `text` as it comes, in pieces of whole characters that join to the answer.
    ///
    /// An answer that is stopped, by ``cancel()`` or because nobody reads on, ends where it is; what was said by then
    /// is remembered, or, when nothing was, the turn is forgotten. Throws ``MobileMMError`` when the conversation no
    /// longer fits into the model's context, its template refuses it, or a part fails: then the conversation is what
    /// it was before, with the pictures still waiting.
    public nonisolated func stream(_ text: String) -> AsyncThrowingStream<Piece, any Error> {
        AsyncThrowingStream { continuation in
            let stop = Stop()
            continuation.onTermination = { [backend] reason in
                if case .cancelled = reason { stop.now(backend) }
            }
            Task {
                do {
                    _ = try await answer(text, stop) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
        }
    }

    /// Stops the answer that is being given, at once, from any thread.
    public nonisolated func cancel() { backend.cancel() }

    /// Whether one answer is to stop: also one that has not begun yet.
    private final class Stop: Sendable {
        private let isSet = Atomic(false)

        func now(_ backend: any Backend) {
            isSet.store(true, ordering: .sequentiallyConsistent)
            backend.cancel()
        }

        func check() throws {
            if isSet.load(ordering: .sequentiallyConsistent) { throw Cancelled() }
        }
    }

    private func answer(_ text: String, _ stop: Stop, onPiece: @Sendable (Piece) -> Void) throws -> String {
        let turn = Said(role: "user", text: text, pictures: pending)
        var (answer, memory) = ("", "")
        do {
            try speak(messages + [turn], stop) { piece in
                answer += piece.text
                if case .drawing(let drawing) = piece { memory += drawing.signal } else { memory += piece.text }
                onPiece(piece)
            }
        } catch is Cancelled {
            if memory.isEmpty { return "" }
        }
        pending = []
        messages += [turn, Said(role: "assistant", text: memory)]
        return answer
    }

    // MARK: memory

    /// Gives back what can be computed again: the cache, pictures' features, the vision part.
    public func release() {
        decoder = nil
        cached = []
        features = []
        backend.release("vision")
    }

    // MARK: how it is computed

    private func speak(_ messages: [Said], _ stop: Stop, onPiece: (Piece) -> Void) throws {
        backend.resume()
        try stop.check()
        let ids = try tokenizer.encode(
            messages.map { Message(role: $0.role, text: $0.text, images: $0.pictures.count) })
        if ids.count >= model.contextLength {
            throw MobileMMError(
                "the prompt is \(ids.count) tokens long, pictures included; this model's context is"
                    + " \(model.contextLength): shorten it, or start anew")
        }
        try generate(ids, messages.flatMap(\.pictures), room: model.contextLength - ids.count, stop, onPiece: onPiece)
    }

    private func generate(
        _ ids: [Int], _ pictures: [Picture], room: Int, _ stop: Stop, onPiece: (Piece) -> Void
    ) throws {
        let clock = ContinuousClock()
        var stats = Stats(promptTokens: ids.count)
        defer { self.stats = stats }
        answerIds = []
        let features = try see(pictures, &stats)
        try load(&stats)
        let begun = clock.now
        var logits = try prefill(ids, pictures, features, &stats)
        var sampler = Sampler(sampling)
        var text = TextStream({ [tokenizer] in tokenizer.decoded($0) }, stop: bundle.manifest.prompt.stop)
        var seen = ids
        var token = sampler.choose(logits, size: logitsSize, seen: seen)
        stats.ttft = stats.imageSeconds + (clock.now - begun).seconds
        let most = min(sampling.maxNewTokens, room)
        let signals = bundle.manifest.generation?.signalTokenIds ?? []
        while !model.eosTokenIds.contains(token) {
            if token == signals.first {
                let rest = text.end()
                if !rest.isEmpty { onPiece(.text(rest)) }
                let drawing: Drawing
                (drawing, logits) = try draw(signals, stop, onPiece: onPiece)
                seen += signals
                answerIds += signals
                stats.newTokens += signals.count
                stats.drawingSeconds += drawing.seconds
                onPiece(.drawing(drawing))
                text = TextStream({ [tokenizer] in tokenizer.decoded($0) }, stop: bundle.manifest.prompt.stop)
                if stats.newTokens >= most { break }
                token = sampler.choose(logits, size: logitsSize, seen: seen)
                continue
            }
            seen.append(token)
            answerIds.append(token)
            stats.newTokens += 1
            let piece = text.put(token)
            if !piece.isEmpty { onPiece(.text(piece)) }
            if text.stopped || stats.newTokens == most { break }
            try stop.check()
            let step = clock.now
            logits = try feed([token], nil, try textPosition())
            token = sampler.choose(logits, size: logitsSize, seen: seen)
            stats.decodeSeconds += (clock.now - step).seconds
            stats.decodeSteps += 1
        }
        let rest = text.end()
        if !rest.isEmpty { onPiece(.text(rest)) }
    }

    /// What the model draws at this place, and the logits (vocabulary) behind the signal tokens.
    private func draw(
        _ tokens: [Int], _ stop: Stop, onPiece: (Piece) -> Void
    ) throws -> (Drawing, Values<Float>) {
        let generator = generator!
        let signals = try generator.signals()
        let words = signals.shape[2]
        var at = 0
        var logits: Values<Float>?
        for token in tokens {
            try stop.check()
            logits = try feed([token], nil, try textPosition())
            at = signals.floats.write(logits!.prefix(words), from: at)
        }
        let begun = ContinuousClock.now
        // A new one is short enough to be typed again.
        let seed = sampling.seed ?? UInt64(UInt32.random(in: 0...UInt32.max))
        let picture = try generator.draw(signals, seed: seed) { step, steps, decoded in
            try stop.check()
            if sketches { onPiece(.sketch(Sketch(picture: try decoded(), step: step, steps: steps))) }
        }
        if !keepVision { generator.release() }
        let drawing = Drawing(
            picture: picture, seed: seed, seconds: (ContinuousClock.now - begun).seconds,
            signal: String(tokenizer.decoded(tokens, special: true)))
        return (drawing, logits!)
    }

    /// Each picture's features. Before the decoder is loaded, so that memory need not hold both.
    private func see(_ pictures: [Picture], _ stats: inout Stats) throws -> [Tensor] {
        let begun = ContinuousClock.now
        if pictures.contains(where: { picture in !features.contains { $0.key == picture.key } }) {
            try backend.load("vision")
        }
        let loaded = ContinuousClock.now
        let found = try pictures.map(look)
        if !keepVision { backend.release("vision") }
        (stats.loadSeconds, stats.imageSeconds) = ((loaded - begun).seconds, (ContinuousClock.now - loaded).seconds)
        return found
    }

    private func load(_ stats: inout Stats) throws {
        let begun = ContinuousClock.now
        try backend.load("embed")
        if decoder == nil { decoder = try backend.decoder() }
        stats.loadSeconds += (ContinuousClock.now - begun).seconds
    }

    /// Logits (vocabulary) behind the prompt, of which only what the cache lacks is run.
    private func prefill(
        _ ids: [Int], _ pictures: [Picture], _ features: [Tensor], _ stats: inout Stats
    ) throws -> Values<Float> {
        let begun = ContinuousClock.now
        let decoder = decoder!
        cached.removeLast(max(cached.count - decoder.length, 0))
        let keys = pictures.map(\.key)
        let start = min(common(ids, keys), ids.count - 1)
        try decoder.truncate(start)
        cached.removeLast(cached.count - start)
        shown = keys
        stats.cachedTokens = start
        let skipped = ids[..<start].count { $0 == model.imageTokenId }
        let rows = features.isEmpty ? nil : try concatenated(features, skipping: skipped)
        var positions: Tensor?
        if let grid = bundle.manifest.image?.positionGrid {
            let every = ropePositions(ids, imageTokenId: model.imageTokenId, rows: grid[0], columns: grid[1])
            nextPosition = every.joined().max()! + 1
            let tensor = try Tensor(.int64, [3, 1, ids.count - start])
            _ = tensor.values(Int64.self).write(every.flatMap { $0[start...] }.map(Int64.init))
            positions = tensor
        }
        let logits = try feed(Array(ids[start...]), rows, positions)
        stats.prefillSeconds = (ContinuousClock.now - begun).seconds
        return logits
    }

    /// How many ids, and the pictures among them, are those that the cache holds.
    private func common(_ ids: [Int], _ keys: [String]) -> Int {
        let length = min(ids.count, cached.count)
        let common = (0..<length).first { cached[$0] != ids[$0] } ?? length
        let placeholders = (0..<length).filter { ids[$0] == model.imageTokenId }
        let places = stride(from: 0, to: placeholders.count, by: max(model.numImageTokens, 1)).map { placeholders[$0] }
        for (index, place) in places.enumerated() where index < min(shown.count, keys.count) && shown[index] != keys[index] {
            return min(common, place)
        }
        return common
    }

    /// Appends to the cache; logits (vocabulary) behind the last id.
    private func feed(_ ids: [Int], _ rows: Tensor?, _ positions: Tensor?) throws -> Values<Float> {
        let embeds = try embedded(ids, rows)
        var logits: Values<Float>?
        for piece in pieces(ids, rows?.shape[0] ?? 0) {
            let places = try positions?.slice(axis: 2, piece)
            logits = try decoder!.decode(try embeds.slice(axis: 1, piece), positions: places)
        }
        return logits!
    }

    /// What the decoder is fed at once: all ids, or each text and each picture that has features.
    private func pieces(_ ids: [Int], _ rows: Int) -> [Range<Int>] {
        var (found, start) = ([Range<Int>](), 0)
        if backend.prefillsInPieces {
            let places = Array(ids.indices.filter { ids[$0] == model.imageTokenId }.prefix(rows))
            for place in stride(from: 0, to: places.count, by: max(model.numImageTokens, 1)).map({ places[$0] }) {
                if place > start { found.append(start..<place) }
                start = min(place + model.numImageTokens, ids.count)
                found.append(place..<start)
            }
        }
        return start < ids.count ? found + [start..<ids.count] : found
    }

    /// Embeddings (1, ids, hidden) of what the cache is about to hold.
    private func embedded(_ ids: [Int], _ rows: Tensor?) throws -> Tensor {
        let embeds = try embed(backend, model, ids, rows)
        // Before the decoder has them: what is interrupted leaves too many here, never too few.
        cached += ids
        return embeds
    }

    /// The next token's position, where positions have three dimensions.
    private func textPosition() throws -> Tensor? {
        guard bundle.manifest.image?.positionGrid != nil else { return nil }
        let tensor = try Tensor(.int64, [3, 1, 1])
        tensor.values(Int64.self).fill(Int64(nextPosition))
        nextPosition += 1
        return tensor
    }

    /// The picture's features (tokens, hidden), computed once for the same pixels.
    private func look(_ picture: Picture) throws -> Tensor {
        if let index = features.firstIndex(where: { $0.key == picture.key }) {
            features.append(features.remove(at: index))
            return features.last!.rows
        }
        let rule = bundle.manifest.image!
        let pixels = try Tensor(.uint8, [1, 3, rule.height, rule.width])
        pixels.memory.copyBytes(from: picture.pixels)
        let rows = try output("image_features", of: "vision", in: try backend.run("vision", ["pixels": pixels]))
        features.append((picture.key, rows))
        if features.count > Self.maxFeatures { features.removeFirst() }
        return rows
    }

    private func concatenated(_ tensors: [Tensor], skipping skipped: Int) throws -> Tensor {
        let all = try Tensor(.float32, [tensors.reduce(0) { $0 + $1.shape[0] } - skipped, model.hiddenSize])
        var (skip, at) = (skipped * model.hiddenSize, 0)
        for tensor in tensors {
            let passed = min(skip, tensor.count)
            skip -= passed
            at = all.floats.write(tensor.floats[passed...], from: at)
        }
        return all
    }
}

/// Ids' rows of the table (1, length, hidden), and pictures' features in the places of their placeholders.
func embed(_ backend: any Backend, _ model: ModelCard, _ ids: [Int], _ rows: Tensor? = nil) throws -> Tensor {
    let features = try rows ?? Tensor(.float32, [0, model.hiddenSize])
    let found = try backend.run("embed", ["input_ids": try Tensor(ids: ids), "image_features": features])
    return try output("inputs_embeds", of: "embed", in: found)
}

/// An output in float32.
func output(_ name: String, of part: String, in found: [String: Tensor]) throws -> Tensor {
    guard let tensor = found[name] else { throw MobileMMError("part '\(part)' gave no \(name)") }
    return try tensor.toFloats()
}

extension Duration {
    var seconds: Double { Double(components.seconds) + Double(components.attoseconds) * 1e-18 }
}

/// Positions (3, length) of time, row and column, where pictures take rows × columns positions.
///
/// All tokens of a picture that begins at p have the time p, and p plus their place in the grid; the text behind it
/// goes on at p + max(rows, columns). Source: M-RoPE of Qwen2-VL, arXiv 2409.12191, section 2.1.
func ropePositions(_ ids: [Int], imageTokenId: Int, rows: Int, columns: Int) -> [[Int]] {
    var positions: [[Int]] = [[], [], []]
    var (index, position) = (0, 0)
    while index < ids.count {
        if ids[index] != imageTokenId {
            for line in 0..<3 { positions[line].append(position) }
            (index, position) = (index + 1, position + 1)
            continue
        }
        for place in 0..<min(rows * columns, ids.count - index) {
            positions[0].append(position)
            positions[1].append(position + place / columns)
            positions[2].append(position + place % columns)
        }
        index += rows * columns
        position += max(rows, columns)
    }
    return positions
}
