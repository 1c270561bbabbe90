package org.mobilemm

import java.nio.FloatBuffer
import java.security.MessageDigest
import java.util.LinkedHashMap

/**
 * What one answer took. Times in seconds; loading of parts is not part of the others.
 *
 * `ttft` is from the question to the first token, pictures included. The first token comes from the prefill, so
 * `decodeSeconds` is that of `decodeSteps` further ones.
 */
class Stats(val promptTokens: Int) {
    var cachedTokens = 0
    var newTokens = 0
    var loadSeconds = 0.0
    var imageSeconds = 0.0
    var prefillSeconds = 0.0
    var decodeSeconds = 0.0
    var ttft = 0.0
    var drawingSeconds = 0.0
    var decodeSteps = 0

    /** Tokens a second that were read. */
    val prefillRate get() = if (prefillSeconds > 0) (promptTokens - cachedTokens) / prefillSeconds else 0.0

    /** Tokens a second that were written. */
    val decodeRate get() = if (decodeSeconds > 0) decodeSteps / decodeSeconds else 0.0
}

/**
 * One conversation with a bundle, over whatever runs it.
 *
 * Each turn renders and tokenizes the whole conversation, and prefills only what the cache does not hold already: so
 * what is said never depends on how the cache came about.
 *
 * @param backend what runs the bundle's parts; several sessions may share one.
 * @param keepVision false gives the vision part's memory back behind each question about a new picture, and that of the
 *   parts that draw behind each drawing.
 * @param steps of a drawing; null: those that the bundle was made for. Raises [MobileMMError] for others than it draws in.
 * @param sketches whether a drawing that is made step by step comes as a [Sketch] first behind each step but the last.
 *   Each takes a run of the part that decodes latents.
 */
