package org.mobilemm

/** One input or output of a part. A dimension is a number (Long), or the name (String) of a dynamic dimension. */
data class TensorSpec(val name: String, val dtype: String, val shape: List<Any>)

/** How a part's weights are stored, as in the manifest's JSON Schema. */
data class Quantization(
    val bits: Int,
    val blockSize: Int?,
    val symmetric: Boolean,
    val method: String,
    val activations: String,
    val exceptions: Map<String, Long>,
)

/** The shipped part against fp32 PyTorch, as measured when the bundle was made. */
data class Parity(
    val cosine: Double,
    val snrDb: Double,
    val maxAbsError: Double,
    val conversionDb: Double,
    val top1: Double?,
    val nearTies: Double?,
    val kl: Double?,
    /** Of a decoder: what is kept behind each of its layers, in dB. */
    val layers: List<Double>?,
)

/** One exported part. [file] is what a runtime opens; [files] all that it consists of. */
data class Part(
    val file: String,
    val files: List<String>,
    val inputs: List<TensorSpec>,
    val outputs: List<TensorSpec>,
    val quantization: Quantization,
    val bytes: Long,
    val parameters: Long,
    val peakMemory: Long,
    val fingerprint: String,
    val parity: Parity?,
    val cache: String?,
)

/** The model's dimensions and special tokens. */
data class ModelCard(
    val name: String,
    val family: String,
    val license: String,
    val contextLength: Int,
    val hiddenSize: Int,
    val vocabSize: Int,
    val numLayers: Int,
    val numAttentionHeads: Int,
    val numKeyValueHeads: Int,
    val headDim: Int,
    val numImageTokens: Int,
    val imageTokenId: Int,
    val bosTokenId: Int?,
    val eosTokenIds: List<Int>,
    val padTokenId: Int,
)

/**
 * How a picture becomes `pixels`, uint8 (1, 3, height, width). Normalization is inside the graph.
 *
 * The picture is turned upright, its transparency laid over white; then, by [strategy]: "stretch" resizes to
 * height × width; "pad" pads to a centred square with [padColor] first; "crop" resizes so that the shorter side is
 * [shortestEdge] and cuts the centre out. [filter] is Pillow's of that name, antialiased.
 */
data class ImageRule(
    val height: Int,
    val width: Int,
    val strategy: String,
    val filter: String,
    val padColor: List<Int>,
    val shortestEdge: Int?,
    val positionGrid: List<Int>?,
)

/** What stands before and behind a message's content. */
data class Turn(val prefix: String, val suffix: String, val prefixBeforeImage: String?, val text: Boolean)

/** A conversation and what its rendering must be; `<image>` stands for a picture's placeholders. */
data class RenderedExample(val messages: List<Map<String, Any?>>, val rendered: String, val inputIds: List<Int>)

/** A conversation as text, without a template language; how is told beside [render]. */
data class Prompt(
    val tokenizer: String,
    val begin: String,
    val system: Turn?,
    val user: Turn,
    val assistant: Turn,
    val generation: String,
    val laterUser: Turn?,
    val userAfterSystem: Turn?,
    val imagePrefix: String,
    val imageSuffix: String,
    val strip: String,
    val addBos: Boolean,
    val stop: List<String>,
    val examples: List<RenderedExample>,
)

/**
 * How a picture is drawn, in a bundle with the parts `output_projector` and `generator`, or step by step.
 *
 * When the model says the first signal token, all of them are fed to it, whatever it would have said next. Their
 * logits, of the vocabulary's first words only (as many as `signal_logits` has), go through `output_projector`;
 * `condition` and `noise` through `generator`; `picture`, float32 (1, 3, height, width) in [0, 1], is shown. The model
 * goes on behind the last signal token.
 *
 * With `schedules` the parts `denoiser` and `image_decoder` are there instead of `generator`. The first noise is the
 * first `latents`; each row of a schedule, as `scales`, goes through `denoiser` with latents, condition and noise, and
 * `next_latents` are the next step's; `image_decoder` makes `picture` of the last. A row whose last number is not 0
 * takes the next noise, others take zeros.
 */
data class Generation(
    val signalTokenIds: List<Int>,
    val height: Int,
    val width: Int,
    val steps: Int,
    /** Of the noise; its numbers are those of [Noise]. */
    val noiseShape: List<Long>,
    /** Each of as many steps as it has rows; null where all steps are one graph. */
    val schedules: List<List<FloatArray>>?,
)

/** Vectors to check a part by, and the least signal-to-noise ratio in dB that it must come within. */
data class Golden(val file: String, val part: String, val floorDb: Double)

/** One whole conversation, and the greedy answer that the bundle gave when it was made. */
data class GoldenConversation(
    val image: String?,
    val prompt: String,
    val inputIds: List<Int>,
    val answerIds: List<Int>,
    val answer: String,
    /** What the checkpoint itself said, in PyTorch. */
    val pytorchAnswer: String?,
)

/** A file of the bundle. */
data class BundleFile(val path: String, val bytes: Long, val sha256: String)

/** `manifest.json`, version 1. Its keys are those of `bundle_v1.schema.json`. */
data class Manifest(
    val createdBy: Map<String, String>,
    val target: String,
    val runtimeName: String,
    val runtimeMinVersion: String,
    val model: ModelCard,
    val parts: Map<String, Part>,
    val image: ImageRule?,
    val prompt: Prompt,
    /** Null in bundles that do not draw. */
    val generation: Generation?,
    val golden: List<Golden>,
    val conversations: List<GoldenConversation>,
    val benchmarks: List<Map<String, Any?>>,
    val files: List<BundleFile>,
)
