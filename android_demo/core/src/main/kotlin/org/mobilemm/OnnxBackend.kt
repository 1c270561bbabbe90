package org.mobilemm

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtLoggingLevel
import ai.onnxruntime.OrtSession
import ai.onnxruntime.TensorInfo
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer

/**
 * ONNX bundles on ONNX Runtime's CPU kernels, keys and values in buffers that stay where they are.
 *
 * @param threads 0 for as many as ONNX Runtime takes by itself.
 */
class OnnxBackend(private val bundle: Bundle, private val threads: Int = 0) : Backend {
    // What goes wrong is raised; the log would say it again.
    private val environment = OrtEnvironment.getEnvironment(OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL, "mobilemm")
    private val sessions = HashMap<String, OrtSession>()
    internal val run = OrtSession.RunOptions()

    @Volatile internal var cancelled = false
        private set

    init {
        val wanted = bundle.manifest.runtimeMinVersion
        if (olderThan(environment.version, wanted)) {
            throw MobileMMError("${bundle.folder}: needs onnxruntime $wanted or newer, in this app is ${environment.version}: update it")
        }
    }

    override val runtime get() = "onnxruntime ${environment.version}"

    override val prefillsInPieces get() = false

    override fun load(part: String) {
        session(part)
    }

    override fun release(part: String) {
        sessions.remove(part)?.close()
    }

    override fun run(
        part: String,
        inputs: Map<String, Tensor>,
    ): Map<String, Tensor> {
        val session = session(part)
        val given = LinkedHashMap<String, OnnxTensor>()
        try {
            for ((name, tensor) in inputs) given[name] = onnxTensor(tensor)
            return guarded(part) { session.run(given, session.outputNames, emptyMap(), run) }.use { result ->
                result.associate { (name, value) -> name to copied(value as OnnxTensor) }
            }
        } finally {
            given.values.forEach { it.close() }
        }
    }

    override fun decoder(): Decoder = OnnxDecoder(this, session("decoder"), bundle)

    override fun cancel() {
        cancelled = true
        run.setTerminate(true)
    }

    override fun resume() {
        cancelled = false
        run.setTerminate(false)
    }

    override fun close() {
        sessions.values.forEach { it.close() }
        sessions.clear()
        run.close()
    }

    internal fun onnxTensor(tensor: Tensor): OnnxTensor =
        OnnxTensor.createTensor(environment, tensor.view(), tensor.shape.toLongArray(), TYPES.getValue(tensor.dtype))

    /** Runs a session; what it raises becomes one line, or [Cancelled]. */
    internal fun <T> guarded(
        part: String,
        action: () -> T,
    ): T {
        if (cancelled) throw Cancelled()
        try {
            return action()
        } catch (error: OrtException) {
            if (cancelled) throw Cancelled()
            throw MobileMMError("${bundle.partFile(part)}: part '$part' failed (${oneLine(error)})", error)
        }
    }

    private fun session(part: String): OrtSession =
        sessions.getOrPut(part) {
            val file = bundle.partFile(part)
            OrtSession.SessionOptions().use { options ->
                options.setExecutionMode(OrtSession.SessionOptions.ExecutionMode.SEQUENTIAL)
                options.setInterOpNumThreads(1)
                if (threads > 0) options.setIntraOpNumThreads(threads)
                try {
                    environment.createSession(file.path, options).also { checkInterface(part, it) }
                } catch (error: OrtException) {
                    throw MobileMMError("$file: cannot be loaded by onnxruntime (${oneLine(error)})", error)
                }
            }
        }

    /** Inputs and outputs as the manifest has them. */
    private fun checkInterface(
        part: String,
        session: OrtSession,
    ) {
        val specs = bundle.manifest.parts.getValue(part)
        for ((side, listed, found) in listOf(
            Triple("input", specs.inputs, session.inputInfo),
            Triple("output", specs.outputs, session.outputInfo),
        )) {
            val names = listed.map { it.name }.toSet()
            val wrong =
                (found.keys - names).firstOrNull()?.let { "$side ${shown(it)} is not in the manifest" }
                    ?: (names - found.keys - HAVE_DEFAULTS).firstOrNull()?.let { "$side ${shown(it)} is not in the graph" }
                    ?: listed.firstNotNullOfOrNull { spec -> found[spec.name]?.let { mismatch(side, spec, it.info as? TensorInfo) } }
            if (wrong != null) {
                session.close()
                throw MobileMMError("${bundle.partFile(part)}: $wrong; ${ManifestReader.AGAIN}")
            }
        }
    }

