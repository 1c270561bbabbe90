package org.mobilemm

import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.util.ServiceLoader

/** Numbers in memory that a runtime reads and writes where they are: direct, in the machine's byte order. */
class Tensor(val dtype: String, val shape: List<Long>, val data: ByteBuffer) {
    val count: Long get() = shape.fold(1L) { product, size -> product * size }

    fun floats(): FloatBuffer {
        check(dtype == "float32") { "a tensor of $dtype" }
        return view().asFloatBuffer()
    }

    /** The bytes from the first one on, whatever has been read of them. */
    fun view(): ByteBuffer = data.duplicate().order(ByteOrder.nativeOrder()).also { it.clear() }

    /** Places `start` until `end` of one axis; the whole is itself. */
    fun slice(
        axis: Int,
        start: Int,
        end: Int,
    ): Tensor {
        if (start == 0 && end.toLong() == shape[axis]) return this
        val sliced = shape.toMutableList().also { it[axis] = (end - start).toLong() }
        val inner = shape.drop(axis + 1).fold(BYTES.getValue(dtype)) { product, size -> product * size.toInt() }
        val found = of(dtype, *sliced.toLongArray())
        val target = found.view()
        for (outer in 0 until shape.take(axis).fold(1) { product, size -> product * size.toInt() }) {
            val base = outer * shape[axis].toInt()
            val source = view()
            source.limit((base + end) * inner).position((base + start) * inner)
            target.put(source)
        }
        return found
    }

    companion object {
        fun of(
            dtype: String,
            vararg shape: Long,
        ): Tensor {
            val bytes = shape.fold(1L) { product, size -> Math.multiplyExact(product, size) } * BYTES.getValue(dtype)
            return Tensor(dtype, shape.toList(), direct(Math.toIntExact(bytes)))
        }

        fun ofFloats(
            values: FloatArray,
            vararg shape: Long,
        ) = of("float32", *shape).also { it.floats().put(values) }

        fun ofIds(ids: List<Int>): Tensor {
            val tensor = of("int64", 1, ids.size.toLong())
            val longs = tensor.view().asLongBuffer()
            for (id in ids) longs.put(id.toLong())
            return tensor
        }

        internal val BYTES = mapOf("float32" to 4, "float16" to 2, "uint8" to 1, "int8" to 1, "int32" to 4, "int64" to 8)

        internal fun direct(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())
    }
}

/** The language model with the keys and values of one conversation. */
interface Decoder : AutoCloseable {
    /** How many positions the cache holds. */
    val length: Int

    /**
     * Appends `inputs_embeds` (1, n, hidden) to the cache; logits (vocabulary) behind the last one, valid until the
     * next call. `positions` int64 (3, 1, n) only for models whose positions have three dimensions;
     * others count by themselves.
     *
     * When it raises, the cache is what it was before. Raises [MobileMMError] when the cache would grow longer than
     * the model's context, [Cancelled] when somebody has cancelled.
     */
    fun decode(
        embeds: Tensor,
        positions: Tensor?,
    ): FloatBuffer

    /** Forgets all positions from `length` on. */
    fun truncate(length: Int)
}

/** One bundle, its parts loaded when they are first used. */
interface Backend : AutoCloseable {
    /** What runs it here, for people: a name, and a version where it tells one. */
    val runtime: String

    /**
     * Whether texts and pictures are fed one after the other, as the runtime's own runner does.
     *
     * With activations in int8, what a near-tie falls to depends on it.
     */
    val prefillsInPieces: Boolean

    /** Loads a part now. Raises [MobileMMError] when it cannot be loaded. */
    fun load(part: String)

    /** Gives a part's memory back; the next use loads it again. */
    fun release(part: String)

    /** Runs a part that keeps no state: its outputs by name. Raises [MobileMMError] when it cannot. */
    fun run(
        part: String,
        inputs: Map<String, Tensor>,
    ): Map<String, Tensor>

    /** A decoder with an empty cache. Several share the weights. */
    fun decoder(): Decoder

    /** Stops what runs now, from any thread: it raises [Cancelled]. So does what comes next, until [resume]. */
    fun cancel()

    /** Takes back [cancel]. */
    fun resume()

    companion object {
        /** What runs this bundle on this device. Raises [MobileMMError] for targets that it has no runtime for. */
        fun open(
            bundle: Bundle,
            threads: Int = 0,
        ): Backend {
            val target = bundle.manifest.target
            if (target == "onnx") return OnnxBackend(bundle, threads)
            val others = ServiceLoader.load(BackendProvider::class.java, BackendProvider::class.java.classLoader).toList()
            others.firstOrNull { it.target == target }?.let { return it.open(bundle, threads) }
            throw MobileMMError(
                "${bundle.folder}: this app runs bundles for ${(listOf("onnx") + others.map { it.target }).joinToString(" and ")}," +
                    " this one is for $target: export the model with --target onnx",
            )
        }
    }
}

/** What runs bundles of another target, where a library that has one is linked: [ServiceLoader] finds it. */
interface BackendProvider {
    val target: String

    /** @param threads 0 for as many as the runtime takes by itself. */
    fun open(
        bundle: Bundle,
        threads: Int,
    ): Backend
}

/** Somebody has called [Backend.cancel]. */
class Cancelled : MobileMMError("stopped")
