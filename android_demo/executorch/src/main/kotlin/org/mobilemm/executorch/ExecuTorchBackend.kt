package org.mobilemm.executorch

import org.mobilemm.Backend
import org.mobilemm.BackendProvider
import org.mobilemm.Bundle
import org.mobilemm.Cancelled
import org.mobilemm.Decoder
import org.mobilemm.MobileMMError
import org.mobilemm.Tensor
import java.nio.FloatBuffer

/** Lets [Backend.open] take bundles for ExecuTorch, too: an app need only link this library. */
class ExecuTorchProvider : BackendProvider {
    override val target get() = "executorch"

    override fun open(
        bundle: Bundle,
        threads: Int,
    ): Backend = ExecuTorchBackend(bundle, threads)
}

/**
 * ExecuTorch bundles: one program whose methods are the parts; `vision_encoder` takes one picture a call,
 * `token_embedding` ids alone, and `text_decoder` keeps keys and values in buffers of its own.
 *
 * Each part has a program of its own, so that it can be given back; the file is mapped, not read, each time. The library
 * tells no version: whether it is as new as the bundle asks for is the app's to know.
 *
 * @param threads 0 for as many as ExecuTorch takes by itself. The process has one pool of them: the program that was
 *   loaded last says how many.
 */
class ExecuTorchBackend(private val bundle: Bundle, private val threads: Int = 0) : Backend {
    private val programs = HashMap<String, ExecuTorchProgram>()

    @Volatile private var cancelled = false

    override val runtime get() = "ExecuTorch"

    override val prefillsInPieces get() = true

    override fun load(part: String) {
        program(part)
    }

    override fun release(part: String) {
        programs.remove(part)?.close()
    }

    override fun run(
        part: String,
        inputs: Map<String, Tensor>,
    ): Map<String, Tensor> {
        fun input(name: String) = inputs[name] ?: throw MobileMMError("part '$part' was given no $name")
        val program = program(part)
        val specs = bundle.manifest.parts.getValue(part)
        val made =
            when (part) {
                "vision" -> look(program, input("pixels"))
                "embed" -> embed(program, input("input_ids"), input("image_features"))
                else -> call(program, specs.inputs.map { input(it.name) })
            }
        return mapOf(specs.outputs[0].name to made)
    }

    /** Each has a program of its own: keys and values are part of it. */
    override fun decoder(): Decoder = ExecuTorchDecoder(this, made("decoder"), bundle)

    /** What runs now, one call of a method, is not interrupted; nothing comes behind it. */
    override fun cancel() {
        cancelled = true
    }

    override fun resume() {
        cancelled = false
    }

    override fun close() {
        programs.values.forEach { it.close() }
        programs.clear()
    }

    internal fun call(
        program: ExecuTorchProgram,
        inputs: List<Tensor>,
        into: Tensor? = null,
    ): Tensor {
        if (cancelled) throw Cancelled()
        return program.run(inputs, into)
    }

    private fun program(part: String) = programs.getOrPut(part) { made(part) }

    private fun made(part: String): ExecuTorchProgram {
        val file = bundle.partFile(part)
        val specs = bundle.manifest.parts.getValue(part)
        return ExecuTorchProgram(file, METHODS[part] ?: part, specs, bundle.manifest.model.contextLength, threads)
    }

    /** Features (images · tokens, width) of pictures, uint8 (images, 3, height, width), one by one. */
    private fun look(
        program: ExecuTorchProgram,
        pixels: Tensor,
    ): Tensor {
        val count = pixels.shape[0].toInt()
        val rows = List(count) { call(program, listOf(pixels.slice(0, it, it + 1))) }
        val all = Tensor.of("float32", count * rows[0].shape[1], rows[0].shape[2])
        val target = all.floats()
        for (one in rows) target.put(one.floats())
        return all
    }

    /**
     * Rows of the table, and pictures' features in the places of their placeholders, in reading order. A placeholder
     * beyond the features is the model's own word, where its table has it.
     */
    private fun embed(
        program: ExecuTorchProgram,
        ids: Tensor,
        features: Tensor,
    ): Tensor {
        val model = bundle.manifest.model
        val known = Tensor.of("int64", *ids.shape.toLongArray())
        val (given, looked) = ids.view().asLongBuffer() to known.view().asLongBuffer()
        val images = ArrayList<Int>()
        for (index in 0 until given.limit()) {
            val id = given.get(index)
            if (id == model.imageTokenId.toLong()) images += index
            looked.put(index, if (id == model.imageTokenId.toLong() && id >= model.vocabSize) 0 else id)
        }
        val rows = call(program, listOf(known))
        val source = features.floats()
        val target = rows.floats()
        for ((row, place) in images.take(features.shape[0].toInt()).withIndex()) {
            val one = source.duplicate()
            one.limit((row + 1) * model.hiddenSize).position(row * model.hiddenSize)
            target.position(place * model.hiddenSize)
            target.put(one)
        }
        return rows
    }

    private companion object {
        /** As ExecuTorch's own multimodal runner names them; it knows none that draws. */
        val METHODS = mapOf("vision" to "vision_encoder", "embed" to "token_embedding", "decoder" to "text_decoder")
    }
}

/** A [Decoder] over the method `text_decoder`, whose keys and values are buffers of fixed length. */
private class ExecuTorchDecoder(
    private val backend: ExecuTorchBackend,
    private val program: ExecuTorchProgram,
    bundle: Bundle,
) : Decoder {
    private val context = bundle.manifest.model.contextLength
    private val takesPositions = bundle.manifest.parts.getValue("decoder").inputs.any { it.name == "position_ids" }
    private val start = Tensor.of("int64", 1)
    private val logits = Tensor.of("float32", 1, 1, bundle.manifest.model.vocabSize.toLong())

    override var length = 0
        private set

    override fun decode(
        embeds: Tensor,
        positions: Tensor?,
    ): FloatBuffer {
        val count = embeds.shape[1].toInt()
        val total = length + count
        if (total > context) throw MobileMMError("$total positions are more than this model's context of $context")
        start.view().asLongBuffer().put(0, length.toLong())
        val inputs = listOf(embeds, start) + if (takesPositions) listOf(positions ?: textPositions(count)) else emptyList()
        backend.call(program, inputs, logits)
        length = total
        return logits.floats()
    }

    override fun truncate(length: Int) {
        require(length in 0..this.length) { "a cache of ${this.length} positions cannot be cut to $length" }
        this.length = length
    }

    override fun close() = program.close()

    private fun textPositions(count: Int): Tensor {
        val tensor = Tensor.of("int64", 3, 1, count.toLong())
        val longs = tensor.view().asLongBuffer()
        repeat(3) { for (index in 0 until count) longs.put((length + index).toLong()) }
        return tensor
    }
}
