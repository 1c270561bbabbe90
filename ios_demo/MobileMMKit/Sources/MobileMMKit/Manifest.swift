/// A size of a tensor: a number, or the name of a dynamic dimension.
public enum Dimension: Hashable, Sendable {
    case fixed(Int)
    case named(String)

    public var size: Int? { if case .fixed(let size) = self { size } else { nil } }
}

/// One input or output of a part.
public struct TensorSpec: Sendable {
    public let name: String
    public let dtype: DType
    public let shape: [Dimension]
}

/// How a part's weights are stored, as in the manifest's JSON Schema.
public struct Quantization: Sendable {
    public let bits: Int
    public let blockSize: Int?
    public let symmetric: Bool
    public let method: String
    public let activations: String
    public let exceptions: [String: Int]
}

/// The shipped part against fp32 PyTorch, as measured when the bundle was made.
public struct Parity: Sendable {
    public let cosine: Double
    public let snrDb: Double
    public let maxAbsError: Double
    public let conversionDb: Double
    public let top1: Double?
    public let nearTies: Double?
    public let kl: Double?
    /// Of a decoder: what is kept behind each of its layers, in dB.
    public let layers: [Double]?
}

/// One exported part. `file` is what a runtime opens; `files` all that it consists of.
public struct Part: Sendable {
    public let file: String
    public let files: [String]
    public let inputs: [TensorSpec]
    public let outputs: [TensorSpec]
    public let quantization: Quantization
    public let bytes: Int
    public let parameters: Int
    public let peakMemory: Int
    public let fingerprint: String
    public let parity: Parity?
    public let cache: String?
}

/// The model's dimensions and special tokens.
public struct ModelCard: Sendable {
    public let name: String
    public let family: String
    public let license: String
    public let contextLength: Int
    public let hiddenSize: Int
    public let vocabSize: Int
    public let numLayers: Int
    public let numAttentionHeads: Int
    public let numKeyValueHeads: Int
    public let headDim: Int
    public let numImageTokens: Int
    public let imageTokenId: Int
    public let bosTokenId: Int?
    public let eosTokenIds: [Int]
    public let padTokenId: Int
}

/// How a picture becomes `pixels`, uint8 (1, 3, height, width). Normalization is inside the graph.
///
/// The picture is turned upright, its transparency laid over white; then, by ``strategy``: "stretch" resizes to
/// height × width; "pad" pads to a centred square with ``padColor`` first; "crop" resizes so that the shorter side is
/// ``shortestEdge`` and cuts the centre out. ``filter`` is Pillow's of that name, antialiased.
public struct ImageRule: Sendable {
    public let height: Int
    public let width: Int
    public let strategy: String
    public let filter: String
    public let padColor: [Int]
    public let shortestEdge: Int?
    public let positionGrid: [Int]?
}

/// What stands before and behind a message's content.
public struct Turn: Sendable {
    public let prefix: String
    public let suffix: String
    public let prefixBeforeImage: String?
    public let text: Bool
}

/// A conversation and what its rendering must be; `<image>` stands for a picture's placeholders.
public struct RenderedExample: Sendable {
    public let messages: [JsonObject]
    public let rendered: String
    public let inputIds: [Int]
}

/// A conversation as text, without a template language; how is told beside ``render(_:_:addGenerationPrompt:)``.
public struct Prompt: Sendable {
    public let tokenizer: String
    public let begin: String
    public let system: Turn?
    public let user: Turn
    public let assistant: Turn
    public let generation: String
    public let laterUser: Turn?
    public let userAfterSystem: Turn?
    public let imagePrefix: String
    public let imageSuffix: String
    public let strip: String
    public let addBos: Bool
    public let stop: [String]
    public let examples: [RenderedExample]
}

/// How a picture is drawn, in a bundle with the parts `output_projector` and `generator`, or step by step.
///
/// When the model says the first signal token, all of them are fed to it, whatever it would have said next. Their
/// logits, of the vocabulary's first words only (as many as `signal_logits` has), go through `output_projector`;
/// `condition` and `noise` through `generator`; `picture`, float32 (1, 3, height, width) in [0, 1], is shown. The model
/// goes on behind the last signal token.
///
/// With `schedules` the parts `denoiser` and `image_decoder` are there instead of `generator`. The first noise is the
/// first `latents`; each row of a schedule, as `scales`, goes through `denoiser` with latents, condition and noise, and
/// `next_latents` are the next step's; `image_decoder` makes `picture` of the last. A row whose last number is not 0
/// takes the next noise, others take zeros.
public struct Generation: Sendable {
    public let signalTokenIds: [Int]
    public let height: Int
    public let width: Int
    public let steps: Int
    /// Of the noise; its numbers are those of ``Noise``.
    public let noiseShape: [Int]
    /// Each of as many steps as it has rows; nil where all steps are one graph.
    public let schedules: [[[Float]]]?

    /// The most steps of a schedule.
    static let mostSteps = 50
}

/// Vectors to check a part by, and the least signal-to-noise ratio in dB that it must come within.
public struct Golden: Sendable {
    public let file: String
    public let part: String
    public let floorDb: Double
}

/// One whole conversation, and the greedy answer that the bundle gave when it was made.
public struct GoldenConversation: Sendable {
    public let image: String?
    public let prompt: String
    public let inputIds: [Int]
    public let answerIds: [Int]
    public let answer: String
    /// What the checkpoint itself said, in PyTorch.
    public let pytorchAnswer: String?
}

/// A file of the bundle.
public struct BundleFile: Sendable {
    public let path: String
    public let bytes: Int
    public let sha256: String
}

/// `manifest.json`, version 1. Its keys are those of `bundle_v1.schema.json`.
public struct Manifest: Sendable {
    public let createdBy: [String: String]
    public let target: String
    public let runtimeName: String
    public let runtimeMinVersion: String
    public let model: ModelCard
    public let parts: [String: Part]
    public let image: ImageRule?
    public let prompt: Prompt
    /// How a picture is drawn; nil in bundles that do not draw.
    public let generation: Generation?
    public let golden: [Golden]
    public let conversations: [GoldenConversation]
    public let benchmarks: [JsonObject]
    public let files: [BundleFile]
}
