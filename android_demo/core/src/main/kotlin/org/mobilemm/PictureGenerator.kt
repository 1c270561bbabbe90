package org.mobilemm

/**
 * Logits at the signal tokens and a seed → a picture, by the parts of a bundle that draw: in one graph, or step by step.
 *
 * @param steps of a drawing; null: those that the bundle was made for. Raises [MobileMMError] for others than it draws in.
 */
internal class PictureGenerator(
    private val bundle: Bundle,
    private val backend: Backend,
    private val generation: Generation,
    steps: Int? = null,
) {
    /** Of each step what `scales` is; null where all steps are one graph. */
    private val rows = rows(steps ?: generation.steps)

    private fun rows(count: Int): List<FloatArray>? {
        val wrong = "${bundle.folder}: $count steps are wanted, but this bundle draws in"
        val schedules = generation.schedules
        if (schedules == null) {
            if (count == generation.steps) return null
            throw MobileMMError("$wrong ${generation.steps}: export it with --stepwise, or with --steps $count")
        }
        return schedules.firstOrNull { it.size == count }
            ?: throw MobileMMError("$wrong ${schedules.joinToString { "${it.size}" }}: export it with --stepwise --steps $count")
    }

    /** Of a drawing. */
    val steps: Int get() = rows?.size ?: generation.steps

    /** Whether each step is a call of its own. */
    val isStepwise: Boolean get() = rows != null

    /** Room for logits (1, signal tokens, words): those of the vocabulary's first words tell what is drawn. */
    fun signals(): Tensor {
        val shape = bundle.manifest.parts.getValue("output_projector").inputs.first { it.name == "signal_logits" }.shape
        return Tensor.of("float32", 1, generation.signalTokenIds.size.toLong(), shape.last() as Long)
    }

    /**
     * The picture. Of one that is made step by step `onStep` is called behind each step but the last, with its number,
     * how many there are, and what decodes the picture so far.
     *
     * Throws [MobileMMError] for a generator that gives something else than its manifest says.
     */
    fun draw(
        signals: Tensor,
        seed: ULong,
        onStep: (Int, Int, () -> PixelRaster) -> Unit = { _, _, _ -> },
    ): PixelRaster {
        val condition = condition(signals)
        if (rows == null) return picture("generator", condition + ("noise" to Noise.normal(seed, generation.noiseShape)))
        return decode(
            latents(condition, seed) { step, latents ->
                if (step < rows.size) onStep(step, rows.size) { decode(latents) }
            },
        )
    }

    /** What the logits ask for, under the name that the parts take it by. */
    fun condition(signals: Tensor): Map<String, Tensor> = backend.run("output_projector", mapOf("signal_logits" to signals))

    /**
     * Behind the last step of a drawing that is made step by step, (1, channels, height, width); `onStep` is given each
     * step's number, from 1 on, and what it made.
     */
    fun latents(
        condition: Map<String, Tensor>,
        seed: ULong,
        onStep: (Int, Tensor) -> Unit,
    ): Tensor {
        val rows = rows!!
        val shape = listOf(1L) + generation.noiseShape.drop(2)
        // One for the beginning, and one for each step that renews.
        val noise = Noise.normal(seed, listOf(noises(rows).toLong()) + shape.drop(1)).floats()
        val none = Tensor.of("float32", *shape.toLongArray())

        fun next() = Tensor.ofFloats(FloatArray(none.count.toInt()).also { noise.get(it) }, *shape.toLongArray())
        var latents = next()
        for ((index, row) in rows.withIndex()) {
            val scales = Tensor.ofFloats(row, row.size.toLong())
            val inputs = mapOf("latents" to latents, "noise" to if (row[RENEWS] != 0f) next() else none, "scales" to scales)
            val found = backend.run("denoiser", condition + inputs)["next_latents"]
            if (found?.dtype != "float32" || found.shape != shape) {
                throw MobileMMError("${bundle.partFile("denoiser")}: gives no latents; ${ManifestReader.AGAIN}")
            }
            latents = found
            onStep(index + 1, found)
        }
        return latents
    }

    /** The picture of latents. */
    fun decode(latents: Tensor): PixelRaster = picture("image_decoder", mapOf("latents" to latents))

    private fun picture(
        part: String,
        inputs: Map<String, Tensor>,
    ): PixelRaster {
        val picture = backend.run(part, inputs)["picture"]
        if (picture?.dtype != "float32" || picture.count != 3L * generation.height * generation.width) {
            throw MobileMMError("${bundle.partFile(part)}: gives no picture that can be shown; ${ManifestReader.AGAIN}")
        }
        return toRaster(picture.floats(), generation.width, generation.height)
    }

    /** Gives the parts' memory back. */
    fun release() = parts(bundle).forEach(backend::release)

    companion object {
        private val PARTS = listOf("output_projector", "generator", "denoiser", "image_decoder")
        private const val RENEWS = 4

        /** Those of a bundle that draw. */
        fun parts(bundle: Bundle) = PARTS.filter { it in bundle.manifest.parts }

        /** How many noises a drawing by these rows takes. */
        fun noises(rows: List<FloatArray>) = 1 + rows.count { it[RENEWS] != 0f }
    }
}