    private fun mismatch(
        side: String,
        spec: TensorSpec,
        info: TensorInfo?,
    ): String? {
        if (info == null || TYPES.getValue(spec.dtype) != info.type) {
            return "$side ${shown(spec.name)} is ${info?.type ?: "no tensor"}; the manifest says ${spec.dtype}"
        }
        // A dynamic dimension is -1 here, under any name.
        val wanted = spec.shape.map { it as? Long ?: -1L }
        if (info.shape.toList() == wanted) return null
        return "$side ${shown(spec.name)} has the shape ${info.shape.toList()}; the manifest says $wanted"
    }

    private fun copied(value: OnnxTensor): Tensor {
        val info = value.info
        val dtype = TYPES.entries.firstOrNull { it.value == info.type }?.key ?: throw MobileMMError("an output of type ${info.type}")
        val source: ByteBuffer = value.byteBuffer
        val tensor = Tensor.of(dtype, *info.shape)
        tensor.view().put(source)
        return tensor
    }

    internal companion object {
        /** Inputs with a default value, which this runtime does not list: the last position's logits. */
        val HAVE_DEFAULTS = setOf("logits_positions")

        val TYPES =
            mapOf(
                "float32" to OnnxJavaType.FLOAT,
                "float16" to OnnxJavaType.FLOAT16,
                "uint8" to OnnxJavaType.UINT8,
                "int8" to OnnxJavaType.INT8,
                "int32" to OnnxJavaType.INT32,
                "int64" to OnnxJavaType.INT64,
            )

        /** Versions such as 1.23.2, compared number by number. */
        fun olderThan(
            version: String,
            wanted: String,
        ): Boolean {
            val (have, want) = listOf(version, wanted).map { text -> text.split('.', '-', '+').mapNotNull(String::toIntOrNull) }
            for (index in 0 until maxOf(have.size, want.size)) {
                val difference = have.getOrElse(index) { 0 } - want.getOrElse(index) { 0 }
                if (difference != 0) return difference < 0
            }
            return false
        }
    }
}

/**
 * A [Decoder] on ONNX Runtime: one conversation's keys and values.
 *
 * A graph whose attention writes into the buffers that it reads from gets each buffer as input and as output, and the
 * length of `attention_mask` says how much of them counts; they are copied into buffers twice as long when they are
 * full. Of a graph that concatenates, each step's outputs are the next step's inputs. A long prompt goes in chunks:
 * what a step needs beside the cache stays small, and a stop need not wait.
 */
