/// The language model with the keys and values of one conversation.
public protocol Decoder: AnyObject {
    /// How many positions the cache holds.
    var length: Int { get }

    /// Appends `embeds` (1, n, hidden) to the cache; float32 logits (vocabulary) behind the last one, valid until the
    /// next call. `positions` int64 (3, 1, n) only for models whose positions have three dimensions; others count by
    /// themselves.
    ///
    /// When it throws, the cache is what it was before. Throws ``MobileMMError`` when the cache would grow longer than
    /// the model's context, ``Cancelled`` when somebody has cancelled.
    func decode(_ embeds: Tensor, positions: Tensor?) throws -> Values<Float>

    /// Forgets all positions from `length` on.
    func truncate(_ length: Int) throws
}

/// One bundle, its parts loaded when they are first used.
///
/// A backend computes on whatever thread calls it, one call at a time; only ``cancel()`` may come from any.
/// A ``Session`` calls it on a thread of its own.
public protocol Backend: AnyObject, Sendable {
    /// What runs it here, for people: a name and a version.
    var runtime: String { get }

    /// Whether a prompt goes to the decoder in pieces: each text, and each picture by itself.
    var prefillsInPieces: Bool { get }

    /// Loads a part now. Throws ``MobileMMError`` when it cannot be loaded.
    func load(_ part: String) throws

    /// Gives a part's memory back; the next use loads it again.
    func release(_ part: String)

    /// Runs a part that keeps no state: its outputs by name. Throws ``MobileMMError`` when it cannot.
    func run(_ part: String, _ inputs: [String: Tensor]) throws -> [String: Tensor]

    /// A decoder with an empty cache. Several share the weights.
    func decoder() throws -> any Decoder

    /// Stops what runs now, from any thread: it throws ``Cancelled``. So does what comes next, until ``resume()``.
    func cancel()

    /// Takes back ``cancel()``.
    func resume()
}

extension Backend {
    public var prefillsInPieces: Bool { false }
}

/// What runs this bundle on this device: Core ML on Apple's systems, ONNX Runtime on Linux, ExecuTorch where it is linked.
///
/// Throws ``MobileMMError`` for targets that it has no runtime for.
public func openBackend(_ bundle: ModelBundle, threads: Int = 0) async throws -> any Backend {
    var known: [String] = []
    #if canImport(CoreML)
        if bundle.manifest.target == "coreml" { return try await CoreMLBackend.open(bundle) }
        known.append("coreml")
    #endif
    #if canImport(COnnxRuntime)
        if bundle.manifest.target == "onnx" { return try OnnxBackend(bundle, threads: threads) }
        known.append("onnx")
    #endif
    #if canImport(ExecuTorch)
        if bundle.manifest.target == "executorch" { return ExecuTorchBackend(bundle) }
        known.append("executorch")
    #endif
    throw MobileMMError(
        "\(bundle.folder.path): is for \(bundle.manifest.target), and this system runs bundles for"
            + " \(known.joined(separator: " and ")): export the model with --target \(known[0])")
}
