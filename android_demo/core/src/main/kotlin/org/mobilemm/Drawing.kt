package org.mobilemm

import java.nio.FloatBuffer
import java.security.SecureRandom

/** A part of an answer. The texts of all of them join to the answer's. */
sealed interface Piece {
    /** Whole characters; empty for a picture. */
    val text: String
}

/** Words of an answer. */
class Words(override val text: String) : Piece

/** The model has begun to draw: a [Drawn] follows, unless it is stopped. */
object Drawing : Piece {
    override val text get() = ""
}

/** A picture on its way, behind one of its [steps]. */
class Sketch(val picture: PixelRaster, val step: Int, val steps: Int) : Piece {
    override val text get() = ""
}

/**
 * A picture that the model has drawn.
 *
 * @property seed of the noise that it was drawn from.
 * @property signal the signal tokens as text, for the conversation's memory.
 * @property seconds that output projector and generator took.
 */
class Drawn(val picture: PixelRaster, val seed: ULong, val signal: String, val seconds: Double) : Piece {
    override val text get() = ""
}

/** The seed given, its bits taken as an unsigned number, or a new one, short enough to be typed again. */
internal fun chooseSeed(seed: Long?): ULong = seed?.toULong() ?: SecureRandom().nextInt().toUInt().toULong()

/** Numbers (1, 3, height, width) in [0, 1] → a picture, rounded. */
internal fun toRaster(
    picture: FloatBuffer,
    width: Int,
    height: Int,
): PixelRaster {
    val plane = width * height

    fun level(at: Int) = Math.rint(picture.get(at).coerceIn(0f, 1f) * 255.0).toInt()
    val pixels = IntArray(plane) { 255 shl 24 or (level(it) shl 16) or (level(plane + it) shl 8) or level(2 * plane + it) }
    return PixelRaster(width, height, pixels)
}