class Session(
    val bundle: Bundle,
    private val backend: Backend,
    sampling: Sampling = Sampling(),
    system: String? = null,
    private val keepVision: Boolean = true,
    steps: Int? = null,
    private val sketches: Boolean = false,
) : Conversation(sampling, system), AutoCloseable {
    private val manifest = bundle.manifest
    private val model = manifest.model
    private val processor = manifest.image?.let(::ImageProcessor)
    private val tokenizer =
        PromptTokenizer(
            Tokenizer.read(bundle.file(manifest.prompt.tokenizer)),
            manifest.prompt,
            model.imageTokenId,
            model.numImageTokens,
        )
    private val generator =
        manifest.generation.let {
            if (it == null && steps != null) throw MobileMMError("${bundle.folder}: $steps steps are wanted, but this bundle does not draw")
            it?.let { PictureGenerator(bundle, backend, it, steps) }
        }
    private val logitsSize = minOf(tokenizer.size, model.vocabSize)

    /** Of the last answer. */
    var stats: Stats? = null
        private set

    /** Of the last answer, its end token apart. */
    val answerIds: List<Int> get() = answered
    private val answered = ArrayList<Int>()
    private var decoder: Decoder? = null

    /** Features of the pictures used last. */
    private val features =
        object : LinkedHashMap<String, Tensor>(16, 0.75f, true) {
            override fun removeEldestEntry(eldest: MutableMap.MutableEntry<String, Tensor>) = size > MAX_FEATURES
        }

    // What the cache holds: ids, perhaps more of them than the decoder has taken in; and pictures.
    private val cached = ArrayList<Int>()
    private var shown: List<String> = emptyList()
    private var nextPosition = 0L

    override fun cancel() = backend.cancel()

    override fun close() {
        decoder?.close()
        decoder = null
        cached.clear()
    }

    /**
     * Does before the first question what it would wait for: loads the parts, unless memory is short, and resizes a
     * picture, which a virtual machine does ten times as fast once it has compiled it. Raises [MobileMMError].
     */
    fun warm() {
        if (processor != null) {
            processor.toPixels(PixelRaster(WARM_WIDTH, WARM_HEIGHT, IntArray(WARM_WIDTH * WARM_HEIGHT)))
            if (keepVision) SEES.forEach(backend::load)
        }
        // Where the parts must not be in memory together, a picture comes first.
        if (keepVision || processor == null) load(Stats(0))
    }

    /** Gives back what can be computed again: the cache, pictures' features, the parts that see and draw. */
    fun release() {
        close()
        features.clear()
        for (part in SEES + PictureGenerator.parts(bundle)) backend.release(part)
    }

    /** As the vision part takes it. Raises [MobileMMError] when the bundle takes no pictures. */
    fun picture(picture: Raster): Picture = prepare(picture)

    override fun prepare(picture: Raster): Picture {
        if (processor == null) throw MobileMMError("${bundle.folder}: this bundle takes no pictures")
        val pixels = processor.toPixels(picture)
        return Picture(pixels, Bundle.hex(MessageDigest.getInstance("SHA-256").digest(pixels)))
    }

    override fun answer(
        messages: List<Said>,
        onPiece: (Piece) -> Unit,
    ) {
        backend.resume()
        val ids = tokenizer.encode(messages.map { Message(it.role, it.text, it.pictures.size) })
        if (ids.size >= model.contextLength) {
            throw MobileMMError(
                "the prompt is ${ids.size} tokens long, pictures included; this model's context is ${model.contextLength}:" +
                    " shorten it, or start anew",
            )
        }
        generate(ids, messages.flatMap { it.pictures }, model.contextLength - ids.size, onPiece)
    }

    private fun generate(
        ids: List<Int>,
        pictures: List<Picture>,
        room: Int,
        onPiece: (Piece) -> Unit,
    ) {
        val stats = Stats(ids.size).also { this.stats = it }
        answered.clear()
        val found = see(pictures, stats)
        load(stats)
        val begun = System.nanoTime()
        var logits = prefill(ids, pictures, found, stats)
        val sampler = Sampler(sampling)
        var text = TextStream({ tokenizer.decode(it) }, manifest.prompt.stop)

        fun say(words: String) {
            if (words.isNotEmpty()) onPiece(Words(words))
        }
        val seen = ArrayList(ids)
        var token = sampler.choose(logits, logitsSize, seen)
        stats.ttft = stats.imageSeconds + secondsSince(begun)
        val most = minOf(sampling.maxNewTokens, room)
        val generation = manifest.generation
        while (token !in model.eosTokenIds) {
            if (generation != null && token == generation.signalTokenIds[0]) {
                say(text.end())
                onPiece(Drawing)
                val (drawn, behind) = draw(generation, onPiece)
                logits = behind
                seen += generation.signalTokenIds
                answered += generation.signalTokenIds
                stats.newTokens += generation.signalTokenIds.size
                stats.drawingSeconds += drawn.seconds
                onPiece(drawn)
                text = TextStream({ tokenizer.decode(it) }, manifest.prompt.stop)
                if (stats.newTokens >= most) break
                token = sampler.choose(logits, logitsSize, seen)
                continue
            }
            seen += token
            answered += token
            stats.newTokens++
            say(text.put(token))
            if (text.stopped || stats.newTokens == most) break
            val step = System.nanoTime()
            logits = feed(listOf(token), null, textPosition())
            token = sampler.choose(logits, logitsSize, seen)
            stats.decodeSeconds += secondsSince(step)
            stats.decodeSteps++
        }
        say(text.end())
    }

    /** What the model draws at this place, and the logits (vocabulary) behind the signal tokens. */
    private fun draw(
        generation: Generation,
        onPiece: (Piece) -> Unit,
    ): Pair<Drawn, FloatBuffer> {
        val generator = generator!!
        val signals = generator.signals()
        val rows = signals.floats()
        val words = rows.capacity() / generation.signalTokenIds.size
        lateinit var logits: FloatBuffer
        for (id in generation.signalTokenIds) {
            logits = feed(listOf(id), null, textPosition())
            val row = logits.duplicate()
            row.limit(words)
            rows.put(row)
        }
        val begun = System.nanoTime()
        val seed = chooseSeed(sampling.seed)
        val shown =
            generator.draw(signals, seed) { step, steps, decoded ->
                if (sketches) onPiece(Sketch(decoded(), step, steps))
            }
        if (!keepVision) generator.release()
        return Drawn(shown, seed, tokenizer.decode(generation.signalTokenIds, special = true), secondsSince(begun)) to logits
    }

    /** Each picture's features. Before the decoder is loaded, so that memory need not hold both. */
    private fun see(
        pictures: List<Picture>,
        stats: Stats,
    ): List<Tensor> {
        val begun = System.nanoTime()
        if (pictures.any { it.key !in features }) backend.load("vision")
        val loaded = System.nanoTime()
        val found = pictures.map(::look)
        if (!keepVision) SEES.forEach(backend::release)
        stats.loadSeconds = (loaded - begun) / 1e9
        stats.imageSeconds = secondsSince(loaded)
        return found
    }

    private fun load(stats: Stats) {
        val begun = System.nanoTime()
        backend.load("embed")
        if (decoder == null) decoder = backend.decoder()
        stats.loadSeconds += secondsSince(begun)
    }

    /** Logits (vocabulary) behind the prompt, of which only what the cache lacks is run. */
    private fun prefill(
        ids: List<Int>,
        pictures: List<Picture>,
        found: List<Tensor>,
        stats: Stats,
    ): FloatBuffer {
        val decoder = decoder!!
        val begun = System.nanoTime()
        cut(decoder.length)
        val keys = pictures.map { it.key }
        val start = minOf(common(ids, keys), ids.size - 1)
        decoder.truncate(start)
        cut(start)
        shown = keys
        stats.cachedTokens = start
        val skipped = ids.subList(0, start).count { it == model.imageTokenId }
        val rows = if (found.isEmpty()) null else concatenated(found, skipped)
        val positions =
            manifest.image?.positionGrid?.let { (gridRows, gridColumns) ->
                val every = ropePositions(ids, model.imageTokenId, gridRows, gridColumns)
                nextPosition = every.maxOf { it.max() } + 1
                positionTensor(every, start)
            }
        val logits = feed(ids.subList(start, ids.size).toList(), rows, positions)
        stats.prefillSeconds = secondsSince(begun)
        return logits
    }

    private fun cut(length: Int) {
        while (cached.size > length) cached.removeAt(cached.lastIndex)
    }

    /** How many ids, and the pictures among them, are those that the cache holds. */
    private fun common(
        ids: List<Int>,
        keys: List<String>,
    ): Int {
        val length = minOf(ids.size, cached.size)
        val common = (0 until length).firstOrNull { cached[it] != ids[it] } ?: length
        val places = (0 until length).filter { ids[it] == model.imageTokenId }.filterIndexed { index, _ -> index % maxOf(model.numImageTokens, 1) == 0 }
        for ((index, place) in places.withIndex()) {
            if (index >= shown.size || index >= keys.size) break
            if (shown[index] != keys[index]) return minOf(common, place)
        }
        return common
    }

    /** Appends to the cache; logits (vocabulary) behind the last id. */
    private fun feed(
        ids: List<Int>,
        rows: Tensor?,
        positions: Tensor?,
    ): FloatBuffer {
        val features = rows ?: Tensor.of("float32", 0, model.hiddenSize.toLong())
        val embeds = backend.run("embed", mapOf("input_ids" to Tensor.ofIds(ids), "image_features" to features)).getValue("inputs_embeds")
        // Before the decoder has them: what is interrupted leaves too many here, never too few.
        cached += ids
        lateinit var logits: FloatBuffer
        for (piece in pieces(ids, rows?.shape?.get(0)?.toInt() ?: 0)) {
            val (start, end) = piece.first to piece.last + 1
            logits = decoder!!.decode(embeds.slice(1, start, end), positions?.slice(2, start, end))
        }
        return logits
    }

    /** What the decoder is fed at once: all ids, or each text and each picture that has features. */
    private fun pieces(
        ids: List<Int>,
        rows: Int,
    ): List<IntRange> {
        if (!backend.prefillsInPieces || rows == 0) return listOf(ids.indices)
        val found = ArrayList<IntRange>()
        var start = 0
        val places = ids.indices.filter { ids[it] == model.imageTokenId }.take(rows)
        for (place in places.filterIndexed { index, _ -> index % maxOf(model.numImageTokens, 1) == 0 }) {
            if (place > start) found += start until place
            start = minOf(place + model.numImageTokens, ids.size)
            found += place until start
        }
        if (start < ids.size) found += start until ids.size
        return found
    }

    /** The next token's position, where positions have three dimensions. */
    private fun textPosition(): Tensor? {
        if (manifest.image?.positionGrid == null) return null
        val tensor = Tensor.of("int64", 3, 1, 1)
        val longs = tensor.view().asLongBuffer()
        repeat(3) { longs.put(nextPosition) }
        nextPosition++
        return tensor
    }

    /** The picture's features (tokens, hidden), computed once for the same pixels. */
    private fun look(picture: Picture): Tensor =
        features.getOrPut(picture.key) {
            val rule = manifest.image!!
            val pixels = Tensor.of("uint8", 1, 3, rule.height.toLong(), rule.width.toLong())
            pixels.view().put(picture.pixels)
            backend.run("vision", mapOf("pixels" to pixels)).getValue("image_features")
        }

    private fun concatenated(
        tensors: List<Tensor>,
        skippedRows: Int,
    ): Tensor {
        val rows = tensors.sumOf { it.shape[0] }
        val all = Tensor.of("float32", rows - skippedRows, model.hiddenSize.toLong())
        val target = all.view()
        var skip = skippedRows * model.hiddenSize * Float.SIZE_BYTES
        for (tensor in tensors) {
            val source = tensor.view()
            val passed = minOf(skip, source.limit())
            source.position(passed)
            skip -= passed
            target.put(source)
        }
        return all
    }

    private companion object {
        const val MAX_FEATURES = 16

        // Of a small photograph.
        const val WARM_WIDTH = 1280
        const val WARM_HEIGHT = 960
        val SEES = listOf("vision")
    }
}