private class OnnxDecoder(
    private val backend: OnnxBackend,
    private val session: OrtSession,
    bundle: Bundle,
) : Decoder {
    private val model = bundle.manifest.model
    private val part = bundle.manifest.parts.getValue("decoder")
    private val concatenated = part.cache == "concatenated"
    private val past = cacheNames("past_key_values.", model.numLayers)
    private val present = cacheNames("present.", model.numLayers)
    private val cacheType = part.inputs.first { it.name == past[0] }.dtype
    private val embedsType = part.inputs.first { it.name == "inputs_embeds" }.dtype
    private val takesPositions = part.inputs.any { it.name == "position_ids" }
    private val requested = session.outputNames.toSet()

    private val inputs = LinkedHashMap<String, OnnxTensor>()

    /** Outputs that have their place, and those that get one at each run. */
    private val outputs = LinkedHashMap<String, OnnxTensor>()
    private val free get() = if (concatenated) requested else if (logitsOut == null) setOf("logits") else emptySet()

    /** Where keys and values are, by the name of the input; in order. */
    private var caches: Map<String, Tensor> = past.associateWith { cache(0) }
    private var capacity = 0
    private var mask = ones(0)
    private val logits = Tensor.of("float32", 1, 1, model.vocabSize.toLong())

    /** Where a graph that gives the last position's logits alone writes them; null for others. */
    private val logitsOut =
        part.outputs.first { it.name == "logits" }
            .takeIf { !concatenated && it.dtype == "float32" && it.shape[1] == 1L }
            ?.let { backend.onnxTensor(logits) }

    override var length = 0
        private set

    init {
        val missing = (setOf("inputs_embeds", "attention_mask") - session.inputNames) + (setOf("logits") + present - requested)
        if (missing.isNotEmpty()) throw MobileMMError("${bundle.partFile("decoder")}: not a decoder, it lacks ${missing.joinToString()}")
        if (embedsType != "float32") throw MobileMMError("${bundle.partFile("decoder")}: takes $embedsType, unknown here")
        if (logitsOut != null) outputs["logits"] = logitsOut
        bindCaches()
    }

    override fun decode(
        embeds: Tensor,
        positions: Tensor?,
    ): FloatBuffer {
        val count = embeds.shape[1].toInt()
        val before = length
        if (before + count > model.contextLength) {
            throw MobileMMError("${before + count} positions are more than this model's context of ${model.contextLength}")
        }
        try {
            var start = 0
            while (true) {
                val end = minOf(start + CHUNK, count)
                val found = run(embeds.slice(1, start, end), positions?.slice(2, start, end))
                if (end == count) return found
                start = end
            }
        } catch (error: MobileMMError) {
            if (!concatenated || length == before) length = before else truncate(before)
            throw error
        }
    }

    private fun run(
        embeds: Tensor,
        positions: Tensor?,
    ): FloatBuffer {
        val count = embeds.shape[1]
        val total = length + count.toInt()
        reserve(total)
        val perRun = ArrayList<OnnxTensor>(3)

        fun feed(
            name: String,
            tensor: Tensor,
        ) {
            inputs[name] = backend.onnxTensor(tensor).also { perRun += it }
        }
        try {
            feed("inputs_embeds", embeds)
            feed("attention_mask", Tensor("int64", listOf(1, total.toLong()), first(mask, 8 * total)))
            if (takesPositions) feed("position_ids", positions ?: textPositions(length, count.toInt()))
            backend.guarded("decoder") { session.run(inputs, free, outputs, backend.run) }.use { result ->
                if (concatenated) keep(result)
                if (logitsOut == null) lastLogits(result["logits"].get() as OnnxTensor)
            }
            length = total
            return logits.floats()
        } finally {
            perRun.forEach { it.close() }
        }
    }

    override fun truncate(length: Int) {
        require(length in 0..this.length) { "a cache of ${this.length} positions cannot be cut to $length" }
        if (concatenated && length < this.length) {
            caches = caches.mapValues { (_, tensor) -> cache(length).also { copyRows(tensor, it, length) } }
            bindCaches()
        }
        this.length = length
    }

    override fun close() {
        (inputs.values + outputs.values).forEach { if (!it.isClosed) it.close() }
    }

    /** Room for that many positions. */
    private fun reserve(total: Int) {
        if (mask.capacity() < 8 * total) mask = ones(room(total))
        if (concatenated || total <= capacity) return
        val wanted = room(maxOf(total, FIRST_LENGTH))
        caches = caches.mapValues { (_, tensor) -> cache(wanted).also { copyRows(tensor, it, length) } }
        bindCaches()
        capacity = wanted
    }

    private fun bindCaches() {
        for ((index, name) in past.withIndex()) {
            inputs[name]?.close()
            val bound = backend.onnxTensor(caches.getValue(name))
            inputs[name] = bound
            if (!concatenated) outputs[present[index]] = bound
        }
    }

    /** Outputs of a graph that concatenates are the next step's inputs. */
    private fun keep(result: OrtSession.Result) {
        caches =
            past.indices.associate { index ->
                val value = result[present[index]].get() as OnnxTensor
                val tensor = Tensor.of(cacheType, *value.info.shape)
                tensor.view().put(value.byteBuffer)
                past[index] to tensor
            }
        bindCaches()
    }

    /** The last position's logits in float32, wherever the graph leaves them. */
    private fun lastLogits(value: OnnxTensor) {
        val all = value.floatBuffer
        val size = model.vocabSize
        all.position(all.limit() - size)
        logits.floats().put(all)
    }

    private fun cache(positions: Int) = Tensor.of(cacheType, 1, model.numKeyValueHeads.toLong(), positions.toLong(), model.headDim.toLong())

    private fun copyRows(
        from: Tensor,
        to: Tensor,
        positions: Int,
    ) {
        val row = model.headDim * Tensor.BYTES.getValue(cacheType)
        val source = from.view()
        val target = to.view()
        for (head in 0 until model.numKeyValueHeads) {
            source.limit((head * from.shape[2].toInt() + positions) * row).position(head * from.shape[2].toInt() * row)
            target.position(head * to.shape[2].toInt() * row)
            target.put(source)
        }
    }

    private fun textPositions(
        start: Int,
        count: Int,
    ): Tensor {
        val tensor = Tensor.of("int64", 3, 1, count.toLong())
        val longs = tensor.view().asLongBuffer()
        repeat(3) { for (index in 0 until count) longs.put((start + index).toLong()) }
        return tensor
    }

    /** The next power of two, but no more than the context. */
    private fun room(total: Int) = minOf(Integer.highestOneBit(maxOf(total, 2) - 1).shl(1), model.contextLength).coerceAtLeast(total)

    private companion object {
        /** Positions that a cache has room for at first; it doubles when it is full. */
        const val FIRST_LENGTH = 1024

        /** Positions of a prompt that are run at once. */
        const val CHUNK = 512

        fun ones(count: Int): ByteBuffer = Tensor.direct(8 * count).also { buffer -> repeat(count) { buffer.putLong(1) } }

        fun first(
            buffer: ByteBuffer,
            bytes: Int,
        ): ByteBuffer = buffer.duplicate().also { it.clear().limit(bytes) }.slice().order(ByteOrder.nativeOrder())
    }
}
