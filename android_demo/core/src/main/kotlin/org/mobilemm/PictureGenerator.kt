package org.mobilemm

/** Logits at the signal tokens and a seed → a picture, by the parts of a bundle that draw. */
internal class PictureGenerator(private val bundle: Bundle, private val backend: Backend, private val generation: Generation) {
    /** Room for logits (1, signal tokens, words): those of the vocabulary's first words tell what is drawn. */
    fun signals(): Tensor {
        val shape = bundle.manifest.parts.getValue("output_projector").inputs.first { it.name == "signal_logits" }.shape
        return Tensor.of("float32", *shape.map { it as Long }.toLongArray())
    }

    /** Throws [MobileMMError] for a generator that gives something else than its manifest says. */
    fun draw(
        signals: Tensor,
        seed: ULong,
    ): PixelRaster {
        val condition = backend.run("output_projector", mapOf("signal_logits" to signals))
        val picture = backend.run("generator", condition + ("noise" to Noise.normal(seed, generation.noiseShape)))["picture"]
        if (picture?.dtype != "float32" || picture.count != 3L * generation.height * generation.width) {
            throw MobileMMError("${bundle.partFile("generator")}: gives no picture that can be shown; ${ManifestReader.AGAIN}")
        }
        return toRaster(picture.floats(), generation.width, generation.height)
    }

    /** Gives the parts' memory back. */
    fun release() = PARTS.forEach(backend::release)

    companion object {
        val PARTS = listOf("output_projector", "generator")
    }
}