internal fun secondsSince(nanoTime: Long) = (System.nanoTime() - nanoTime) / 1e9

private fun positionTensor(
    every: Array<LongArray>,
    start: Int,
): Tensor {
    val count = every[0].size - start
    val tensor = Tensor.of("int64", 3, 1, count.toLong())
    val longs = tensor.view().asLongBuffer()
    for (line in every) longs.put(line, start, count)
    return tensor
}

/**
 * Positions (3, length) of time, row and column, where pictures take rows × columns positions.
 *
 * All tokens of a picture that begins at p have the time p, and p plus their place in the grid; the text behind it
 * goes on at p + max(rows, columns). Source: M-RoPE of Qwen2-VL, arXiv 2409.12191, section 2.1.
 */
internal fun ropePositions(
    ids: List<Int>,
    imageTokenId: Int,
    rows: Int,
    columns: Int,
): Array<LongArray> {
    val positions = Array(3) { LongArray(ids.size) }
    var index = 0
    var position = 0L
    while (index < ids.size) {
        if (ids[index] != imageTokenId) {
            for (line in positions) line[index] = position
            index++
            position++
            continue
        }
        for (place in 0 until minOf(rows * columns, ids.size - index)) {
            positions[0][index + place] = position
            positions[1][index + place] = position + place / columns
            positions[2][index + place] = position + place % columns
        }
        index += rows * columns
        position += maxOf(rows, columns)
    }
    return positions
}
